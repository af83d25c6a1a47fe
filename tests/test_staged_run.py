"""Whole runs of several stages with distillation: what they leave, resume from, and refuse."""

from __future__ import annotations

import _thread
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_compress import assert_logits, finished_work, one
from test_robustness import HERE, cached_environment, weights
from tiny_run import make_run, save_model, save_text, settings

import moe_jax
from moe_jax.checkpoint import TrainingCheckpoints
from moe_jax.compress import compress
from moe_jax.metrics import read_metrics
from moe_jax.params import count_params, leaves_with_path
from moe_jax.run.config import RunConfig

KD = {"loss": "kd_full", "learning_rate": 1e-2, "log_every": 1, "checkpoint_every": 2}
STAGES = (
    {"expert_width": 6, "distill": {**KD, "steps": 5}},
    {"expert_width": 4, "kv_groups": 1, "distill": {**KD, "steps": 4}},
)


def staged(folder: Path, *stages: dict[str, Any], **changes: Any) -> RunConfig:
    return make_run(folder, *(stages or STAGES), **{"training": training(folder), **changes})


def training(folder: Path) -> dict[str, Any]:
    return {
        "files": [save_text(folder, "training", documents=40)],
        "seq_len": 16,
        "batch_size": 2,
        "cache_dir": str(folder / "tokens"),
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A Phi-MoE through two stages: folder, run, report, paths."""
    folder = tmp_path_factory.mktemp("staged")
    save_model(folder / "model", "phimoe", max_position_embeddings=64)
    run = staged(folder)
    report, paths = compress(run)
    return folder, run, report, paths


def test_the_result_has_the_sizes_and_loads_in_the_stock_class(finished):
    folder, _, report, paths = finished
    config, _ = moe_jax.load_hf(paths["checkpoint"])
    before, _ = moe_jax.load_hf(folder / "model")
    assert {config.moe(i).expert_width for i in config.moe_layers} == {4}
    assert {(layer.num_kv_heads, layer.num_heads) for layer in config.layers} == {
        (1, before.layers[0].num_heads // before.layers[0].num_kv_heads)
    }
    assert config.head_dim == before.head_dim
    assert report["after"]["parameters"]["total"] == count_params(config).total
    assert_logits(paths["checkpoint"])


def test_the_report_tells_every_stage(finished):
    _, run, report, _ = finished
    for i, stage in enumerate(report["stages"]):
        assert [record["step"] for record in stage["training"]["metrics"]] == list(
            range(1, run.stages[i].distill.steps + 1)
        )
        assert stage["training"]["tokens"] == run.stages[i].distill.steps * 2 * 16
        assert set(stage["evaluation"]) == {"cut", "trained"} if i == 0 else {"cut"}
    cut = report["stages"][1]["evaluation"]["cut"]["mean"]["kl"]
    assert 0 < report["after"]["evaluation"]["mean"]["kl"] != cut


def test_what_was_trained_is_what_is_exported(finished):
    folder, _, _, paths = finished
    config, exported = moe_jax.load_hf(paths["checkpoint"])
    from moe_jax.checkpoint import load_params

    trained = load_params(folder / "out/training/1/params", config)
    dtype = exported["embed"]["embedding"].dtype
    for (path, mine), (_, theirs) in zip(
        leaves_with_path(exported), leaves_with_path(trained), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs.astype(dtype), err_msg=str(path))


def test_finished_trainings_leave_weights_and_no_checkpoints(finished):
    folder = finished[0]
    for i in range(2):
        left = {path.name for path in (folder / f"out/training/{i}").iterdir()}
        assert left == {"params", "done.json", "metrics.jsonl"}


def test_a_rerun_does_no_work(finished):
    folder, run, report, _ = finished
    before = finished_work(folder / "out")
    again, _ = compress(run)
    assert finished_work(folder / "out") == before
    assert again["stages"] == report["stages"]
    assert again["after"] == report["after"]


def test_stages_share_one_stream_of_text(finished, tmp_path):
    """The second stage trains on the batches after the first one's."""
    from moe_jax.run.job import prepare

    job = prepare(finished[1])
    assert [job.first_batch(i) for i in range(3)] == [0, 5, 9]
    stream = iter(job.training_batches(0))
    batches = [next(stream) for _ in range(7)]
    later = iter(job.training_batches(1))
    for batch in batches[5:]:
        np.testing.assert_array_equal(next(later)["tokens"], batch["tokens"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 5e-3}, "training/0.*learning_rate: 0.01 there, 0.005 here"),
        ({"steps": 6}, "steps: 5 there, 6 here"),
    ],
)
def test_a_changed_training_is_refused_and_nothing_lost(finished, tmp_path, change, message):
    folder, run, _, _ = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    first = {**STAGES[0], "distill": {**STAGES[0]["distill"], **change}}
    changed = staged(folder, first, STAGES[1], output=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=message):
        compress(changed)
    again, _ = compress(RunConfig.from_dict({**run.to_dict(), "output": str(tmp_path / "out")}))
    assert again["stages"] == finished[2]["stages"]


def interrupted_at(file: Path) -> threading.Thread:
    """Interrupts the main thread as soon as there is such a file."""

    def watch() -> None:
        while not file.exists():
            time.sleep(0.01)
        _thread.interrupt_main()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_changed_unfinished_training_is_refused_before_work(tmp_path):
    save_model(tmp_path / "model", "phimoe", num_hidden_layers=1, max_position_embeddings=64)
    stage = {"expert_width": 6, "importance": "weight_norm", "distill": {**KD, "steps": 2000}}
    # SIGINT is ignored where the tests were started from a background job.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread = interrupted_at(tmp_path / "out/training/0/checkpoints/2")
        with pytest.raises(KeyboardInterrupt):
            compress(staged(tmp_path, stage, evaluation={}))
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    left = (tmp_path / "out/run.json").read_text()
    changed = {**stage, "distill": {**stage["distill"], "beta2": 0.99}}
    with pytest.raises(ValueError, match=r"beta2: 0.95 there, 0.99 here"):
        compress(staged(tmp_path, changed, evaluation={}))
    assert (tmp_path / "out/run.json").read_text() == left


def test_a_run_killed_while_it_cleaned_up_goes_on(finished, tmp_path):
    """The weights are there; of the checkpoints, half are deleted."""
    folder, run, report, _ = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    half = tmp_path / "out/training/1/checkpoints/4/state"
    half.mkdir(parents=True)
    again, _ = compress(RunConfig.from_dict({**run.to_dict(), "output": str(tmp_path / "out")}))
    assert again["stages"] == report["stages"]
    assert not half.parents[1].exists()


def test_a_changed_calibration_of_a_finished_training_is_refused_before_work(finished, tmp_path):
    folder, _, _, _ = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    before = (tmp_path / "out/run.json").stat().st_mtime_ns
    narrower = ({**STAGES[0], "importance": "fisher"}, STAGES[1])
    with pytest.raises(ValueError, match=r"cuts: .*there, .*fisher.* here"):
        compress(staged(folder, *narrower, output=str(tmp_path / "out")))
    assert (tmp_path / "out/run.json").stat().st_mtime_ns == before


def test_another_tokenizer_of_the_teacher_is_refused(finished, tmp_path):
    folder, run, _, _ = finished
    teacher = tmp_path / "teacher"
    shutil.copytree(folder / "model", teacher)
    file = teacher / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["the"], vocabulary["a"] = vocabulary["a"], vocabulary["the"]
    file.write_text(json.dumps(content))
    raw = {**run.to_dict(), "teacher": str(teacher), "output": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="must share a tokenizer"):
        compress(RunConfig.from_dict(raw))
    assert not (tmp_path / "out").exists()


def test_a_result_goes_on_with_its_original_as_the_teacher(finished, tmp_path):
    """What is compared with stays the original, not the model that the run starts from."""
    folder, _, report, paths = finished
    again = {"distill": {**KD, "steps": 2}}
    raw = staged(folder, again, output=str(tmp_path / "out"), model=str(paths["checkpoint"]))
    run = RunConfig.from_dict({**raw.to_dict(), "teacher": str(folder / "model")})
    more, _ = compress(run)
    before = [r["before"]["evaluation"]["mean"]["nll"] for r in (report, more)]
    assert before[1] == pytest.approx(before[0], rel=1e-6)
    kl = [r["after"]["evaluation"]["mean"]["kl"] for r in (report, more)]
    assert kl[1] < 1.5 * kl[0]
    assert more["stages"][0]["method"] == "distill"


def test_the_teacher_from_a_cache(finished, tmp_path):
    """The same weights as with the live teacher's top-k, up to rounding of its softmax."""
    from moe_jax.cache_teacher import CacheTeacherConfig, cache_teacher

    folder = finished[0]
    stage = {"expert_width": 6, "importance": "weight_norm", "distill": {**KD, "steps": 3}}
    stage["distill"] |= {"loss": "kd_topk", "top_k": 4}
    cache_teacher(
        CacheTeacherConfig.from_dict(
            {
                "model": str(folder / "model"),
                "output": str(tmp_path / "cache"),
                "steps": 3,
                "top_k": 4,
                "dtype": "float32",
                "log_prob_dtype": "float32",
                "training": training(folder),
            }
        )
    )
    trained = {}
    cached = {"teacher_cache": str(tmp_path / "cache"), "files": ()}
    for name, more in (("live", {}), ("cached", cached)):
        run = staged(
            folder,
            stage,
            training={**training(folder), **more},
            output=str(tmp_path / name),
            dtype="float32",
            evaluation={},
        )
        _, paths = compress(run)
        trained[name] = moe_jax.load_hf(paths["checkpoint"], dtype="float32")[1]
    for a, b in zip(*(jax.tree.leaves(tree) for tree in trained.values()), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-2 * np.abs(b).max() + 1e-6)
    longer = {**stage, "distill": {**stage["distill"], "steps": 4}}
    with pytest.raises(ValueError, match="must hold 4 batches"):
        compress(
            staged(
                folder,
                longer,
                training={**training(folder), "teacher_cache": str(tmp_path / "cache")},
                output=str(tmp_path / "longer"),
            )
        )


def test_merging_then_slimming(tmp_path):
    """And then distilling from the original, which has more experts."""
    save_model(tmp_path / "model", "phimoe", num_hidden_layers=1, max_position_embeddings=64)
    stages = (
        {"method": "m_smoe", "keep_experts": 3},
        {"expert_width": 4, "importance": "activation_norm", "distill": {**KD, "steps": 2}},
    )
    run = staged(tmp_path, *stages)
    report, paths = compress(run)
    config, _ = moe_jax.load_hf(paths["checkpoint"])
    assert (config.moe(0).num_experts, config.moe(0).expert_width) == (3, 4)
    assert_logits(paths["checkpoint"])
    first, second = report["stages"]
    assert first["kept"] == "3 of 4 experts per layer"
    ((group,),) = (layer["merged"] for layer in first["layers"])
    assert len(group) == 2
    assert (
        first["settings"] | {"merge_similarity": "router", "merge_align": True}
        == (first["settings"])
    )
    assert "merged" not in second["layers"][0]
    page = paths["report.html"].read_text()
    assert "<th>merged</th>" in page
    assert "m_smoe" in paths["model card"].read_text()
    before = finished_work(tmp_path / "out")
    assert compress(run)[0]["stages"] == report["stages"]
    assert finished_work(tmp_path / "out") == before


def test_dropping_layers_then_merging_by_weights(tmp_path):
    """The second stage numbers the layers that are left."""
    layers = {"num_hidden_layers": 4, "mlp_only_layers": [1]}
    save_model(tmp_path / "model", "qwen3_moe", **layers)
    run = make_run(
        tmp_path,
        {"method": "angular", "drop_layers": 2},
        {"method": "hc_smoe", "keep_experts": 2, "merge_similarity": "weights"},
    )
    report, paths = compress(run)
    config, params = moe_jax.load_hf(paths["checkpoint"])
    first, second = report["stages"]
    dropped = first["dropped_layers"]
    assert len(dropped) == 2
    assert first["kept"].startswith("2 of 4 layers (without ")
    assert [layer["layer"] for layer in first["layers"]] == [0, 2, 3]
    assert config.num_layers == 2
    assert [layer["layer"] for layer in second["layers"]] == list(config.moe_layers)
    assert [config.moe(i).num_experts for i in config.moe_layers] == [2] * len(config.moe_layers)
    by_layer = {layer["layer"]: layer for layer in first["layers"]}
    for i in {0, 2, 3}:
        assert by_layer[i]["removed"] == (list(range(4)) if i in dropped else [])
    expected_config, expected = moe_jax.load_hf(tmp_path / "model")
    for n in range(2):
        text = one(tmp_path / "out/plans", f"{n}-*.json").read_text()
        expected_config, expected = moe_jax.apply_plan(
            expected, expected_config, moe_jax.Plan.from_json(text)
        )
    assert expected_config == config
    for (path, a), (_, b) in zip(leaves_with_path(params), leaves_with_path(expected), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path))
    assert_logits(paths["checkpoint"])
    assert "2 of 4 layers" in paths["model card"].read_text()


@pytest.mark.slow
def test_runs_killed_at_any_moment_end_with_the_same_bits(tmp_path):
    """In calibration, in each stage's training, during checkpoints and exports."""
    save_model(tmp_path / "model", "phimoe", num_hidden_layers=1, max_position_embeddings=64)
    distill = {**KD, "steps": 10, "checkpoint_every": 1, "log_every": 2}
    stages = (
        {"expert_width": 6, "distill": distill},
        {"expert_width": 4, "distill": distill},
    )
    raw = settings(tmp_path, *stages, training=training(tmp_path), evaluation={})
    (tmp_path / "run.json").write_text(json.dumps(raw))
    (tmp_path / "whole.json").write_text(json.dumps(raw | {"output": str(tmp_path / "whole")}))

    def run(name: str, ends: int, *patterns: str) -> list[int]:
        command = [sys.executable, str(HERE / "interrupted_run.py"), str(tmp_path / name)]
        done = subprocess.run(
            [*command, str(ends), "1", *patterns],
            capture_output=True,
            text=True,
            env=cached_environment(tmp_path),
            check=False,
        )
        print(done.stderr)  # shown if the test fails
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    assert run("whole.json", 0) == [0]  # and compiled programs are there for those to come
    moments = (
        "statistics/*partial*",
        "training/0/checkpoints/3",
        "training/0/checkpoints/*tmp*",
        "training/1/checkpoints/4",
        ".model*",
    )
    *ends, last = run("run.json", 2, *moments)
    assert last == 0
    assert ends[: len(moments) - 1] == [-signal.SIGKILL] * (len(moments) - 1)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    for i in range(2):
        numbers = [
            [
                {k: v for k, v in record.items() if k not in ("time", "tokens_per_second")}
                for record in read_metrics(tmp_path / name / f"training/{i}/metrics.jsonl")
                if record["step"] % 2 == 0
            ]
            for name in ("out", "whole")
        ]
        assert numbers[0] == numbers[1]


def test_a_full_disk_during_a_checkpoint_keeps_the_one_before(tmp_path):
    """Files may not pass a size that a small state fits in and a large one does not."""
    code = (
        "import resource, sys; import numpy as np; "
        "from moe_jax.checkpoint import TrainingCheckpoints\n"
        "with TrainingCheckpoints(sys.argv[1]) as checkpoints:\n"
        "    checkpoints.save(1, {'x': np.arange(8.0)}, {'row': 1})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16,) * 2)\n"
        "with TrainingCheckpoints(sys.argv[1]) as checkpoints:\n"
        "    large = np.random.default_rng(0).normal(size=1 << 18)\n"
        "    checkpoints.save(2, {'x': large}, {'row': 2})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "checkpoints")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        check=False,
    )
    assert done.returncode == 1
    assert "OSError: cannot write a checkpoint in" in done.stderr, done.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    with TrainingCheckpoints(tmp_path / "checkpoints") as checkpoints:
        state, position = checkpoints.restore({"x": np.zeros(8)})
    assert position == {"row": 1}
    np.testing.assert_array_equal(state["x"], np.arange(8.0))


def test_sigterm_ends_the_command_with_its_own_status(tmp_path):
    """And the run that is started again ends like one that was never stopped."""
    save_model(tmp_path / "model", "phimoe", num_hidden_layers=1, max_position_embeddings=64)
    stage = {
        "expert_width": 6,
        "importance": "weight_norm",
        "distill": {**KD, "steps": 2000, "checkpoint_every": 1000},
    }
    raw = settings(tmp_path, stage, training=training(tmp_path), evaluation={})
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({raw!r})\n"
    )
    log = open(tmp_path / "log", "wb")  # noqa: SIM115  lives as long as the process
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_jax.compress", f"--config={tmp_path / 'config.py'}"],
        stderr=log,
        env=cached_environment(tmp_path),
    )
    metrics = tmp_path / "out/training/0/metrics.jsonl"
    while not (metrics.exists() and len(read_metrics(metrics)) > 3):
        assert process.poll() is None, (tmp_path / "log").read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143, (tmp_path / "log").read_text()
    text = (tmp_path / "log").read_text()
    assert "stopped after step" in text
    assert "Traceback" not in text
    step = one(tmp_path / "out/training/0/checkpoints", "[0-9]*")
    assert 3 < int(step.name) < 2000
