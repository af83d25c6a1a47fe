"""Criteria against formulas written out in plain NumPy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model, token_batches

from moe_jax.calibrate import calibrate
from moe_jax.scoring import (
    EXPERT_CRITERIA,
    NEURON_CRITERIA,
    PASSES,
    best_subset,
    reconstruction_loss,
    score,
)
from moe_jax.scoring.reconstruction import MOST_SUBSETS
from moe_jax.statistics import Stats


@pytest.fixture(scope="module")
def stats():
    params, config = tiny_model("phimoe")
    return calibrate(params, config, token_batches(), importance=PASSES, warn=False)


def layer_of(outputs: list[np.ndarray], weights: list[np.ndarray]) -> Stats:
    """Statistics of one layer whose experts gave these outputs [n_e, D] with these weights."""
    width = outputs[0].shape[1]
    means = [y.mean(0) if len(y) else np.zeros(width) for y in outputs]
    norms = [np.linalg.norm(y, axis=1) for y in outputs]
    pairs = list(zip(norms, weights, strict=True))
    layer = {
        "count": np.array([len(y) for y in outputs]),
        "routing_mass": np.array([w.sum() for w in weights]),
        "output_mean": np.stack(means),
        "output_m2": np.stack([((y - m) ** 2).sum(0) for y, m in zip(outputs, means, strict=True)]),
        "output_norm": np.array([n.sum() for n in norms]),
        "gated_norm": np.array([(n * w).sum() for n, w in pairs]),
        "gated_square": np.array([((n * w) ** 2).sum() for n, w in pairs]),
    }
    return Stats({0: layer}, 1, 1, 1)


def scaled(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (values.max() - values.min())


def expected_scores(outputs, weights) -> dict[str, np.ndarray]:
    """Every criterion of outputs and weights, expert by expert, from its definition."""
    rows = []
    for y, w in zip(outputs, weights, strict=True):
        if len(y) == 0:
            rows.append(dict.fromkeys(rows[0] if rows else (), 0.0))
            continue
        deviations = y.std(0, ddof=1) if len(y) > 1 else np.zeros(y.shape[1])
        deviation, norm = np.sqrt((deviations**2).sum()), np.linalg.norm(y, axis=1)
        relative = deviations**2 / (np.abs(y.mean(0)) + 1e-6)
        rows.append(
            {
                "frequency": len(y),
                "routing_mass": w.sum(),
                "mean_weight": w.mean(),
                "output_deviation": deviation,
                "mone": deviation * w.sum(),
                "mone_l1": deviations.sum() * w.sum(),
                "mone_cv": np.sqrt((relative**2).sum()) * w.sum(),
                "mone_log_sum": np.log(1 + deviation) + np.log(1 + w.sum()),
                "ean": norm.sum(),
                "ean_mean": norm.mean(),
                "reap": (w * norm).mean(),
                "reap_l2": np.sqrt(((w * norm) ** 2).mean()),
            }
        )
    names = max(rows, key=len)
    table = {name: np.array([row.get(name, 0.0) for row in rows]) for name in names}
    mixed = 0.3 * scaled(table["output_deviation"]) + 0.7 * scaled(table["routing_mass"])
    return table | {"mone_sum": np.where(table["frequency"] > 0, mixed, 0)}


@given(st.lists(st.integers(0, 9), min_size=2, max_size=5), st.integers(0, 1000))
def test_expert_criteria_follow_their_formulas(sizes, seed):
    rng = np.random.default_rng(seed)
    sizes = [*sizes, 3, 1]
    outputs = [rng.standard_normal((n, 4)) for n in sizes]
    weights = [rng.random(n) for n in sizes]
    made = layer_of(outputs, weights)
    for method, values in expected_scores(outputs, weights).items():
        options = {"share": 0.3} if method == "mone_sum" else {}
        found = score(made, method, **options)[0]
        np.testing.assert_allclose(found, values, rtol=1e-9, atol=1e-12, err_msg=method)
    printed = score(made, "mone", frequency="mean_weight")[0]
    deviation, mean_weight = (score(made, name)[0] for name in ("output_deviation", "mean_weight"))
    np.testing.assert_allclose(printed, deviation * mean_weight, atol=1e-12)


@given(st.integers(1, 6), st.integers(0, 1000))
def test_the_best_subset_has_the_smallest_reconstruction_error(keep, seed):
    """Against the outputs themselves, subset by subset; ten tokens choose two of six experts."""
    rng = np.random.default_rng(seed)
    weighted = rng.standard_normal((10, 6, 3)) * (rng.random((10, 6, 1)) < 1 / 3)
    gram = np.einsum("ted,tfd->ef", weighted, weighted)
    errors = {}
    for kept in itertools.combinations(range(6), keep):
        gone = [e for e in range(6) if e not in kept]
        errors[kept] = (weighted[:, gone].sum(1) ** 2).sum()
        assert abs(reconstruction_loss(gram, gone) - errors[kept]) < 1e-9
    best = best_subset(gram, keep)
    assert abs(errors[best] - min(errors.values())) < 1e-9
    layer = {"count": np.ones(6), "output_gram": gram}
    scores = score(Stats({0: layer}, 1, 1, 1), "reconstruction", keep=keep)[0]
    assert set(np.argsort(-scores)[:keep]) == set(best)


def test_greedy_removal_takes_the_least_rise_each_time():
    rng = np.random.default_rng(0)
    weighted = rng.standard_normal((400, 40, 3)) * (rng.random((400, 40, 1)) < 0.1)
    gram = np.einsum("ted,tfd->ef", weighted, weighted)
    assert math.comb(40, 20) > MOST_SUBSETS
    gone: list[int] = []
    while len(gone) < 20:
        left = [e for e in range(40) if e not in gone]
        gone.append(min(left, key=lambda e: (weighted[:, [*gone, e]].sum(1) ** 2).sum()))
    assert set(best_subset(gram, 20)) == set(range(40)) - set(gone)
    layer = {"count": np.ones(40), "output_gram": gram}
    scores = score(Stats({0: layer}, 1, 1, 1), "reconstruction")[0]
    assert np.argsort(scores, kind="stable")[:20].tolist() == gone


def test_neuron_criteria_follow_their_formulas():
    rng = np.random.default_rng(0)
    hidden = [rng.standard_normal((n, 5)) + 1 for n in (7, 2, 30)]
    down = rng.standard_normal((3, 5, 4))
    layer = {
        "count": np.array([len(h) for h in hidden]),
        "neuron_mean": np.stack([h.mean(0) for h in hidden]),
        "neuron_m2": np.stack([((h - h.mean(0)) ** 2).sum(0) for h in hidden]),
        "down_norm": np.linalg.norm(down, axis=2),
        "down_sum": np.abs(down).sum(2),
    }
    made = Stats({0: layer}, 1, 1, 1)
    added = [h[:, :, None] * w for h, w in zip(hidden, down, strict=True)]
    fluctuation = np.stack([a.var(0, ddof=1).sum(-1) for a in added])
    activation = np.stack([np.linalg.norm(h, axis=0) for h in hidden])
    mean, spread = (part(1)[:, None] for part in (fluctuation.mean, fluctuation.std))
    expected = {
        "wanda": (np.abs(down) * activation[:, :, None]).sum(2),
        "fluctuation": fluctuation,
        "flap": (fluctuation - mean) / spread,
        "activation_norm": activation,
    }
    for method, values in expected.items():
        np.testing.assert_allclose(score(made, method)[0], values, rtol=1e-9, err_msg=method)


@pytest.mark.parametrize("alpha", [0, 0.9, 1])
def test_camera_adds_the_energy_and_the_peak_of_what_a_neuron_adds_to_the_output(alpha):
    rng = np.random.default_rng(0)
    hidden = [rng.standard_normal((n, 5)) for n in (7, 2, 30)]
    weights = [rng.random(len(h)) for h in hidden]
    down = rng.standard_normal((3, 5, 4))
    gated = [w[:, None] * h for w, h in zip(weights, hidden, strict=True)]
    layer = {
        "count": np.array([len(h) for h in hidden]),
        "gated_energy": np.stack([(g**2).sum(0) for g in gated]),
        "gated_peak": np.stack([np.abs(g).max(0) for g in gated]),
        "down_norm": np.linalg.norm(down, axis=2),
    }
    found = score(Stats({0: layer}, 1, 1, 1), "camera", alpha=alpha)[0]
    added = [np.linalg.norm(g[:, :, None] * w, axis=2) for g, w in zip(gated, down, strict=True)]
    expected = [(1 - alpha) * (a**2).sum(0) + alpha * a.max(0) ** 2 for a in added]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        score(Stats({0: layer}, 1, 1, 1), "camera", alpha=1.5)


def test_masking_an_expert_masks_its_neurons(stats):
    """With one sequence a batch, the expert's gradient is the sum of its neurons'."""
    params, config = tiny_model("olmoe")
    batch = token_batches(1, batch=1)
    plain = calibrate(params, config, batch, importance=("lm",), warn=False)
    for layer in plain.layers.values():
        assert (layer["lm.expert_batch_abs"] <= layer["lm.batch_abs"].sum(-1) * (1 + 1e-5)).all()
        np.testing.assert_allclose(
            layer["lm.expert_sequence_square"], layer["lm.expert_batch_abs"] ** 2, rtol=1e-5
        )
    np.testing.assert_array_equal(
        score(stats, "taylor_fisher")[0], stats.layers[0]["lm.expert_sequence_square"]
    )


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
        scores = score(stats, method, model=tiny_model("olmoe"))
        assert set(scores) == set(stats.layers)
        expected = "count" if method in EXPERT_CRITERIA else "weight_norm"
        for i, values in scores.items():
            assert values.shape == stats.layers[i][expected].shape
            assert (values >= 0).all() or method == "flap"


def test_random_scores_follow_the_seed(stats):
    first, again, other = (score(stats, "random", seed=s)[0] for s in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_unreached_experts_score_lowest(stats):
    layers = {i: dict(layer) for i, layer in stats.layers.items()}
    layers[0]["count"] = np.where(np.arange(6) == 2, 0, layers[0]["count"])
    quiet = Stats(layers, 1, 1, 1)
    for method in (*EXPERT_CRITERIA, *NEURON_CRITERIA):
        values = score(quiet, method, model=tiny_model("olmoe"))[0]
        assert (values[2] == min(0, values.min())).all()


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


def test_heapr_is_the_mean_of_squares_times_the_mean_of_squared_gradients():
    """Against its definition with the [D, D] matrix of an expert's gradients."""
    rng = np.random.default_rng(0)
    tokens, width, neurons = 50, 6, 4
    hidden, d = rng.normal(size=(tokens, neurons)), rng.normal(size=(tokens, width))
    down = rng.normal(size=(neurons, width))
    moments = d.T @ d / tokens
    expected = (hidden**2).mean(0) * np.einsum("jd,de,je->j", down, moments, down)
    layer = {
        "count": np.array([tokens]),
        "neuron_mean": hidden.mean(0)[None],
        "neuron_m2": np.square(hidden - hidden.mean(0)).sum(0)[None],
        "lm.gradient_square": np.square(d @ down.T).sum(0)[None],
    }
    stats = Stats({0: layer}, 1, 1, 1)
    np.testing.assert_allclose(score(stats, "heapr")[0][0], expected)
    np.testing.assert_allclose(score(stats, "heapr", over="tokens")[0][0], tokens * expected)


def test_gate_free_means_and_scores_of_weights_alone():
    rng = np.random.default_rng(1)
    outputs = rng.normal(size=(20, 5)) + 1
    gate, up, down = (rng.normal(size=(5, 7)) for _ in range(3))
    norms, all_three = np.linalg.norm(outputs, axis=-1), np.stack([gate, up, down])
    layer = {
        "count": np.array([20]),
        "output_norm": np.array([norms.sum()]),
        "output_mean": outputs.mean(0)[None],
        "output_m2": np.square(outputs - outputs.mean(0)).sum(0)[None],
        "weight_norm": np.sqrt(np.square(all_three).sum((0, 1)))[None],
        "weight_sum": np.abs(all_three).sum((0, 1))[None],
    }
    stats = Stats({0: layer}, 1, 1, 1)
    np.testing.assert_allclose(score(stats, "man")[0], norms.mean())
    np.testing.assert_allclose(score(stats, "msan")[0], np.square(norms).mean())
    aimer = np.abs(all_three).sum() / np.sqrt(all_three.size * np.square(all_three).sum())
    np.testing.assert_allclose(score(stats, "aimer")[0], aimer * np.sqrt(3 * 5))
