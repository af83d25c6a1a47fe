"""Energy, OBS and least-squares repair against plain float64 NumPy, and their invariances."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.repair import (
    group_removal_costs,
    neuron_energy,
    removal_costs,
    repaired_down,
)

NEURONS, WIDTH, ROWS = 12, 5, 40


def activations(seed: int, rows: int = ROWS, neurons: int = NEURONS):
    """Gate-weighted activations [T, F] with correlated columns, and a down-projection."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((neurons, neurons))
    hidden = rng.standard_normal((rows, neurons)) @ mixing + rng.standard_normal(neurons)
    return hidden, rng.standard_normal((neurons, WIDTH))


def plain_obs(gram, down, ridge, removable):
    """One neuron at a time, everything recomputed from the definition."""
    gram = gram + ridge * np.diag(np.diag(gram))
    inverse = np.linalg.inv(gram)
    weights, costs, top, left = down.copy(), np.zeros(len(down)), 0.0, list(range(removable))
    while left:
        found = [(np.sum(weights[j] ** 2) / inverse[j, j], j) for j in left]
        cost, q = min(found)
        top = max(top, cost)
        costs[q] = top
        share = inverse[:, q] / inverse[q, q]
        weights = weights - share[:, None] * weights[q]
        inverse = inverse - np.outer(share, inverse[q])
        left.remove(q)
    return costs[:removable]


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 5, 12, 64]), st.booleans())
def test_blocked_obs_equals_one_neuron_at_a_time(seed, block, constant):
    hidden, down = activations(seed)
    if constant:
        hidden = np.concatenate([hidden, np.ones((ROWS, 1))], 1)
    gram = hidden.T @ hidden
    padded = np.concatenate([down, np.zeros((1, WIDTH))]) if constant else down
    expected = plain_obs(gram, padded, 1e-3, NEURONS)
    found = removal_costs(jnp.asarray(gram), jnp.asarray(down), 1e-3, block)
    # Of 12 by 12 matrices of condition 1e4 at most, in float64.
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8 * expected.max())


def plain_group_obs(gram, weights, ridge, groups):
    """Each step's costs as errors of the least squares that go on without the group."""
    gram = gram + ridge * np.diag(np.diag(gram))
    owner = np.repeat(np.arange(groups), NEURONS // groups)
    owner = np.append(owner, [groups] * (len(gram) - NEURONS))
    costs, before, top, left = np.zeros(groups), 0.0, 0.0, list(range(groups))
    while left:
        found = []
        for group in left:
            stays = np.isin(owner, [g for g in (*left, groups) if g != group])
            cross = gram[np.ix_(stays, ~stays)]
            taken = cross.T @ np.linalg.solve(gram[np.ix_(stays, stays)], cross)
            lost = weights[~stays]
            found.append((np.sum(lost * ((gram[np.ix_(~stays, ~stays)] - taken) @ lost)), group))
        total, group = min(found)
        top = max(top, total - before)
        costs[group], before = top, total
        left.remove(group)
    return costs


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 4, 12]), st.booleans())
def test_group_obs_equals_least_squares_without_the_groups(seed, groups, bias):
    hidden, weights = activations(seed)
    if bias:
        hidden = np.concatenate([hidden, np.ones((ROWS, 1))], 1)
    gram = hidden.T @ hidden
    padded = np.concatenate([weights, np.ones((1, WIDTH))]) if bias else weights
    expected = plain_group_obs(gram, padded, 1e-3, groups)
    by_group = jnp.asarray(weights).reshape(groups, -1, WIDTH)
    found = group_removal_costs(jnp.asarray(gram), by_group, 1e-3)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8 * expected.max())
    if groups == NEURONS:
        one_by_one = removal_costs(jnp.asarray(gram), jnp.asarray(weights), 1e-3)
        np.testing.assert_allclose(found, one_by_one, rtol=1e-8, atol=1e-8 * expected.max())


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, NEURONS))
def test_repair_minimises_the_error(seed, count):
    hidden, down = activations(seed)
    kept = np.zeros(NEURONS, bool)
    kept[np.random.default_rng(seed).permutation(NEURONS)[:count]] = True
    found = np.asarray(repaired_down(hidden.T @ hidden, down, kept, 0.0))
    best = np.linalg.lstsq(hidden[:, kept], hidden @ down, rcond=None)[0]
    np.testing.assert_allclose(found[kept], best, atol=1e-6 * np.abs(best).max())
    assert not found[~kept].any()


def test_a_gap_is_closed_as_far_as_it_is_linear():
    hidden, down = activations(9)
    change = np.random.default_rng(9).standard_normal((ROWS, WIDTH))
    kept = np.arange(NEURONS) % 3 > 0
    found = repaired_down(hidden.T @ hidden, down, kept, 0.0, hidden.T @ change)
    best = np.linalg.lstsq(hidden[:, kept], hidden @ down + change, rcond=None)[0]
    np.testing.assert_allclose(found[kept], best, atol=1e-6 * np.abs(best).max())
    assert not np.asarray(found)[~kept].any()


def test_the_cost_of_one_removal_is_the_rise_of_the_error_after_repair():
    hidden, down = activations(0)
    gram = hidden.T @ hidden
    costs = np.asarray(removal_costs(gram, down, 0.0))
    first = int(costs.argmin())
    kept = np.arange(NEURONS) != first
    error = np.sum((hidden @ (repaired_down(gram, down, kept, 0.0) - down)) ** 2)
    np.testing.assert_allclose(costs[first], error, rtol=1e-8)
    others = [
        np.sum((hidden @ (repaired_down(gram, down, np.arange(NEURONS) != j, 0.0) - down)) ** 2)
        for j in range(NEURONS)
    ]
    assert np.argmin(others) == first


def test_keeping_all_is_the_identity():
    hidden, down = activations(1, rows=3)  # fewer tokens than neurons
    everything = np.ones(NEURONS, bool)
    np.testing.assert_array_equal(repaired_down(hidden.T @ hidden, down, everything, 1e-2), down)


def test_a_neuron_that_the_others_span_costs_nothing():
    hidden, down = activations(2)
    hidden[:, 3] = hidden[:, [0, 7]] @ [2.0, -1.0]
    hidden = np.concatenate([hidden, np.ones((ROWS, 1))], 1)
    hidden[:, 5] = 0.5  # a constant stands for it
    gram = hidden.T @ hidden
    costs = np.asarray(removal_costs(gram, down, 1e-9))
    cheapest = np.argsort(costs)[:2]
    assert 5 in cheapest
    assert cheapest[0] in (0, 3, 7, 5)
    # A ridge of 1e-9 leaves an error of that order.
    assert costs[cheapest].max() < 1e-6 * np.sum((hidden[:, :-1] @ down) ** 2)
    kept = np.ones(NEURONS + 1, bool)
    kept[[3, 5]] = False
    padded = np.concatenate([down, np.zeros((1, WIDTH))])
    repaired = repaired_down(gram, padded, kept, 1e-12)
    np.testing.assert_allclose(hidden @ repaired, hidden @ padded, atol=1e-6)


def test_permuting_neurons_permutes_the_result():
    hidden, down = activations(3)
    order = np.random.default_rng(0).permutation(NEURONS)
    gram = hidden.T @ hidden
    permuted = gram[np.ix_(order, order)]
    for call in (removal_costs, neuron_energy):
        np.testing.assert_allclose(call(gram, down)[order], call(permuted, down[order]), rtol=1e-9)
    kept = np.arange(NEURONS) < 7
    np.testing.assert_allclose(
        repaired_down(gram, down, kept)[order],
        repaired_down(permuted, down[order], kept[order]),
        atol=1e-9,
    )


def test_energy_is_what_a_neuron_adds():
    hidden, down = activations(4)
    added = hidden[:, :, None] * down
    np.testing.assert_allclose(
        neuron_energy(hidden.T @ hidden, down), np.square(added).sum((0, 2)), rtol=1e-12
    )


def test_silent_neurons_cost_nothing_and_take_nothing_over():
    hidden, down = activations(5)
    hidden[:, 4] = 0
    gram = hidden.T @ hidden
    costs = np.asarray(removal_costs(gram, down))
    assert costs[4] == 0 == costs.min()
    kept = np.arange(NEURONS) != 2
    np.testing.assert_array_equal(repaired_down(gram, down, kept)[4], down[4])


def test_single_precision_finds_nearly_the_same_order():
    hidden, down = activations(6, rows=400, neurons=96)
    gram = hidden.T @ hidden
    exact = np.asarray(removal_costs(gram, down))
    single = np.asarray(removal_costs(gram.astype(np.float32), down.astype(np.float32)))
    assert single.dtype == np.float32
    kept = [set(np.argsort(-costs)[:48]) for costs in (exact, single)]
    assert len(kept[0] & kept[1]) >= 46


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [0, 1, 3, NEURONS - 1])
def test_fewer_tokens_than_neurons_leave_the_rest_to_the_ridge(rows, dtype):
    """The minimum of the error and the ridge's penalty, by least squares on stacked rows."""
    hidden, down = activations(7, rows=rows)
    gram, ridge = hidden.T @ hidden, 1e-2
    kept = np.arange(NEURONS) < NEURONS - 1
    found = np.asarray(repaired_down(gram.astype(dtype), down.astype(dtype), kept, ridge))
    penalty = np.diag(np.sqrt(ridge * np.diag(gram)[kept]))
    system = np.concatenate([hidden[:, kept], penalty])
    goal = np.concatenate([hidden @ down, penalty @ down[kept]])
    change = np.linalg.lstsq(system, goal - system @ down[kept], rcond=None)[0]
    rtol, atol = (1e-8, 1e-10) if dtype == np.float64 else (1e-3, 1e-3)
    np.testing.assert_allclose(found[kept], down[kept] + change, rtol, atol)
    costs = np.asarray(removal_costs(gram.astype(dtype), down.astype(dtype)))
    assert np.isfinite(costs).all()
    assert (costs >= 0).all()
    if not rows:
        assert not costs.any()
        np.testing.assert_array_equal(found[kept], down[kept].astype(dtype))


@pytest.mark.parametrize("kind", ["the same token", "nearly the same", "apart"])
def test_wide_experts_with_few_tokens_stay_finite_in_single_precision(kind):
    """Second moments of condition N / ridge = 5e5: the worst that so many neurons can have."""
    rng, neurons = np.random.default_rng(8), 512
    spread = {"the same token": 0.0, "nearly the same": 1e-2, "apart": 1.0}[kind]
    hidden = (1 + spread * rng.standard_normal((5, neurons))).astype(np.float32)
    gram, down = hidden.T @ hidden, rng.standard_normal((neurons, WIDTH)).astype(np.float32)
    kept = np.arange(neurons) % 2 == 0
    repaired = np.asarray(repaired_down(gram, down, kept))
    assert np.isfinite(repaired).all()
    assert np.isfinite(np.asarray(removal_costs(gram, down))).all()
    error = np.square(hidden @ (repaired - down)).sum()
    assert error < 1e-3 * np.square(hidden @ np.where(kept[:, None], 0, down)).sum()
