"""Whole runs on tiny checkpoints: what they leave, what a rerun takes from it, who can load it."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_hf import torch_logits, trees_equal
from tiny_run import make_run, save_model, settings

import moe_jax
from moe_jax.compress import compress
from moe_jax.plan import LayerPlan, Plan, planned_config
from moe_jax.report import read_report
from moe_jax.run.store import owned

MONE = {"method": "mone", "keep_experts": 3}
SLIM = {"method": "slim", "width_ratio": 0.5}
TOKENS = np.random.default_rng(0).integers(0, 15, (2, 12))
NO_TEXT = {"evaluation": {}}


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    """An OLMoE through MoNE and slimming, with evaluation: folder, run and report."""
    folder = tmp_path_factory.mktemp("two_stages")
    save_model(folder / "model", "olmoe")
    run = make_run(folder, MONE, SLIM, seed=3)
    report, paths = compress(run)
    return folder, run, report, paths


def one(folder: Path, pattern: str) -> Path:
    (file,) = folder.glob(pattern)
    return file


def by_hand(folder: Path, stages: int):
    """What the run's own plans and statistics make of its source."""
    config, params = moe_jax.load_hf(folder / "model")
    for i in range(stages):
        plan = Plan.from_json(one(folder / "out/plans", f"{i}-*.json").read_text())
        stats = moe_jax.Stats.load(one(folder / "out/statistics", f"{i}-*.npz"))
        assert planned_config(config, plan) == moe_jax.apply_plan(params, config, plan, stats)[0]
        config, params = moe_jax.apply_plan(params, config, plan, stats)
    return config, params


def our_logits(folder: Path) -> np.ndarray:
    config, params = moe_jax.load_hf(folder)
    with jax.default_matmul_precision("highest"):
        return np.asarray(moe_jax.forward(params, config, TOKENS)[0])


def assert_logits(folder: Path, **options) -> None:
    np.testing.assert_allclose(our_logits(folder), torch_logits(folder, TOKENS, **options), 0, 2e-4)


def finished_work(output: Path) -> dict[str, tuple[int, int]]:
    """When every file that steps left was written; what any run writes anew is left out."""
    anew = {"run.json", "report.json", "report.html", "README.md", ".lock"}
    return {
        str(file.relative_to(output)): (file.stat().st_ino, file.stat().st_mtime_ns)
        for file in output.rglob("*")
        if file.is_file() and file.name not in anew
    }


def test_the_result_is_what_the_plans_say(two_stages):
    folder, _, _, paths = two_stages
    config, params = moe_jax.load_hf(paths["checkpoint"])
    expected_config, expected = by_hand(folder, 2)
    assert config == expected_config
    assert trees_equal(params, expected)
    assert [len(config.moe(i).novice_ids) for i in config.moe_layers] == [1, 1]
    assert [config.moe(i).expert_width for i in config.moe_layers] == [4, 4]


def test_the_first_plan_follows_from_the_statistics(two_stages):
    folder, run, _, _ = two_stages
    config, _ = moe_jax.load_hf(folder / "model")
    stats = moe_jax.Stats.load(one(folder / "out/statistics", "0-*.npz"))
    plan = moe_jax.make_plan(
        moe_jax.score(stats, "mone", seed=run.seed), config, keep_experts=3, method="mone"
    )
    assert (
        plan.to_json()
        == Plan.from_json(one(folder / "out/plans", "0-*.json").read_text()).to_json()
    )


def test_report_page_and_card_agree(two_stages):
    folder, run, report, paths = two_stages
    assert set(paths) == {"checkpoint", "report.json", "report.html", "model card"}
    assert read_report(folder / "out") == json.loads(json.dumps(report))
    asked = run.to_dict()
    assert asked["calibration"]["mode"] == "auto"
    assert report["config"] == asked | {"calibration": asked["calibration"] | {"mode": "whole"}}
    total = report["after"]["parameters"]["total"]
    assert total < report["before"]["parameters"]["total"]
    for name in ("report.html", "model card"):
        assert f"{total:,}" in paths[name].read_text()
    assert report["after"]["evaluation"]["total"]["kl"] > 0
    assert [stage["kept"] for stage in report["stages"]] == [
        "3 of 4 experts per layer",
        "4 of 8 neurons per expert",
    ]
    for stage in report["stages"]:
        assert set(stage["layers"][0]["frequency"]) == {"prose", "code"}
    assert report["loader"]["trust_remote_code"]
    assert json.loads((folder / "out/run.json").read_text()) == report["config"]
    assert not [file for file in (folder / "out").rglob("*") if "partial" in file.name]


def test_novices_load_in_transformers(two_stages):
    assert_logits(two_stages[3]["checkpoint"], trust_remote_code=True)


def test_a_rerun_does_no_work(two_stages):
    folder, run, report, _ = two_stages
    before = finished_work(folder / "out")
    assert {name.split("/")[0] for name in before} >= {"statistics", "plans", "evaluation", "model"}
    again, _ = compress(run)
    assert finished_work(folder / "out") == before
    changing = {"seconds", "peak_memory_mib", "command", "environment"}
    assert {k: again[k] for k in again if k not in changing} == {
        k: report[k] for k in report if k not in changing
    }


def test_a_later_stage_alone_is_done_again(two_stages):
    """Both stages were calibrated before."""
    folder, run, _, _ = two_stages
    statistics = finished_work(folder / "out/statistics")
    narrower = make_run(folder, MONE, {**SLIM, "width_ratio": 0.25}, seed=3, **NO_TEXT)
    _, paths = compress(narrower)
    assert finished_work(folder / "out/statistics") == statistics
    config, _ = moe_jax.load_hf(paths["checkpoint"])
    assert config.moe(0).expert_width == 2
    compress(run)  # what the other tests look at
    assert moe_jax.load_hf(paths["checkpoint"])[0].moe(0).expert_width == 4


def test_slimming_loads_in_the_stock_class(tmp_path):
    save_model(tmp_path / "model", "phimoe", num_local_experts=3)
    slim = {**SLIM, "importance": "activation_norm"}
    report, paths = compress(make_run(tmp_path, slim, **NO_TEXT))
    config, params = moe_jax.load_hf(paths["checkpoint"])
    expected_config, expected = by_hand(tmp_path, 1)
    assert config == expected_config
    assert trees_equal(params, expected)
    assert_logits(paths["checkpoint"])
    assert not report["loader"]["trust_remote_code"]
    assert "evaluation" not in report["after"]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_deleted_experts(tmp_path, scope):
    save_model(tmp_path / "model", "qwen3_moe", num_experts=6)
    stage = {"method": "mone", "keep_ratio": 0.5, "replacement": "delete", "scope": scope}
    report, paths = compress(make_run(tmp_path, stage, **NO_TEXT))
    config, params = moe_jax.load_hf(paths["checkpoint"])
    expected_config, expected = by_hand(tmp_path, 1)
    assert config == expected_config
    assert trees_equal(params, expected)
    counts = [config.moe(i).num_experts for i in config.moe_layers]
    assert sum(counts) == 6
    uniform = len(set(counts)) == 1
    assert uniform or scope == "global"
    assert report["loader"]["trust_remote_code"] is not uniform
    assert_logits(paths["checkpoint"], trust_remote_code=not uniform)


def test_zeros_and_plans_by_hand(tmp_path):
    forbid_calibration = {"calibration": {}, **NO_TEXT}
    save_model(tmp_path / "model", "olmoe")
    neurons = dict.fromkeys((0, 1, 3), (0, 2, 5))
    plan = Plan({1: LayerPlan(novices=(2,), novice_value="zero", neurons=neurons)})
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    run = make_run(tmp_path, {"plan": str(file)}, **forbid_calibration)
    report, paths = compress(run)
    config, params = moe_jax.load_hf(paths["checkpoint"])
    source_config, source = moe_jax.load_hf(tmp_path / "model")
    expected_config, expected = moe_jax.apply_plan(source, source_config, plan)
    assert config == expected_config == planned_config(source_config, plan)
    assert trees_equal(params, expected)
    assert not np.asarray(params["layers"][1]["moe"]["novices"]["constant"]).any()
    assert report["stages"][0]["method"] == "manual"
    # Another plan in the same place is another model.
    file.write_text(Plan({0: LayerPlan(deleted=(0,))}).to_json())
    _, paths = compress(run)
    assert moe_jax.load_hf(paths["checkpoint"])[0].moe(0).num_experts == 3


def test_too_little_text_is_in_the_report(tmp_path, caplog):
    save_model(tmp_path / "model", "olmoe", num_experts=16, num_hidden_layers=1)
    few = settings(tmp_path)["calibration"] | {"num_sequences": 12, "seq_len": 2}
    stage = {"method": "frequency", "keep_ratio": 0.5}
    with caplog.at_level(logging.WARNING):
        report, _ = compress(make_run(tmp_path, stage, calibration=few, **NO_TEXT))
    warnings = " ".join(report["warnings"])
    assert "Stage 0: 8 of the 12 calibration sequences wanted were found (prose 4, code 4)" in (
        warnings
    )
    (unreached,) = (layer["unreached"] for layer in report["stages"][0]["layers"])
    assert unreached
    assert f"no calibration token reached {len(unreached)} of 16 experts" in warnings
    assert f"layer 0 expert {unreached[0]}" in warnings
    assert "no calibration token reached" in caplog.text


class Counted(logging.Handler):
    """At every step that is announced: bytes of all arrays, and how many statistics there are."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seen: dict[str, tuple[int, int]] = {}

        # What tests before this one keep in their fixtures is none of the run's.
        self.before = (0, 0)
        self.before = self.now()

    def now(self) -> tuple[int, int]:
        gc.collect()
        nbytes = sum(array.nbytes for array in jax.live_arrays())
        stats = sum(type(thing) is moe_jax.Stats for thing in gc.get_objects())
        return nbytes - self.before[0], stats - self.before[1]

    def emit(self, record: logging.LogRecord) -> None:
        step = record.getMessage().removesuffix(" ...")
        if step in ("export", "read back") or step.endswith(": calibrate"):  # counting is slow
            self.seen[step] = self.now()


def test_memory_does_not_grow_with_the_stages(tmp_path):
    """At most the original, the model and what a step makes of it are held at a time."""
    save_model(tmp_path / "model", hidden_size=64)
    _, params = moe_jax.load_hf(tmp_path / "model")
    original = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    del params
    counted, logger = Counted(), logging.getLogger("moe_jax")
    level = logger.level
    logger.addHandler(counted)
    logger.setLevel(logging.INFO)
    slim = {"importance": "activation_norm", "repair": True}
    widths = (7, 6, 5)
    try:
        compress(make_run(tmp_path, *({"expert_width": w, **slim} for w in widths), **NO_TEXT))
    finally:
        logger.removeHandler(counted)
        logger.setLevel(level)
    at = counted.seen
    slack = original // 20
    assert at["stage 0: calibrate"] == (pytest.approx(original, abs=slack), 0)
    for i in range(1, len(widths)):
        assert at[f"stage {i}: calibrate"][0] < 2 * original + slack
        assert at[f"stage {i}: calibrate"][1] == 0
    assert at["export"][0] < 2 * original + slack
    assert at["export"][1] == 0
    assert at["read back"][0] < original + slack


def test_a_folder_has_one_run_at_a_time(two_stages):
    folder, run, _, _ = two_stages
    before = finished_work(folder / "out")
    with (
        owned(run),
        pytest.raises(BlockingIOError, match=f"out is in use .*process {os.getpid()} on"),
    ):
        compress(run)
    assert finished_work(folder / "out") == before
    compress(run)


@pytest.mark.parametrize("output", ["model", "model/out", "link", ".", "linked/model"])
def test_a_run_never_writes_into_its_model(tmp_path, output):
    save_model(tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "linked").symlink_to(tmp_path)
    for role in ({}, {"model": str(tmp_path / "other"), "teacher": str(tmp_path / "model")}):
        run = make_run(tmp_path, SLIM, output=str(tmp_path / output), **role)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match="output must lie apart from what is read"):
            compress(run)
        assert sorted(tmp_path.rglob("*")) == before


def test_the_package_is_quick_to_import_and_names_its_api():
    code = (
        "import sys, moe_jax; "
        "heavy = {'torch', 'tensorflow', 'matplotlib', 'transformers'} & set(sys.modules); "
        "missing = [n for n in moe_jax.__all__ if not callable(getattr(moe_jax, n))]; "
        "import moe_jax.calibrate, moe_jax.compress; "
        "print(heavy, missing, callable(moe_jax.calibrate))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "set() [] True"
    assert set(moe_jax.__all__) >= {
        *("load_hf", "forward", "calibrate", "score", "make_plan", "apply_plan"),
        *("distill_loss", "save_hf", "ModelConfig", "Plan", "Stats"),
    }
