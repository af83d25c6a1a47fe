"""Grids of one-shot methods on a tiny checkpoint: what cells hold, what a rerun takes from them."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import runpy
import shutil
import warnings
from pathlib import Path

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import save_model, save_text

from moe_jax.calibrate import Measurement, calibrate_domains, domain_batches
from moe_jax.compare import (
    Grid,
    prepare,
    results,
    run_cells,
    runner,
    write_results,
)
from moe_jax.compare.figures import Panel, Point, plot_access, plot_lines, plot_ranks
from moe_jax.compare.results import Spread, ranking, tokens_to_reach
from moe_jax.compare.runner import canonical
from moe_jax.compare.tables import needed_text
from moe_jax.data import evaluation_windows, load_tokenizer, training_dataset
from moe_jax.distill import TrainingRun, train
from moe_jax.evaluate import Reference, TaskSettings, evaluate, evaluate_tasks, find_tasks
from moe_jax.hf import load_hf
from moe_jax.hf.reader import read_config
from moe_jax.model import forward
from moe_jax.params import count_params
from moe_jax.plan import Cut, LayerPlan, Plan, plan_cut
from moe_jax.prune import apply_plan
from moe_jax.prune.sequential import sequential_cut
from moe_jax.settings import CalibrationConfig, EvaluationConfig, TrainingConfig, section

REPOSITORY = Path(__file__).parents[1]
TASKS = REPOSITORY / "tests/data/tasks"
METHODS = {
    "MoNE": {"method": "mone", "replacement": "novice"},
    "REAP": {"method": "reap", "replacement": "delete"},
    "neurons": {"method": "slim", "importance": "fisher"},
    "global": {"method": "routing_mass", "replacement": "delete", "scope": "global"},
    "merged": {"method": "m_smoe"},
    "layers": {"method": "angular"},
}
SIZES = {"neurons": {"width_ratio": 0.5}, "layers": {"drop_layers": 1}}
BLOCKS = (
    {"methods": ("MoNE", "REAP", "neurons"), "ratios": (0.75, 0.5)},
    {"methods": ("global", "merged", "layers"), "ratios": (0.5,)},
    {"methods": ("MoNE", "REAP"), "ratios": (0.5,), "sources": ("both", "prose")},
    {"methods": ("MoNE", "REAP"), "ratios": (0.5,), "counts": (4, 8)},
)


def settings(folder: Path, **changes) -> dict:
    """A grid on ``folder/model``, calibrated on two texts together or on one."""
    prose, code = (save_text(folder, name, 12) for name in ("prose", "code"))
    held_out = [save_text(folder, name, 5) for name in ("stories", "programs")]
    return {
        "models": (str(folder / "model"),),
        "output": str(folder / "out"),
        "methods": METHODS,
        "sources": (("both", (prose, code)), ("prose", (prose,))),
        "count": 8,
        "seeds": (0, 1),
        "blocks": BLOCKS,
        "calibration": {"seq_len": 16, "batch_size": 2},
        "evaluation": {"files": held_out, "seq_len": 16, "batch_size": 2},
        "focus": "MoNE",
        "rival": "REAP",
        **changes,
    }


def compare(raw: dict) -> dict[str, Path]:
    grid = Grid.from_dict(raw)
    subjects = prepare(grid)
    run_cells(grid, subjects)
    return write_results(grid, subjects)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A whole comparison: its settings, and its files."""
    folder = tmp_path_factory.mktemp("compare")
    save_model(folder / "model", "olmoe")
    raw = settings(folder)
    return raw, compare(raw)


def windows(raw, tokenizer):
    return evaluation_windows(section(EvaluationConfig, raw["evaluation"]), tokenizer)


def made(raw: dict, *folders: str) -> dict[Path, int]:
    """Files of a comparison's folders, and when each was written."""
    output = Path(raw["output"])
    names = folders or ("cells", "originals", "statistics")
    return {f: f.stat().st_mtime_ns for name in names for f in (output / name).iterdir()}


def test_blocks_share_cells_and_methods_share_calibrations(done):
    raw, _ = done
    cells = Grid.from_dict(raw).cells()
    assert len(cells) == len(set(cells))
    # 3 methods x 2 ratios, 3 more, 2 on the other text, 2 with fewer sequences; each of 2 seeds.
    assert len(cells) == len(made(raw, "cells")) == 2 * (3 * 2 + 3 + 2 + 2)
    assert len({file.stem for file in made(raw, "statistics")}) == 2 * 3
    assert len(made(raw, "originals")) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_cell_is_what_its_steps_give_by_hand(done, method):
    raw, paths = done
    row = next(
        row
        for row in json.loads(paths["json"].read_text())["cells"]
        if row["method"] == method and row["ratio"] == 0.5 and row["seed"] == 1
    )
    assert (row["source"], row["count"]) == ("both", 8)
    config, params = load_hf(raw["models"][0], "float32")
    tokenizer = load_tokenizer(raw["models"][0])
    size = SIZES.get(method, {"keep_ratio": 0.5})
    stage = Cut.from_dict({**METHODS[method], **size}, "stage")
    calibration = CalibrationConfig(num_sequences=8, **raw["calibration"])
    domains = domain_batches(raw["sources"][0][1], tokenizer, calibration, seed=1)
    stats = calibrate_domains(params, config, domains, Measurement(stage.losses, seed=1))
    plan = plan_cut(stage, stats, config, seed=1, params=params).plan
    smaller, cut = apply_plan(params, config, plan, stats)
    text = windows(raw, tokenizer)
    expected = evaluate(cut, smaller, text, reference=(params, config))
    assert set(row["domains"]) == {"stories", "programs"}
    for name in ("bits_per_byte", "kl", "top1_agreement"):
        np.testing.assert_allclose(row[name], getattr(expected.mean, name), 1e-5, 1e-6)
        for domain, values in row["domains"].items():
            by_hand = getattr(expected.domains[domain], name)
            np.testing.assert_allclose(values[name], by_hand, 1e-5, 1e-6)
    assert row["tokens"] == stats.tokens
    for i, layer in plan.layers.items():
        assert row["layers"][str(i)]["removed"] == list(layer.deleted)
        assert row["layers"][str(i)]["novices"] == list(layer.novices)
    assert row["dropped_layers"] == list(plan.dropped_layers)
    assert row["parameters"] == count_params(smaller).total


def test_the_original_is_measured_once_and_as_it_is(done):
    raw, paths = done
    (row,) = json.loads(paths["json"].read_text())["originals"]
    config, params = load_hf(raw["models"][0], "float32")
    tokenizer = load_tokenizer(raw["models"][0])
    expected = evaluate(params, config, windows(raw, tokenizer))
    np.testing.assert_allclose(row["bits_per_byte"], expected.mean.bits_per_byte, 1e-5)
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    assert row["top1_agreement"] == 1


def test_novices_moved_to_the_end_leave_the_function_as_it_is(done):
    config, params = load_hf(done[0]["models"][0], "float32")
    layers = {
        0: LayerPlan(novices=(0, 2), novice_value="zero"),
        1: LayerPlan(novices=(1,), novice_value="zero"),
    }
    smaller, cut = apply_plan(params, config, Plan(layers))
    moved, same = canonical(cut, smaller, config.moe(0).expert_width)
    assert [same.moe(i).novice_ids for i in same.moe_layers] == [(2, 3), (3,)]
    tokens = np.random.default_rng(0).integers(0, 15, (2, 12))
    with jax.default_matmul_precision("highest"):
        first, second = (forward(p, c, tokens)[0] for p, c in ((cut, smaller), (moved, same)))
    np.testing.assert_allclose(first, second, 0, 1e-5)


def test_experts_of_one_width_leave_the_function_as_it_is(done):
    config, params = load_hf(done[0]["models"][0], "float32")
    width, count = config.moe(0).expert_width, config.moe(0).num_experts
    neurons = {e: tuple(range(1 + e % 2)) for e in range(1, count)}
    own = LayerPlan(novices=(0,), novice_value="zero", neurons=neurons, own_widths=True)
    smaller, cut = apply_plan(
        params, config, Plan({0: own, 1: LayerPlan(novices=(0,), novice_value="zero")})
    )
    constant = cut["layers"][0]["moe"]["novices"]["constant"]
    cut["layers"][0]["moe"]["novices"] = {"constant": jnp.ones_like(constant)}
    assert smaller.moe(0).expert_widths
    filled, same = canonical(cut, smaller, width)
    assert same.moe(0) == dataclasses.replace(config.moe(0), expert_bias=True)
    tokens = np.random.default_rng(0).integers(0, 15, (2, 12))
    with jax.default_matmul_precision("highest"):
        first, second = (forward(p, c, tokens)[0] for p, c in ((cut, smaller), (filled, same)))
    np.testing.assert_allclose(first, second, 0, 1e-5)


def test_a_rerun_measures_nothing(done):
    raw, paths = done
    before, written = {name: path.read_bytes() for name, path in paths.items()}, made(raw)
    again = compare(raw)
    assert {name: path.read_bytes() for name, path in again.items()} == before
    assert made(raw) == written


def test_more_cells_of_a_known_sample_need_no_calibration(done):
    raw, _ = done
    before = made(raw, "statistics")
    methods = {**METHODS, "MoNE, zeros": {"method": "mone", "replacement": "zero"}}
    block = {"methods": ("MoNE", "MoNE, zeros", "neurons"), "ratios": (0.75,)}
    grid = Grid.from_dict({**raw, "methods": methods, "blocks": (block,)})
    subjects = prepare(grid)
    run_cells(grid, subjects)
    assert len(results.result_rows(subjects)) == 1 + 2 * 3
    assert made(raw, "statistics") == before


def test_another_name_of_the_same_cut_is_not_measured_again(done):
    raw, _ = done
    before = made(raw)
    methods = {"novices": METHODS["MoNE"], "gradient": METHODS["neurons"]}
    changed = {"methods": methods, "focus": "", "rival": "", "blocks": ({"ratios": (0.5,)},)}
    grid = Grid.from_dict({**raw, **changed})
    run_cells(grid, prepare(grid))
    assert made(raw) == before


def test_a_killed_run_goes_on_to_the_same_numbers(done, tmp_path):
    """What it left is whole: some cells, of which here one was damaged since."""
    raw, paths = done
    shutil.copytree(raw["output"], tmp_path / "out")
    raw = {**raw, "output": str(tmp_path / "out")}
    kept = sorted(made(raw, "cells"))
    for file in kept[4:]:
        file.unlink()
    kept[0].write_text(kept[0].read_text()[:50])
    grid = Grid.from_dict(raw)
    subjects = prepare(grid)
    with pytest.raises(FileNotFoundError, match="run the comparison to its end"):
        results.result_rows(subjects)
    run_cells(grid, subjects)
    found = results.select(results.result_rows(subjects))
    expected = json.loads(paths["json"].read_text())["cells"]
    for one, other in zip(found, expected, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


def test_files_say_the_same(done):
    _, paths = done
    assert set(paths) >= {"csv", "json", "tables", "summary", "html", "sizes", "ranks"}
    assert {"robustness", "access_0"} <= set(paths)
    record = json.loads(paths["json"].read_text())
    rows = list(csv.DictReader(paths["csv"].open()))
    assert len(rows) == len(record["cells"]) + len(record["originals"])
    for row, cell in zip(rows[1:], record["cells"], strict=True):
        assert float(row["bits_per_byte"]) == cell["bits_per_byte"]
        assert float(row["kl/stories"]) == cell["domains"]["stories"]["kl"]
        assert row["method"] == cell["method"]
    page, tables = paths["html"].read_text(), paths["tables"].read_text()
    for group in record["summary"]:
        chosen = [
            cell["bits_per_byte"]
            for cell in record["cells"]
            if all(cell[name] == group[name] for name in ("method", "ratio", "source", "count"))
        ]
        bits = group["bits_per_byte"]
        assert len(chosen) == 2
        assert bits["mean"] == pytest.approx(np.mean(chosen))
        assert bits["deviation"] == pytest.approx(np.std(chosen, ddof=1))
        text = f"{bits['mean']:.4f} ± {bits['deviation']:.4f}"
        assert text in page
        assert text in tables
    for sentence in record["findings"]:
        assert sentence in paths["summary"].read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page


def row(method: str, seed: int, *bits: float) -> dict:
    return {
        "method": method,
        "seed": seed,
        "bits_per_byte": float(np.mean(bits)),
        "domains": {str(n): {"bits_per_byte": value} for n, value in enumerate(bits)},
    }


def test_ranking_pairs_seeds_and_leaves_open_what_they_leave_open():
    rows = [row("a", 0, 2.0, 1.0), row("a", 1, 2.2, 1.2), row("a", 2, 2.1, 1.1)]
    # Always 0.01 behind, whatever the seed: clear, though seeds differ by more than that.
    rows += [
        row("b", r["seed"], *(v["bits_per_byte"] + 0.01 for v in r["domains"].values()))
        for r in rows[:3]
    ]
    # Ahead and behind in turn, and better in one domain.
    rows += [row("c", 0, 2.3, 0.9), row("c", 1, 2.2, 1.0), row("c", 2, 2.4, 1.0)]
    first, second, third = ranking(rows)
    assert [first.method, second.method, third.method] == ["a", "b", "c"]
    assert first.behind == 0
    assert second.behind == pytest.approx(0.01)
    assert second.low > 0
    assert not second.tied
    assert third.tied
    assert (second.domains, third.domains) == (0, 1)
    assert first.bits == Spread(pytest.approx(1.6), pytest.approx(0.1))
    assert ranking([row("a", 0, 1.0), row("b", 0, 2.0)])[1].tied


def test_only_seeds_that_all_have_are_compared():
    cells = [
        ("a", "x", 0),
        ("a", "x", 1),
        ("a", "y", 0),
        ("b", "x", 0),
        ("b", "y", 0),
        ("c", "x", 0),
    ]
    rows = [{"method": m, "source": s, "seed": seed} for m, s, seed in cells]
    kept = results.complete(rows, "source")
    assert [tuple(row.values()) for row in kept] == [c for c in cells if c[0] != "c" and c[2] == 0]


def test_tasks_of_every_cell(done, tmp_path):
    raw, _ = done
    block = {"methods": ("REAP",), "ratios": (0.5,), "seeds": (0,)}
    tasks = {"tasks": ("tiny_piqa",), "tasks_folder": str(TASKS), "limit": 4}
    raw = {**raw, **tasks, "output": str(tmp_path / "out"), "blocks": (block,)}
    paths = compare(raw)
    record = json.loads(paths["json"].read_text())
    config, params = load_hf(raw["models"][0], "float32")
    expected = evaluate_tasks(
        params,
        config,
        load_tokenizer(raw["models"][0]),
        find_tasks(("tiny_piqa",), TASKS),
        TaskSettings(limit=4),
    )
    accuracy = expected["tasks"]["tiny_piqa"]["metrics"]["acc_norm"]["value"]
    assert record["originals"][0]["tasks"] == {"tiny_piqa/acc_norm": accuracy}
    (cell,) = record["cells"]
    value = cell["tasks"]["tiny_piqa/acc_norm"]
    assert f"| REAP | {100 * value:.1f} |" in paths["tables"].read_text()
    (row,) = list(csv.DictReader(paths["csv"].open()))[1:]
    assert float(row["tiny_piqa/acc_norm"]) == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0.5}, "unknown configuration field ratio"),
        ({"methods": {}}, "methods must be given"),
        ({"methods": {"x": {"method": "mon"}}}, "method must be one of"),
        ({"methods": {"x": {"method": "mone", "keep_ratio": 0.5}}}, "sizes come from ratios"),
        (
            {"methods": {"x": {"method": "slim", "replacement": "zero"}}},
            "needs a ranking of experts",
        ),
        ({"ratios": (1.5,)}, r"ratios must be in \(0, 1\], got 1.5"),
        ({"seeds": (-1,)}, "seed must be an integer, 0 or more"),
        ({"source": "prse"}, "source must be among .*did you mean 'prose'"),
        ({"blocks": ({"methods": ("REAM",)},)}, r"blocks\[0\].methods must be among"),
        ({"blocks": ({"sizes": (1,)},)}, r"unknown configuration field blocks\[0\].sizes"),
        ({"calibration": {"num_sequences": 4}}, "unknown configuration field calibration.num"),
        ({"evaluation": {"file": ()}}, "unknown configuration field evaluation.file"),
        ({"focus": "REAM"}, "focus and rival must be among"),
        ({"models": ("a", "a")}, "models must differ"),
        ({"methods": {"x": {"distill": {}}}}, "must cut in at least one stage"),
        ({"methods": {"x": {"method": "mone", "distill": {}}}}, "training.files must name text"),
        ({"marks": (0.0,)}, r"marks must be in \(0, 1\], got 0"),
        ({"blocks": ({"models": ("b",)},)}, r"blocks\[0\].models must be among"),
    ],
)
def test_bad_fields_are_named(tmp_path, changes, message):
    raw = settings(tmp_path, **{"focus": "", "rival": "", "blocks": ()} | changes)
    with pytest.raises(ValueError, match=message):
        Grid.from_dict(raw)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sources": (("both", ("none.jsonl",)),), "blocks": ()}, FileNotFoundError, "'both'"),
        ({"models": ("nowhere/at/all",)}, FileNotFoundError, "no such checkpoint folder"),
        ({"ratios": (0.25,), "blocks": ()}, ValueError, "method 'MoNE' at ratio 0.25 on"),
        ({"calibration": {"seq_len": 4096}}, ValueError, "seq_len must be at most"),
    ],
)
def test_what_the_model_or_the_text_forbids_is_refused_before_any_work(
    done, tmp_path, changes, error, message
):
    raw = {**done[0], "output": str(tmp_path / "out"), **changes}
    with pytest.raises(error, match=message):
        prepare(Grid.from_dict(raw))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["compare_mone", "compare_obs", "compare_tasks"])
def test_every_variant_of_the_shipped_configurations_fits_its_models(name):
    get_config = runpy.run_path(str(REPOSITORY / f"configs/{name}.py"))["get_config"]
    for variant in ("", "olmoe", "phimoe"):
        grid = Grid.from_dict(get_config(variant).to_dict())
        assert len(grid.models) == (1 if variant else 2)
        assert min(len(block.seeds) for block in grid.blocks) == 3
        asked = {(c.method, c.ratio, c.calibration.model) for c in grid.cells()}
        for method, ratio, model in sorted(asked):
            config = read_config(REPOSITORY / model)
            (stage,) = grid.stages(method, ratio, config.num_layers)
            stage.after_cut(config)
    with pytest.raises(ValueError, match="takes one of"):
        get_config("mixtral")


def test_a_sequential_method_is_cut_layer_by_layer(tmp_path):
    save_model(tmp_path / "model", "olmoe")
    methods = {"in turn": {"method": "obs", "sequential": True}, "at once": {"method": "obs"}}
    block = {"methods": tuple(methods), "ratios": (0.5,)}
    changes = {"methods": methods, "seeds": (0,), "blocks": (block,), "focus": "", "rival": ""}
    grid = Grid.from_dict(settings(tmp_path, **changes))
    (subject,) = prepare(grid)
    run_cells(grid, [subject])
    found = {cell.method: runner.read_numbers(subject.cell_file(cell)) for cell in subject.cells}
    config, params = load_hf(tmp_path / "model", "float32")
    (calibration,) = {cell.calibration for cell in subject.cells}
    domains = subject.batches(calibration)
    cut = sequential_cut(params, config, domains, Cut("obs", width_ratio=0.5))
    reference = Reference.keeping((params, config), subject.windows, 64)
    expected = evaluate(
        cut.params, cut.config, subject.windows, reference=reference, with_speed=False
    )
    assert found["in turn"]["evaluation"] == expected.to_dict()
    assert found["in turn"]["parameters"] == found["at once"]["parameters"]
    assert found["in turn"]["evaluation"] != found["at once"]["evaluation"]


def test_figures_of_a_comparison_draw(tmp_path):
    def panel(xs, **more):
        lines = {
            name: [
                Point(x, 0.1 * (n + 1) + 0.01 * m, 0.01 if n else None) for m, x in enumerate(xs)
            ]
            for n, name in enumerate(("mone", "reap", "x_$1"))
        }
        return Panel("model_$", lines, "places", **more)

    layers = [{"layer": i, "count": [4, 0, 2], "variance": [1.0, 2.0, 0.5]} for i in (1, 3)]
    gone = {"mone": {1: {"novices": [1]}}, "reap": {3: {"removed": [0, 2]}}}
    figures = [
        plot_lines([panel([9.0, 6.0], above=True)], "more", "mone", falling=True, level=True),
        plot_ranks([panel([0], original=0.1)] * 3, "mone", dark=True),
        plot_lines([panel([3, 6]), panel([0, 1], ticks={0: "x_$", 1: "code"})], "bits", dark=True),
        plot_access(layers, gone),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in figures:
            figure.savefig(tmp_path / "figure.png", dpi=30)
    with pytest.raises(ValueError, match="at least one"):
        plot_ranks([])
    with pytest.raises(ValueError, match="at most 2 methods"):
        plot_access(layers, {name: {} for name in "abc"})


def trained_settings(folder: Path, **changes) -> dict:
    """Two cuts of equal size that are trained, and one that is not."""
    distill = {"learning_rate": 1e-2, "warmup_steps": 1, "chunk_tokens": 8, "log_every": 1}
    norm = {"method": "slim", "importance": "activation_norm"}
    methods = {
        "norm": {**norm, "distill": {}},
        "OBS": {"method": "obs", "distill": {}},
        "two stages": (
            {**norm, "expert_width": 6, "distill": {"share": 0.5}},
            {**norm, "distill": {"share": 0.5}},
        ),
        "untrained": norm,
    }
    raw = settings(folder, methods=tuple(methods.items()), focus="", rival="", ratios=(0.5,))
    text = raw["sources"][0][1]
    training = {"files": text, "seq_len": 8, "batch_size": 2, "cache_dir": str(folder / "cache")}
    more = {"training": training, "steps": 4, "distill": distill, "blocks": ()}
    return {**raw, **more, **changes}


def trained_by_hand(raw, subject, folder, *stages):
    """What the stages of seed 0 give, one function after the other."""
    config, params = load_hf(raw["models"][0], "float32")
    original, domains, start = (params, config), subject.batches(next(iter(subject.samples))), 0
    for n, (cut, distill) in enumerate(stages):
        stats = calibrate_domains(params, config, domains, Measurement(cut.losses, original))
        plan = plan_cut(cut, stats, config, params=params).plan
        config, params = apply_plan(params, config, plan, stats)
        batches = training_dataset(
            section(TrainingConfig, raw["training"]), subject.tokenizer, seed=0, start=start
        )
        params = train(params, config, batches, distill, TrainingRun(folder / str(n)), original)
        start += distill.steps
    return evaluate(params, config, subject.windows, reference=original, with_speed=False)


def test_stages_of_a_method_are_those_of_a_run(tmp_path):
    """Studies are told apart from each other; what trained is found again by a rerun."""
    save_model(tmp_path / "model", "olmoe")
    blocks = (
        {"title": "Stages", "methods": ("norm", "two stages", "untrained")},
        {"title": "Starts", "methods": ("norm", "OBS")},
    )
    raw = trained_settings(tmp_path, blocks=blocks, seeds=(0,))
    paths = compare(raw)
    cells = {row["method"]: row for row in json.loads(paths["json"].read_text())["cells"]}
    assert {name: row["training_tokens"] for name, row in cells.items()} == {
        "norm": 64, "two stages": 64, "untrained": 0, "OBS": 64,
    }  # fmt: skip
    assert [point["tokens"] for point in cells["two stages"]["curve"]] == [16, 32, 48, 64]
    assert cells["norm"]["parameters"] == cells["OBS"]["parameters"]
    assert not list((tmp_path / "out" / "cells").glob("*.training"))
    table = paths["tables"].read_text()
    assert "### Stages" in table
    assert "### Starts" in table
    assert set(paths) >= {"studies", "curves"}
    assert not set(paths) & {"sizes", "ranks", "course"}
    (subject,) = prepare(Grid.from_dict(raw))
    for name in ("norm", "two stages"):
        stages = Grid.from_dict(raw).stages(name, 0.5, 2)
        expected = trained_by_hand(
            raw, subject, tmp_path / name, *((s.cut, s.distill) for s in stages)
        )
        assert cells[name]["bits_per_byte"] == pytest.approx(expected.mean.bits_per_byte, rel=1e-5)
    written = made(raw)
    assert compare(raw)["json"].read_bytes() == paths["json"].read_bytes()
    assert made(raw) == written
    files = {subject.cell_file(cell) for cell in subject.cells}
    (other,) = prepare(Grid.from_dict({**raw, "steps": 2}))
    assert len(files & {other.cell_file(cell) for cell in other.cells}) == 1  # the untrained one


def test_courses_are_run_once_and_told(tmp_path):
    save_model(tmp_path / "model", "olmoe")
    block = {"title": "starts", "methods": ("norm", "OBS")}
    raw = trained_settings(tmp_path, marks=(0.5, 1.0), cooldown=0.5, blocks=(block,))
    paths = compare(raw)
    record = json.loads(paths["json"].read_text())
    for row in record["cells"]:
        assert [point["tokens"] for point in row["course"]] == [0, 32, 64]
        assert row["course"][-1]["kl"] == row["kl"]
    assert len(record["courses"]["starts"]["norm"]["OBS"]) == 3
    assert "| OBS: tokens for the same as norm |" in paths["tables"].read_text()
    assert paths["course"].stat().st_size > 0
    written = made(raw)
    assert compare(raw)["json"].read_bytes() == paths["json"].read_bytes()
    assert made(raw) == written


def points(*bits: float):
    return [{"tokens": 100 * n, "bits_per_byte": b} for n, b in enumerate(bits)]


@pytest.mark.parametrize(
    ("bits", "tokens"), [(4.0, 0), (3.5, 0), (3.0, 50), (2.5, 100), (2.25, 250), (1.9, None)]
)
def test_tokens_to_reach(bits, tokens):
    assert tokens_to_reach(points(3.5, 2.5, 2.5, 2.0), bits) == tokens


@given(st.lists(st.floats(1, 3), min_size=1, max_size=6))
def test_a_course_reaches_each_of_its_points_by_then(bits):
    course = points(*bits)
    for point in course:
        assert tokens_to_reach(course, point["bits_per_byte"]) <= point["tokens"] + 1e-9


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ([1000.0, 3000.0], "2,000 ± 1,414"),
        ([1000.0, None, 3000.0], "2,000 on 2 of 3 seeds, else > 9,000"),
        ([None, None], "> 9,000"),
    ],
)
def test_seeds_that_never_get_there_are_told(found, text):
    assert needed_text(found, 9000) == text


def shipped_grid(name: str, variant: str = "") -> Grid:
    get_config = runpy.run_path(str(REPOSITORY / f"configs/{name}.py"))["get_config"]
    return Grid.from_dict((get_config(variant) if variant else get_config()).to_dict())


@pytest.mark.parametrize("variant", ["", "olmoe", "phimoe", "rates"])
def test_starts_of_distillation_differ_in_nothing_else(variant):
    """Equal sizes, tokens and text."""
    grid = shipped_grid("distill_start", variant)
    assert len(grid.blocks) == (1 if variant in ("olmoe", "phimoe") else 2)
    for block in grid.blocks:
        ends = set()
        for cell in block.cells():
            model = read_config(REPOSITORY / cell.calibration.model)
            (stage,) = grid.stages(cell.method, cell.ratio, model.num_layers)
            ends.add((stage.after_cut(model), stage.distill.steps, stage.distill.loss))
            shortest = grid.marks[0] * stage.distill.steps
            assert stage.distill.warmup_steps <= (1 - grid.cooldown) * shortest, cell.method
        assert len(ends) == 1, block.title


def test_every_arm_of_the_ablations():
    """Methods of a study that train see equally many tokens, and end at equal widths."""
    grid = shipped_grid("ablations")
    assert len(grid.studies) == 6
    for block in grid.blocks:
        totals, shares = set(), set()
        for cell in block.cells():
            model = read_config(REPOSITORY / cell.calibration.model)
            for stage in grid.stages(cell.method, cell.ratio, model.num_layers):
                model = stage.after_cut(model)
            stages = grid.stages(cell.method, cell.ratio, model.num_layers)
            totals.add(sum(stage.distill.steps for stage in stages if stage.distill))
            shares.add(cell.ratio)
        assert totals <= {0, grid.steps}, block.title
        assert len(shares) == 1
        assert len(block.seeds) == 3
