"""Criteria against formulas written out in plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model, token_batches

from moe_jax.calibrate import calibrate
from moe_jax.scoring import EXPERT_CRITERIA, NEURON_CRITERIA, score
from moe_jax.statistics import Stats


@pytest.fixture(scope="module")
def stats():
    params, config = tiny_model("phimoe")
    return calibrate(
        params, config, token_batches(), importance=("lm", "kd_topk", "kd_full"), warn=False
    )


def layer_of(outputs: list[np.ndarray], weights: list[np.ndarray]) -> Stats:
    """Statistics of one layer whose experts gave these outputs [n_e, D] with these weights."""
    width = outputs[0].shape[1]
    means = [y.mean(0) if len(y) else np.zeros(width) for y in outputs]
    norms = [np.linalg.norm(y, axis=1) for y in outputs]
    layer = {
        "count": np.array([len(y) for y in outputs]),
        "routing_mass": np.array([w.sum() for w in weights]),
        "output_mean": np.stack(means),
        "output_m2": np.stack([((y - m) ** 2).sum(0) for y, m in zip(outputs, means, strict=True)]),
        "output_norm": np.array([n.sum() for n in norms]),
        "gated_norm": np.array([(n * w).sum() for n, w in zip(norms, weights, strict=True)]),
    }
    return Stats({0: layer}, 1, 1, 1)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=5), st.integers(0, 1000))
def test_expert_criteria_follow_their_formulas(sizes, seed):
    rng = np.random.default_rng(seed)
    sizes = [*sizes, 3]
    outputs = [rng.standard_normal((n, 4)) for n in sizes]
    weights = [rng.random(n) for n in sizes]
    made = layer_of(outputs, weights)
    for e, (y, w) in enumerate(zip(outputs, weights, strict=True)):
        deviation = np.sqrt(np.trace(np.atleast_2d(np.cov(y.T)))) if len(y) > 1 else 0.0
        norm = np.linalg.norm(y, axis=1)
        expected = {
            "frequency": len(y),
            "routing_mass": w.sum(),
            "output_deviation": deviation,
            "mone": deviation * w.sum(),
            "ean": norm.sum(),
            "reap": (w * norm).mean() if len(y) else 0.0,
        }
        for method, value in expected.items():
            np.testing.assert_allclose(score(made, method)[0][e], value, rtol=1e-9, atol=1e-12)
        printed = score(made, "mone", frequency="mean_weight")[0][e]
        np.testing.assert_allclose(printed, deviation * w.mean() if len(y) else 0.0, atol=1e-12)


def running_variance(calls: list[np.ndarray]) -> float:
    """The recursion of the MoNE authors' code: the first call contributes no deviation."""
    count, mean, fluctuation = 0, 0.0, 0.0
    for y in calls:
        if not len(y):
            continue
        before, count = count, count + len(y)
        mean = mean * before / count + y.sum(0) / count
        if before > 0:
            spread = ((y - mean) ** 2).sum(0) / count
            fluctuation = fluctuation * (before - 1) / max(count - 1, 1) + spread
    return float(np.linalg.norm(np.sqrt(fluctuation)))


def test_the_authors_running_variance_ranks_alike():
    rng = np.random.default_rng(0)
    scales = rng.permutation(np.geomspace(0.5, 4, 32))
    calls = [[rng.standard_normal((40, 16)) * s + s for _ in range(50)] for s in scales]
    running = np.array([running_variance(c) for c in calls])
    exact = score(
        layer_of([np.concatenate(c) for c in calls], [np.ones(2000)] * 32), "output_deviation"
    )[0]
    assert (np.argsort(running) == np.argsort(exact)).all()
    # The closed form of the recursion misses about one call in fifty.
    np.testing.assert_allclose(running, exact, rtol=0.03)


def test_every_criterion_scores_every_layer(stats):
    for method in (*EXPERT_CRITERIA, *NEURON_CRITERIA):
        scores = score(stats, method)
        assert set(scores) == set(stats.layers)
        expected = "count" if method in EXPERT_CRITERIA else "weight_norm"
        for i, values in scores.items():
            assert values.shape == stats.layers[i][expected].shape
            assert (values >= 0).all()


def test_random_scores_follow_the_seed(stats):
    first, again, other = (score(stats, "random", seed=s)[0] for s in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_unreached_experts_score_zero(stats):
    layers = {i: dict(layer) for i, layer in stats.layers.items()}
    layers[0]["count"] = np.where(np.arange(6) == 2, 0, layers[0]["count"])
    quiet = Stats(layers, 1, 1, 1)
    for method in (*EXPERT_CRITERIA, *NEURON_CRITERIA):
        assert not score(quiet, method)[0][2].any()


def test_importance_that_vanishes_is_refused_with_the_reason(stats):
    layers = {
        i: layer | {"kd_full.batch_abs": np.zeros_like(layer["weight_norm"])}
        for i, layer in stats.layers.items()
    }
    with pytest.raises(ValueError, match="its own teacher"):
        score(Stats(layers, 1, 1, 1), "kd_full")


def test_bad_requests_are_refused(stats):
    with pytest.raises(ValueError, match="method must be one of"):
        score(stats, "mnoe")
    with pytest.raises(ValueError, match="frequency must be"):
        score(stats, "mone", frequency="often")
    with pytest.raises(ValueError, match="aggregation must be one of"):
        score(stats, "lm", aggregation="mean")
    params, config = tiny_model("olmoe")
    plain = calibrate(params, config, token_batches(1), warn=False)
    with pytest.raises(ValueError, match="calibrate with importance"):
        score(plain, "kd_topk")
