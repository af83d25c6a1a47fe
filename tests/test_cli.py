"""The command lines as a user meets them: help, wrong flags, and a calibration in two goes."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags
from tiny_run import save_model, settings

from moe_jax import cli
from moe_jax.calibrate import domains as calibration
from moe_jax.compress import compress
from moe_jax.plan import Cut
from moe_jax.run.config import RunConfig, StageConfig
from moe_jax.settings import CalibrationConfig, EvaluationConfig, nearest
from moe_jax.statistics import Stats

CONFIGS = Path(__file__).parents[1] / "configs"
COMMANDS = (
    "cache_teacher",
    "calibrate.__main__",
    "compare.__main__",
    "compress",
    "convert",
    "evaluate.__main__",
    "inspect",
    "plan.__main__",
)
calibrate_main = importlib.import_module("moe_jax.calibrate.__main__").main


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_command_and_every_field(name):
    text = importlib.import_module(f"moe_jax.{name}").__doc__
    assert f"python -m moe_jax.{name.removesuffix('.__main__')} " in text
    file = CONFIGS / f"{name.removesuffix('.__main__')}.py"
    if file.exists():
        config = {}
        exec(compile(file.read_text(), file, "exec"), config)
        for field in config["get_config"]():
            assert field in text


def test_help_of_compress_names_the_fields_of_a_run():
    text = importlib.import_module("moe_jax.compress").__doc__
    for kind in (RunConfig, StageConfig, Cut, CalibrationConfig, EvaluationConfig):
        for field in kind.__dataclass_fields__:
            assert field in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--config=quickstart.py", "--config.sede=1"], "sede (did you mean 'seed'?)"),
        (["--config=quickstart.py", "--config.calibration.seqlen=1"], "(did you mean 'seq_len'?)"),
        (["--config=quickstart.py:llama"], "takes one of ['olmoe', 'phimoe'], got 'llama'"),
        (["--config=quickstart.py", "--config.seed=one"], "--config.seed=one"),
        (["--confg=quickstart.py"], "Unknown command line flag 'confg'"),
    ],
    ids=str,
)
def test_wrong_flags_take_one_line(monkeypatch, arguments, line):
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    config_flags.DEFINE_config_file("config", None, "A file.", flags.FLAGS)
    given = [a.replace("--config=", f"--config={CONFIGS}/") for a in arguments]
    monkeypatch.setattr(sys, "argv", ["program", *given])
    with pytest.raises(SystemExit) as raised:
        cli._parse(sys.argv)
    message = str(raised.value.code)
    assert message.startswith("error: ")
    assert line in message
    assert "\n" not in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("quickstart.py", "--config.model=/no/model"), "no such checkpoint folder: /no/model"),
        (("quikstart.py",), "cannot read the configuration: [Errno 2] No such file or directory"),
    ],
    ids=str,
)
def test_a_command_that_fails_prints_one_line(arguments, line):
    command = [sys.executable, "-m", "moe_jax.compress", f"--config={CONFIGS}/{arguments[0]}"]
    command += arguments[1:]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {line}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_calibration_of_the_same_text_is_not_repeated(tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "model", num_hidden_layers=1)
    run = settings(tmp_path)
    config = ConfigDict(
        {
            "model": run["model"],
            "output": str(tmp_path / "statistics" / "v1.0"),
            "calibration": run["calibration"],
        }
    )
    calibrate_main(config, ())
    assert "8 sequences" in capsys.readouterr().out
    names = sorted(file.name for file in (tmp_path / "statistics").iterdir())
    assert names == ["v1.0.json", "v1.0.npz"]
    assert set(Stats.load(tmp_path / "statistics/v1.0").facts["domains"]) == {"prose", "code"}

    class Again(Exception):
        pass

    def measured(*_, **__):
        raise Again

    monkeypatch.setattr(calibration, "measure_text", measured)
    calibrate_main(config, ())
    assert "8 sequences" in capsys.readouterr().out
    with pytest.raises(Again):
        calibrate_main(ConfigDict({**config.to_dict(), "seed": 1}), ())
    (tmp_path / "statistics/v1.0.npz").write_text("something else")
    with pytest.raises(FileExistsError, match=r"v1\.0 is taken"):
        calibrate_main(config, ())


def test_a_checkpoint_with_novices_is_calibrated(tmp_path, capsys):
    save_model(tmp_path / "model", num_hidden_layers=1)
    run = settings(tmp_path, {"method": "mone", "keep_experts": 3}, evaluation={})
    _, paths = compress(RunConfig.from_dict(run))
    fields = {"model": str(paths["checkpoint"]), "calibration": run["calibration"]}
    calibrate_main(ConfigDict({**fields, "output": str(tmp_path / "statistics")}), ())
    assert "8 sequences" in capsys.readouterr().out
    ranked = {"method": "mone", "keep_ratio": 0.5, "output": str(tmp_path / "ranked")}
    calibrate_main(ConfigDict(fields | ranked), ())
    assert "kept set the same" in capsys.readouterr().out


def test_nearest_names_are_near():
    assert nearest("kep_ratio", ("keep_ratio", "scope")) == " (did you mean 'keep_ratio'?)"
    assert nearest("zzz", ("keep_ratio", "scope")) == ""
