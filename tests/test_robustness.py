"""Interruptions, full disks and damaged files: the old state, or one to go on from."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_run import make_run, save_model, settings

from moe_jax import cli
from moe_jax.calibrate import domains as calibration
from moe_jax.compress import compress
from moe_jax.run.config import RunConfig
from moe_jax.run.store import check_output
from moe_jax.statistics import Stats

HERE = Path(__file__).parent
STAGE = {"method": "mone", "keep_experts": 3}
NO_TEXT = {"evaluation": {}}


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def visible(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("[!.]*"))


def cached_environment(folder: Path) -> dict[str, str]:
    """Compiled programs are kept, so that a repeated run is mostly the run itself."""
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": str(HERE.parent),
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a model, the run, and the bytes of what it made."""
    folder = tmp_path_factory.mktemp("finished")
    save_model(folder / "model", num_hidden_layers=1)
    run = make_run(folder, STAGE)
    compress(run)
    return folder, run, weights(folder / "out")


@pytest.mark.slow
def test_runs_ended_at_any_moment_go_on_and_give_the_same_bytes(tmp_path):
    save_model(tmp_path / "model", num_hidden_layers=1)
    raw = settings(tmp_path, STAGE)
    (tmp_path / "run.json").write_text(json.dumps(raw))
    (tmp_path / "whole.json").write_text(json.dumps(raw | {"output": str(tmp_path / "whole")}))

    def run(name: str, ends: int) -> list[int]:
        command = [sys.executable, str(HERE / "interrupted_run.py"), str(tmp_path / name)]
        done = subprocess.run(
            [*command, str(ends), "0"],
            capture_output=True,
            text=True,
            env=cached_environment(tmp_path),
            check=False,
        )
        print(done.stderr)  # shown if the test fails
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    assert run("whole.json", 0) == [0]  # and compiled programs are there for those to come
    *ends, last = run("run.json", 5)
    assert last == 0
    # An interrupt that Python raises inside a callback of JAX's native code ends in an abort there.
    assert set(ends) <= {0, -signal.SIGKILL, 130, -signal.SIGABRT}
    assert -signal.SIGKILL in ends
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_calibration_goes_on_after_the_last_finished_domain(finished, tmp_path, monkeypatch):
    folder, _, expected = finished
    run = make_run(folder, STAGE, output=str(tmp_path / "out"), **NO_TEXT)
    measured: list[str] = []
    original = calibration.measure_text

    def interrupted_second(*arguments, **options):
        if measured:
            raise KeyboardInterrupt
        measured.append(arguments[4])
        return original(*arguments, **options)

    monkeypatch.setattr(calibration, "measure_text", interrupted_second)
    with pytest.raises(KeyboardInterrupt):
        compress(run)
    assert measured == ["calibrate on prose"]
    assert any("partial-0-prose" in name for name in visible(tmp_path / "out"))

    def counted(*arguments, **options):
        measured.append(arguments[4])
        return original(*arguments, **options)

    monkeypatch.setattr(calibration, "measure_text", counted)
    compress(run)
    assert measured == ["calibrate on prose", "calibrate on code"]
    assert weights(tmp_path / "out") == expected
    assert not any("partial" in name for name in visible(tmp_path / "out"))


def test_a_full_disk_leaves_earlier_files_intact(finished, tmp_path):
    """Files of this process may not pass a size that statistics fit in and weights do not."""
    folder, _, expected = finished
    run = make_run(folder, STAGE, output=str(tmp_path / "out"), **NO_TEXT)
    (tmp_path / "run.json").write_text(json.dumps(run.to_dict()))
    code = (
        "import json, pathlib, resource, sys; from moe_jax import cli; "
        "from moe_jax.compress import compress; from moe_jax.run.config import RunConfig; "
        "raw = json.loads(pathlib.Path(sys.argv[1]).read_text()); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(expected) - 1},) * 2); "
        "cli.run(lambda _: compress(RunConfig.from_dict(raw)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert os.strerror(errno.EFBIG) in lines[-1]
    assert "Traceback" not in done.stderr
    left = visible(tmp_path / "out")
    assert "model" not in left
    assert any(name.endswith(".npz") and "partial" not in name for name in left)
    compress(run)
    assert weights(tmp_path / "out") == expected


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty])
def test_damaged_statistics_are_noticed(tmp_path, damage):
    layer = {"count": np.arange(3000), "routing_mass": np.ones(3000, np.float32)}
    Stats({0: layer}, 3, 1, 1, {"digest": "d"}).save(tmp_path / "a.b")
    assert Stats.load_if_same(tmp_path / "a.b", "d") is not None
    assert Stats.load_if_same(tmp_path / "a.b", "e") is None
    damage(tmp_path / "a.b.npz")
    with pytest.raises(ValueError, match=r"a\.b\.npz"):
        Stats.load(tmp_path / "a.b")
    assert Stats.load_if_same(tmp_path / "a.b", "d") is None


def test_statistics_with_nan_are_refused_with_the_name(tmp_path):
    layer = {"count": np.arange(3), "routing_mass": np.array([0, np.nan, 1], np.float32)}
    Stats({4: layer}, 3, 1, 1).save(tmp_path / "stats")
    with pytest.raises(ValueError, match="layer 4: routing_mass holds a NaN"):
        Stats.load(tmp_path / "stats")


def test_damaged_results_of_earlier_steps(finished, caplog):
    folder, run, expected = finished
    (statistics,) = (folder / "out/statistics").glob("*.npz")
    evaluation = sorted((folder / "out/evaluation").iterdir())
    before = [evaluation[0].read_bytes(), statistics.read_bytes()]
    flip(statistics)
    truncate(evaluation[0])
    (folder / "out/model/moe_jax_run.json").write_text("{")
    compress(run)
    assert "is damaged" in caplog.text
    assert "calibrating again" in caplog.text
    assert weights(folder / "out") == expected
    assert statistics.read_bytes() == before[1]
    assert json.loads(evaluation[0].read_text()).keys() == json.loads(before[0]).keys()
    # Plans may have been edited by hand, so they are never overwritten.
    (plan,) = (folder / "out/plans").iterdir()
    whole = plan.read_text()
    for broken in (whole[:-20], whole.replace('"deleted"', '"delete"'), "{}", "[]"):
        plan.write_text(broken)
        with pytest.raises(ValueError, match=f"{plan.name} cannot be used: .*delete it"):
            compress(run)
        assert plan.read_text() == broken
    plan.write_text(whole)


# What is wrong -> what the one line says. Each is refused before weights are read.
def no_tokenizer(folder: Path, raw: dict) -> None:
    (folder / "model/tokenizer.json").unlink()


def other_tokenizer(folder: Path, raw: dict) -> None:
    file = folder / "model/tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["expert"] = 300
    file.write_text(json.dumps(content))


def empty_text(folder: Path, raw: dict) -> None:
    (folder / "prose.jsonl").write_text('{"text": "  "}\n')


def no_text(folder: Path, raw: dict) -> None:
    raw["calibration"]["files"] = [str(folder / "prise.jsonl")]


def no_model(folder: Path, raw: dict) -> None:
    raw["model"] = str(folder / "modle")


def no_weights(folder: Path, raw: dict) -> None:
    (folder / "model/model.safetensors").unlink()


def truncated_weights(folder: Path, raw: dict) -> None:
    truncate(folder / "model/model.safetensors")


def foreign_output(folder: Path, raw: dict) -> None:
    (folder / "out").mkdir()
    (folder / "out/thesis.txt").write_text("mine")


def file_output(folder: Path, raw: dict) -> None:
    (folder / "out").write_text("mine")


def foreign_result(folder: Path, raw: dict) -> None:
    (folder / "out/model").mkdir(parents=True)
    (folder / "out/run.json").write_text("{}")
    (folder / "out/model/thesis.txt").write_text("mine")


def odd_mesh(folder: Path, raw: dict) -> None:
    raw["mesh"] = {"expert": 2}
    raw["stages"] = [{"method": "frequency", "keep_experts": 3}]


def two_free_axes(folder: Path, raw: dict) -> None:
    raw["mesh"] = {"data": -1, "fsdp": -1}


def missing_plan(folder: Path, raw: dict) -> None:
    raw["stages"] = [{"plan": str(folder / "plan.json")}]


def broken_plan(folder: Path, raw: dict) -> None:
    (folder / "plan.json").write_text('{"format": "moe_jax.plan", "version": 1}')
    missing_plan(folder, raw)


def unfit_plan(folder: Path, raw: dict) -> None:
    layers = {"0": {"deleted": [9]}}
    plan = {"format": "moe_jax.plan", "version": 1, "layers": layers}
    (folder / "plan.json").write_text(json.dumps(plan))
    missing_plan(folder, raw)


def novices_without_text(folder: Path, raw: dict) -> None:
    plan = {"format": "moe_jax.plan", "version": 1, "layers": {"0": {"novices": [1]}}}
    (folder / "plan.json").write_text(json.dumps(plan))
    missing_plan(folder, raw)
    raw["calibration"] = {}


def constants_without_text(folder: Path, raw: dict) -> None:
    novices_without_text(folder, raw)
    file = folder / "plan.json"
    file.write_text(file.read_text().replace('{"novices": [1]}', '{"constants": true}'))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_tokenizer, "model holds no tokenizer"),
        (other_tokenizer, "token ids must be below the model's vocab_size = 48, got 300"),
        (empty_text, "no text in .*prose"),
        (no_text, "no file matches '.*prise.jsonl'"),
        (no_model, "no such checkpoint folder: .*modle"),
        (no_weights, "no weights; model.safetensors"),
        (truncated_weights, "model.safetensors"),
        (foreign_output, "exists and is not a run's folder"),
        (file_output, "output must be a folder, got the file"),
        (foreign_result, "must be empty or an earlier export"),
        (odd_mesh, r"axis E .* must be a multiple of mesh axis 'expert', got 3 over 2 devices"),
        (missing_plan, "no such plan file: .*plan.json"),
        (broken_plan, "plan.json: .*layers"),
        (unfit_plan, r"stages\[0\]: plan layer 0: deleted must be in \[0, 4\), got \[9\]"),
        (two_free_axes, "at most one of them -1"),
        (novices_without_text, r"stages\[0\]: the plan's constants, repair or refit take text"),
        (constants_without_text, r"stages\[0\]: the plan's constants, repair or refit take text"),
    ],
)
def test_bad_input_is_refused_before_work(tmp_path, spoil: Callable[[Path, dict], None], message):
    save_model(tmp_path / "model")
    raw = settings(tmp_path, STAGE)
    spoil(tmp_path, raw)
    before = visible(tmp_path)
    with pytest.raises((OSError, ValueError), match=message):
        compress(RunConfig.from_dict(raw))
    assert visible(tmp_path) == before  # before weights are read, run.json is written


def test_nan_in_weights_is_named(tmp_path):
    save_model(tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.gate.weight"][0, 0] = np.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"NaN or infinity in model\.layers\.1\.mlp\.gate\.weight"):
        compress(make_run(tmp_path, STAGE))
    assert visible(tmp_path / "out") == ["run.json"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\nlines"), "error: two lines"),
        (OSError(28, "No space left on device", "/full"), "error: /full: No space left on device"),
        (FloatingPointError("invalid value"), "error: invalid value"),
        (MemoryError(), "error: MemoryError"),
        (ImportError("needs x"), "error: needs x"),
    ],
    ids=str,
)
def test_errors_take_one_line(monkeypatch, error, line):
    def fail(_):
        raise error

    monkeypatch.setattr(cli.app, "run", lambda start, **_: start([]))
    with pytest.raises(SystemExit) as raised:
        cli.run(fail)
    assert raised.value.code == line


def test_a_folder_with_only_a_half_written_marker_is_a_runs(tmp_path):
    """What a run that was killed while it made its folder leaves behind."""
    output = tmp_path / "out"
    output.mkdir()
    (output / ".run.json.writing-host-1").write_text("{")
    (output / ".lock").touch()
    run = RunConfig(model="model", output=str(output))
    assert check_output(run) == output
    (output / "letter.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a run's folder"):
        check_output(run)
