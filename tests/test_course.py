"""Trainings of several lengths that share their beginnings."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import tiny_run

from moe_jax.distill import TrainingRun, TrainSettings, train
from moe_jax.distill.course import course
from moe_jax.hf import load_hf
from moe_jax.run.stage import StageConfig

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
    return dict(course(student, teacher, text, settings, marks, cooldown))


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


def test_fields_at_their_defaults_do_not_count():
    """So that a field that is new leaves results in place."""
    distill = {"steps": 3, "warmup_steps": 0, "loss": "lm"}
    stage = StageConfig.from_dict({"method": "obs", "expert_width": 4, "distill": distill}, "stage")

    assert stage.given() == {"method": "obs", "expert_width": 4, "distill": distill}
    assert StageConfig.from_dict(stage.given(), "stage") == stage
