"""The tool that runs ablations: trainings of several lengths, tokens that an arm needs, reruns."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import runpy
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.distill import TrainingRun, TrainSettings, train
from moe_jax.hf import load_hf
from moe_jax.hf.reader import read_config
from moe_jax.run.stage import StageConfig

REPOSITORY = Path(__file__).parents[1]


def load_tool():
    spec = importlib.util.spec_from_file_location("ablate", REPOSITORY / "tools" / "ablate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ablate = load_tool()
SETTINGS = TrainSettings(steps=4, learning_rate=1e-2, warmup_steps=1, chunk_tokens=8)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tiny_run.save_model(tmp_path_factory.mktemp("model"))
    config, params = load_hf(folder, dtype="float32")
    return params, config


@pytest.fixture(scope="module")
def student(teacher):
    """Another model of the same shape."""
    params, config = teacher
    return jax.tree.map(lambda leaf: leaf * 1.1, params), config


class Text:
    """A stream of random batches, as ``train`` wants it: its iterators tell where they are."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __iter__(self):
        return Batches(self.vocab_size)


class Batches:
    def __init__(self, vocab_size: int) -> None:
        self.rng, self.vocab_size, self.seen = np.random.default_rng(0), vocab_size, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.seen += 1
        tokens = self.rng.integers(0, self.vocab_size, (2, 8), dtype=np.int32)
        return {"tokens": tokens, "segment_ids": np.ones_like(tokens)}

    def get_state(self):
        return {"seen": self.seen}


def same(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def run_course(student, teacher, marks, cooldown, settings=SETTINGS):
    text = Text(teacher[1].vocab_size)
    return dict(ablate.course(student, teacher, text, settings, marks, cooldown))


def test_a_course_that_cools_down_from_the_start_is_a_training(student, teacher, tmp_path):
    settings = dataclasses.replace(SETTINGS, warmup_steps=0)
    (trained,) = run_course(student, teacher, [4], 1.0, settings).values()
    text = Text(teacher[1].vocab_size)
    assert same(trained, train(*student, text, settings, TrainingRun(tmp_path), teacher))


def test_each_mark_is_a_training_of_its_own(student, teacher):
    """What other marks a course has does not matter."""
    both = run_course(student, teacher, [2, 4], 0.5)
    assert list(both) == [2, 4]
    for mark, trained in both.items():
        assert same(trained, run_course(student, teacher, [mark], 0.5)[mark])
    assert not same(both[2], both[4])


def test_a_course_names_the_step_that_broke(student, teacher):
    broken = jax.tree.map(lambda leaf: leaf * np.nan, student[0])
    with pytest.raises(FloatingPointError, match="step 1 "):
        run_course((broken, student[1]), teacher, [2], 0.5)


def points(*bits: float):
    return [{"tokens": 100 * n, "bits_per_byte": b} for n, b in enumerate(bits)]


@pytest.mark.parametrize(
    ("bits", "tokens"), [(4.0, 0), (3.5, 0), (3.0, 50), (2.5, 100), (2.25, 250), (1.9, None)]
)
def test_tokens_to_reach(bits, tokens):
    assert ablate.tokens_to_reach(points(3.5, 2.5, 2.5, 2.0), bits) == tokens


@given(st.lists(st.floats(1, 3), min_size=1, max_size=6))
def test_a_course_reaches_each_of_its_points_by_then(bits):
    course = points(*bits)
    for point in course:
        assert ablate.tokens_to_reach(course, point["bits_per_byte"]) <= point["tokens"] + 1e-9


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ([1000.0, 3000.0], "2,000 ± 1,414"),
        ([1000.0, None, 3000.0], "2,000 on 2 of 3 seeds, else > 9,000"),
        ([None, None], "> 9,000"),
    ],
)
def test_seeds_that_never_get_there_are_told(found, text):
    assert ablate.needed_text(found, 9000) == text


def test_fields_at_their_defaults_do_not_count():
    """So that a field that is new leaves results in place."""
    distill = {"steps": 3, "warmup_steps": 0, "loss": "lm"}
    stage = StageConfig.from_dict({"method": "obs", "expert_width": 4, "distill": distill}, "stage")

    @dataclass(frozen=True)
    class Newer(StageConfig):
        new: bool = False

    newer = Newer(**vars(stage))
    assert ablate.changed(newer) == ablate.changed(stage)
    assert ablate.changed(stage) == {"method": "obs", "expert_width": 4, "distill": distill}
    assert ablate.changed(dataclasses.replace(newer, new=True)) != ablate.changed(stage)


def tiny_settings(folder: Path) -> dict:
    model = tiny_run.save_model(folder / "model")
    common = tiny_run.settings(folder)
    cut = {"expert_width": 4, "distill": {"share": 1.0}}
    arms = (
        ("norm", {"method": "slim", "importance": "activation_norm", **cut}),
        ("OBS", {"method": "obs", **cut}),
    )
    return {
        "seeds": (0, 1),
        "steps": 4,
        "marks": (1.0,),
        "cooldown": 0.5,
        "studies": (
            ("starts", tuple((name, {"model": str(model), "stages": (s,)}) for name, s in arms)),
        ),
        "distill": {"learning_rate": 1e-2, "warmup_steps": 1, "chunk_tokens": 8},
        "calibration": common["calibration"],
        "training": {
            "files": common["calibration"]["files"],
            "seq_len": 8,
            "batch_size": 2,
            "cache_dir": str(folder / "cache"),
        },
        "evaluation": common["evaluation"] | {"max_bytes": 10_000},
    }


def test_courses_are_run_once_and_told(tmp_path, monkeypatch):
    settings = tiny_settings(tmp_path)
    results = ablate.run_all(settings, tmp_path / "out")
    for runs in results["starts"].values():
        assert [run["seed"] for run in runs] == [0, 1]
        assert [[p["tokens"] for p in run["course"]] for run in runs] == [[0, 64]] * 2
        for run in runs:
            assert run["course"][-1]["kl"] == run["evaluation"]["mean"]["kl"]
    norm, obs = results["starts"].values()
    assert norm[0]["parameters"] == obs[0]["parameters"]
    assert norm[0]["original"] == obs[0]["original"]

    summary = json.loads((tmp_path / "out" / "results.json").read_text())["starts"]["courses"]
    assert len(summary["norm"]["needed"]["OBS"]) == 2
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| OBS: tokens for the same as norm |" in table
    assert (tmp_path / "out" / "course.png").stat().st_size > 0

    monkeypatch.setattr(ablate, "Teacher", None)  # a rerun needs no model
    assert ablate.run_all(settings, tmp_path / "out") == results
    with pytest.raises(TypeError):
        ablate.run_all({**settings, "marks": (0.5,)}, tmp_path / "out")


@pytest.mark.parametrize("variant", ["", "olmoe", "phimoe", "rates"])
def test_starts_of_distillation_differ_in_nothing_else(variant):
    """Equal sizes, tokens and text."""
    path = REPOSITORY / "configs" / "distill_start.py"
    config = runpy.run_path(str(path))["get_config"](variant).to_dict()
    assert len(config["studies"]) == (1 if variant in ("olmoe", "phimoe") else 2)
    for study, arms in config["studies"]:
        ends = set()
        for arm, description in arms:
            (raw,) = description["stages"]
            stage = ablate.with_steps(raw, config, seed=0)
            model = read_config(REPOSITORY / description["model"])
            ends.add((stage.after_cut(model), stage.distill.steps, stage.distill.loss))
            shortest = config["marks"][0] * stage.distill.steps
            assert stage.distill.warmup_steps <= (1 - config["cooldown"]) * shortest, arm
        assert len(ends) == 1, study
