"""``python -m moe_jax.plan``: statistics in, table and plan file out; the file edited by hand."""

from __future__ import annotations

import dataclasses
import importlib
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from models import EXPERT_WIDTH, EXPERTS, tiny_config
from tiny_hf import VOCAB, save_tiny

from moe_jax.calibrate import calibrate
from moe_jax.config import ModelConfig
from moe_jax.hf import load_hf
from moe_jax.params import count_params
from moe_jax.plan import Cut, LayerPlan, Merge, Plan, make_plan, planned_config
from moe_jax.plan.__main__ import PlanRequest, main, plan_from_statistics, readable
from moe_jax.plan.score_file import SavedScores
from moe_jax.plan.table import plan_table
from moe_jax.prune import apply_plan
from moe_jax.scoring import EXPERT_CRITERIA, GROUP_CRITERIA, NEEDED_LOSS, NEURON_CRITERIA, score
from moe_jax.statistics import Stats

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """``model/`` (an OLMoE), ``statistics.npz``, and ``config_only/`` without any weight."""
    folder = tmp_path_factory.mktemp("plan")
    save_tiny(folder / "model", "olmoe")
    config, params = load_hf(folder / "model", "float32")
    rng = np.random.default_rng(0)
    batches = [
        {
            "tokens": rng.integers(0, VOCAB, (4, 12)).astype(np.int32),
            "mask": np.ones((4, 12), bool),
        }
        for _ in range(2)
    ]
    stats = calibrate(params, config, batches, importance=("lm",))
    stats.save(folder / "statistics")
    (folder / "config_only").mkdir()
    shutil.copy(folder / "model" / "config.json", folder / "config_only")
    return folder


@pytest.fixture
def plan(folder, monkeypatch, capsys):
    """Runs the command with these fields; what it printed."""

    def run(**fields) -> str:
        defaults = {
            "model": str(folder / "config_only"),
            "statistics": str(folder / "statistics"),
        }
        main(ConfigDict({**defaults, **fields}), ())
        return capsys.readouterr().out

    return run


def read(folder: Path) -> tuple[ModelConfig, Stats]:
    return load_hf(folder / "model", "float32")[0], Stats.load(folder / "statistics")


def test_the_plan_is_that_of_the_scores_and_reads_no_weight(folder, plan, tmp_path):
    """The folder that the command reads holds config.json alone."""
    printed = plan(keep_experts=3, method="reap", output=str(tmp_path / "p.json"))
    config, stats = read(folder)
    expected = make_plan(score(stats, "reap"), config, keep_experts=3, method="reap")
    assert Plan.from_json((tmp_path / "p.json").read_text()) == expected
    assert plan_table(config, expected, "float32") in printed
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.json"]


def test_a_plan_edited_by_hand_is_checked_printed_and_applied(folder, plan, tmp_path):
    file = tmp_path / "p.json"
    plan(keep_experts=3, output=str(file))
    text = file.read_text()
    (novice,) = json.loads(text)["layers"]["0"]["novices"]
    line = f'"novices": [{novice}]'
    assert line in text  # ids are on the line of their field
    others = [e for e in range(4) if e != novice][:2]
    file.write_text(text.replace(line, f'"novices": {others}', 1))
    printed = plan(plan=str(file))
    rows = [row.split() for row in printed.splitlines() if row[:1].isdigit()]
    assert [row[1:7] for row in rows] == [
        ["4", "->", "2", "0", "->", "2"],
        ["4", "->", "3", "0", "->", "1"],
    ]
    config, params = load_hf(folder / "model", "float32")
    edited = Plan.from_json(file.read_text())
    small, _ = apply_plan(params, config, edited, Stats.load(folder / "statistics"))
    assert small == planned_config(config, edited)
    assert small.moe(0).novice_ids == tuple(others)
    assert f"{count_params(small).total:,}" in printed
    file.write_text(text.replace(line, '"novices": [0, 1, 2, 3]', 1))
    with pytest.raises(ValueError, match="plan layer 0: no expert with neurons would be left"):
        plan(plan=str(file))


def test_a_budget_in_bytes_is_of_the_dtype_of_the_checkpoint_unless_told(folder, plan, tmp_path):
    config, _ = read(folder)
    limit = 4 * count_params(config).total - 1  # config.json says float32
    sizes = []
    for dtype in ("", "float32", "bfloat16"):
        file = tmp_path / f"{dtype}.json"
        plan(total_bytes=limit, dtype=dtype, output=str(file))
        layers = Plan.from_json(file.read_text()).layers.values()
        sizes.append([len(layer.novices) for layer in layers])
    assert sizes == [[1, 1], [1, 1], [0, 0]]


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_scores_are_saved_as_they_rank(folder, plan, tmp_path, suffix):
    file = tmp_path / f"scores{suffix}"
    plan(expert_width=4, method="activation_norm", scores=str(file))
    _, stats = read(folder)
    saved = SavedScores.load(file)
    expected = score(stats, "activation_norm")
    assert saved.experts.keys() == expected.keys()
    assert all(np.array_equal(saved.experts[i], expected[i]) for i in expected)
    assert saved.about["method"] == "activation_norm"
    plan(expert_width=4, method="activation_norm", scores=str(file))  # written again
    file.write_text("{}")
    with pytest.raises(FileExistsError, match="taken by something else"):
        plan(expert_width=4, method="activation_norm", scores=str(file))


@pytest.mark.parametrize("method", [*EXPERT_CRITERIA, *NEURON_CRITERIA])
def test_every_criterion_plans(folder, method):
    config, stats = read(folder)
    limit = count_params(config).total - 500
    request = PlanRequest.from_dict(
        {"model": "m", "statistics": "s", "method": method, "total_params": limit}
    )
    loss = NEEDED_LOSS.get(method, "lm")
    if loss != "lm":  # these statistics hold no other gradient
        with pytest.raises(ValueError, match=loss):
            plan_from_statistics(request, config, stats, "float32")
        return
    plan, scores, _ = plan_from_statistics(request, config, stats, "float32")
    assert count_params(planned_config(config, plan)).total <= limit
    assert plan.method == scores.about["method"] == method
    assert {np.ndim(values) for values in scores.experts.values()} == {
        1 if method in EXPERT_CRITERIA else 2
    }


def test_options_reach_the_criterion(folder):
    config, stats = read(folder)
    fields = {"model": "m", "statistics": "s", "keep_experts": 3}
    found = []
    for frequency in ("", "mean_weight"):
        request = PlanRequest.from_dict({**fields, "options": {"frequency": frequency}})
        found.append(plan_from_statistics(request, config, stats, "float32")[1].experts[0])
    assert np.array_equal(found[0], score(stats, "mone")[0])
    assert np.array_equal(found[1], score(stats, "mone", frequency="mean_weight")[0])


def test_merging_and_dropping_layers_need_no_weights(folder, plan):
    merged = plan(keep_experts=3, method="hc_smoe")
    assert merged.splitlines()[3].split()[4:6] == ["0", "0"]
    assert merged.splitlines()[3].split()[6] == "1"
    assert "dropped" in plan(drop_layers=1)


def test_what_engines_refuse_is_said_beside_the_plan(plan):
    printed = plan(keep_experts=3, replacement="delete", serve={"tensor_parallel": 2})
    assert "warning: Expert width 8 leaves 4 neurons on each of 2 devices" in printed
    assert "set align_experts = 16." in printed


def test_groups_are_ranked_by_their_own_criterion(tmp_path):
    config = tiny_config("phimoe")
    rng = np.random.default_rng(0)
    expert = {
        "count": np.ones(EXPERTS, np.int64),
        "output_mean": np.ones((EXPERTS, config.width)),
        "neuron_mean": np.ones((EXPERTS, EXPERT_WIDTH)),
        "weight_norm": rng.random((EXPERTS, EXPERT_WIDTH)),
    }
    attention = {i: {"weight_norm": rng.permutation(2).astype(float)} for i in range(2)}
    stats = Stats({0: expert, 1: expert}, 1, 1, 1, attention=attention)
    fields = {"model": "m", "statistics": "s", "kv_groups": 1, "method": "weight_norm"}
    for sizes in ({}, {"width_ratio": 0.5}):
        request = PlanRequest.from_dict({**fields, **sizes})
        plan, scores, _ = plan_from_statistics(request, config, stats, "float32")
        for i, layer in plan.layers.items():
            assert layer.kv_groups == (int(attention[i]["weight_norm"].argmax()),)
            assert len(layer.neurons) == (EXPERTS if sizes else 0)
        assert scores.groups[0].shape == (2,)
    assert "weight_norm" in GROUP_CRITERIA


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": ""}, "model must be given"),
        ({"statistics": ""}, "statistics or plan must be given"),
        ({}, "exactly one of .*got none"),
        ({"keep_ratio": 0.5, "total_params": 9}, "exactly one of .*got .*keep_ratio.*total_params"),
        ({"keep_ratoi": 0.5}, "unknown configuration field keep_ratoi .did you mean 'keep_ratio'"),
        ({"keep_ratio": "half"}, "keep_ratio must be float or None, got 'half'"),
        ({"keep_ratio": 0.5, "method": "maen"}, "method must be one of"),
        ({"keep_ratio": 0.5, "replacement": "nothing"}, "replacement must be one of"),
        (
            {"keep_ratio": 0.5, "method": "ream", "replacement": "zero"},
            "not merged anyway",
        ),
        (
            {"method": "mone", "expert_width": 4},
            "'mone', which ranks experts.*got ..exp",
        ),
        (
            {"keep_ratio": 0.5, "method": "lm"},
            "'lm', which ranks neurons.*got ..keep",
        ),
        ({"kv_groups": 1, "group_importance": "mone"}, "group_importance must be one of"),
        ({"drop_layers": 1, "kv_groups": 1}, "kv_groups = 1 needs a ranking of experts or neurons"),
        ({"drop_layers": 1, "scope": "global"}, "scope = 'global' needs a ranking of experts"),
        ({"drop_layers": 1, "method": "reap"}, "exactly one of .*method 'reap'.*got ..drop_layers"),
        ({"keep_ratio": 0.5, "active_share": 0.5}, "active_share = 0.5 needs own_widths"),
        ({"keep_ratio": 0.5, "group_importance": "kd"}, "group_importance must be|needs kv_groups"),
        (
            {"kv_groups": 1, "options": {"frequency": "mean_weight"}},
            "needs experts or neurons",
        ),
        (
            {"width_ratio": 0.5, "method": "lm", "scope": "global"},
            "needs a ranking of experts",
        ),
        (
            {"keep_ratio": 0.5, "method": "hc_smoe", "scope": "group", "num_groups": 2},
            "clusters decide by similarity",
        ),
        ({"keep_ratio": 0.5, "plan": "p.json"}, "keep_ratio does not go with plan"),
        ({"keep_ratio": 0.5, "dtype": "int8"}, "dtype must be one of .*got 'int8'"),
        ({"keep_ratio": 0.5, "scores": "scores.csv"}, "ends in one of"),
        ({"keep_ratio": 0.5, "options": 3}, "options must be a dict"),
        ({"keep_ratio": 0.5, "options": {"share": 2}}, r"field options\.share; known: frequency"),
    ],
    ids=str,
)
def test_wrong_fields_are_named(plan, fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan(**fields, output=str(tmp_path / "p.json"))
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_used_are_named(folder, plan, tmp_path):
    with pytest.raises(FileNotFoundError, match="no_such"):
        plan(keep_ratio=0.5, statistics=str(tmp_path / "no_such"))
    with pytest.raises(FileNotFoundError, match="no such plan file"):
        plan(plan=str(tmp_path / "no_such.json"))
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        plan(keep_ratio=0.5, model=str(tmp_path / "no_such"))
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(FileExistsError, match="taken by something else"):
        plan(keep_ratio=0.5, output=str(notes))
    assert notes.read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 8}, r"count of layer 0 must be \[8\], got \[4\]"),
        ({"intermediate_size": 12}, r"neuron_mean of layer 0 must be \[4, 12\], got \[4, 8\]"),
        ({"hidden_size": 32}, r"output_mean of layer 0 must be \[4, 32\], got \[4, 16\]"),
        ({"num_hidden_layers": 3}, r"layers must be \[0, 1, 2\], got \[0, 1\]"),
        ({"num_key_value_heads": 4}, r"weight_norm of layer 0 must be \[4\], got \[2\]"),
    ],
    ids=str,
)
def test_statistics_of_another_model_are_refused(folder, plan, tmp_path, changes, message):
    hf = json.loads((folder / "config_only" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**hf, **changes}))
    for model in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ValueError, match=f"statistics are of another model: {message}"):
            plan(keep_ratio=0.75, model=str(model))


def numbers(cell: str) -> list[int]:
    """``1,234 -> 567`` or ``1,234``, before and after."""
    parts = [int(part.replace(",", "")) for part in cell.split(" -> ")]
    return [parts[0], parts[-1]]


@pytest.mark.parametrize(
    ("layers", "dropped"),
    [
        ({}, ()),
        ({0: LayerPlan(novices=(1, 2), kv_groups=(0,)), 1: LayerPlan(kv_groups=(1,))}, ()),
        ({0: LayerPlan(deleted=(1,), merges=(Merge(0, (3, 4), (1.0, 2.0, 1.0)),))}, (1,)),
        ({2: LayerPlan(neurons=dict.fromkeys(range(EXPERTS), (1, 3)), padded_width=4)}, (0,)),
    ],
    ids=["nothing", "novices and groups", "deleted, merged, dropped", "padded"],
)
def test_rows_of_the_table_add_up_to_the_model(layers, dropped):
    config = tiny_config("qwen3_moe")
    plan = Plan(layers, dropped_layers=dropped)
    small = planned_config(config, plan)
    header, *rows = plan_table(config, plan, "float16").splitlines()
    assert len(rows) == config.num_layers + 2
    # Columns end where their names end.
    ends = [header.index(name) + len(name) for name in ("parameters", "active", "bytes, float16")]
    starts = [header.index("kv groups") + len("kv groups"), *ends]
    table = np.array(
        [[numbers(row[a:b].strip()) for a, b in zip(starts, ends, strict=False)] for row in rows]
    )
    assert np.array_equal(table[:-1].sum(0), table[-1])
    counts = [count_params(c) for c in (config, small)]
    assert table[-1, 0].tolist() == [c.total for c in counts]
    assert table[-1, 1].tolist() == [c.active for c in counts]
    assert np.array_equal(table[:, 2], 2 * table[:, 0])
    for i in dropped:
        assert table[i, :, 1].tolist() == [0, 0, 0]


def test_the_table_tells_what_became_of_experts():
    config = tiny_config("phimoe").replace_moe(1, novice_ids=(5,))
    padded = {e: (0, 1) if e else (0, 1, 2) for e in range(EXPERTS)}
    plan = Plan(
        {
            0: LayerPlan(
                deleted=(1,), novices=(2,), merges=(Merge(0, (3, 4), (1.0, 1.0, 1.0)),),
                kv_groups=(1,),
            ),
            1: LayerPlan(neurons=padded, padded_width=4),
        }
    )  # fmt: skip
    header, first, second, *_ = plan_table(config, plan).splitlines()
    assert header.split()[:8] == [
        "layer", "experts", "novices", "deleted", "merged", "width", "kv", "groups",
    ]  # fmt: skip
    assert " ".join(first.split()).startswith("0 6 -> 2 0 -> 1 1 2 8 2 -> 1 ")
    assert " ".join(second.split()).startswith("1 5 1 0 0 8 -> 4 (2-3) 2 ")


def test_a_printed_plan_is_the_plan():
    plan = Plan(
        {
            0: LayerPlan(novices=(1, 22), neurons={0: (1, 2)}, kv_groups=()),
            1: LayerPlan(merges=(Merge(0, (3,), (0.25, 1e-12)),)),
        },
        "by [\n1, 2] hand",
        {"note": "[ 1,\n 2 ]", "shares": [0.5, -1.0], "none": []},
        (2, 3),
    )
    assert Plan.from_json(readable(plan)) == plan
    assert '"novices": [1, 22]' in readable(plan)


def test_the_help_and_the_shipped_configuration_name_every_field():
    text = importlib.import_module("moe_jax.plan.__main__").__doc__
    fields = {f.name for kind in (PlanRequest, Cut) for f in dataclasses.fields(kind)}
    assert all(f"  {field}\n" in text for field in fields - {"cut", "serve"})
    assert "  serve.tensor_parallel\n" in text
    config = runpy.run_path(str(REPOSITORY / "configs" / "plan.py"))["get_config"]().to_dict()
    request = PlanRequest.from_dict({**config, "keep_ratio": 0.5})
    assert request == PlanRequest(**config, cut=Cut(keep_ratio=0.5))


def test_the_command_line(folder, tmp_path):
    command = [
        sys.executable, "-m", "moe_jax.plan", f"--config={REPOSITORY}/configs/plan.py",
        f"--config.model={folder}/config_only", f"--config.statistics={folder}/statistics",
        f"--config.output={tmp_path}/p.json",
    ]  # fmt: skip
    done = subprocess.run(
        [*command, "--config.total_params=6_000", "--config.scope=global"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config, _ = read(folder)
    plan = Plan.from_json((tmp_path / "p.json").read_text())
    assert count_params(planned_config(config, plan)).total <= 6_000 < count_params(config).total
    failed = subprocess.run(
        [*command, "--config.total_params=10"], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: total_params must be at least")
    assert failed.stdout == ""
