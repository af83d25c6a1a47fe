"""The training loop: it learns, resumes to the bit, and stops at a loss that is not finite."""

from __future__ import annotations

import dataclasses

import grain
import jax
import numpy as np
import pytest
from models import VOCAB, tiny_model

from moe_jax.checkpoint import TrainingCheckpoints
from moe_jax.distill import TrainSettings, initial_state, train
from moe_jax.metrics import read_metrics
from moe_jax.shapes import leaves_with_path

SETTINGS = TrainSettings(
    steps=8,
    learning_rate=3e-2,
    warmup_steps=1,
    balance_weight=0.01,
    checkpoint_every=3,
    log_every=1,
)


def dataset():
    """Sixteen rows of text that repeats itself, in batches of 2, forever."""
    rng = np.random.default_rng(0)
    rows = np.tile(rng.integers(0, VOCAB, (16, 4)), (1, 4)).astype(np.int32)
    source = grain.MapDataset.source(rows).shuffle(seed=0).repeat().batch(2)
    packed = source.map(lambda tokens: {"tokens": tokens, "segment_ids": np.ones_like(tokens)})
    return packed.to_iter_dataset()


def assert_same(a, b):
    for (path, x), (_, y) in zip(leaves_with_path(a), leaves_with_path(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=str(path))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    params, config = tiny_model("phimoe")
    folder = tmp_path_factory.mktemp("whole")
    return train(params, config, dataset(), SETTINGS, folder), folder


def test_training_learns(uninterrupted):
    _, folder = uninterrupted
    records = read_metrics(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    losses = [record["lm"] for record in records]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.2


def test_resumed_equals_uninterrupted_to_the_bit(uninterrupted, tmp_path, monkeypatch):
    """Stopped after step 5: goes on from the checkpoint of step 3, data position included."""
    params, config = tiny_model("phimoe")
    from moe_jax import distill

    original = distill.make_step

    def stopping(*arguments):
        step = original(*arguments)

        def limited(state, batch):
            if int(state["step"]) == 5:
                raise KeyboardInterrupt
            return step(state, batch)

        return limited

    monkeypatch.setattr(distill, "make_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(params, config, dataset(), SETTINGS, tmp_path)
    monkeypatch.setattr(distill, "make_step", original)
    state = initial_state(params, SETTINGS)
    with TrainingCheckpoints(tmp_path / "checkpoints") as checkpoints:
        restored, _ = checkpoints.restore(state)
    assert int(restored["step"]) == 3
    other_start = jax.tree.map(lambda leaf: leaf * 0, params)
    resumed = train(other_start, config, dataset(), SETTINGS, tmp_path)
    assert_same(resumed, uninterrupted[0])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    params, config = tiny_model("phimoe")
    settings = dataclasses.replace(SETTINGS, steps=3, checkpoint_every=1)
    train(params, config, dataset(), dataclasses.replace(settings, steps=1), tmp_path)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    with pytest.raises(FloatingPointError, match="loss of step 1 is nan"):
        train(broken, config, dataset(), settings, tmp_path / "fresh")
    with TrainingCheckpoints(tmp_path / "checkpoints") as checkpoints:
        assert int(checkpoints.restore(initial_state(params, settings))[0]["step"]) == 1


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"learning_rate": 0.0}, {"warmup_steps": 9}, {"warmup_steps": -1}]
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(SETTINGS, **change)
