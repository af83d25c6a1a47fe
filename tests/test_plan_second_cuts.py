"""Plans for models whose experts differ in width already; and budgets of experts that will."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_config

from moe_jax.config import ModelConfig, MoeConfig
from moe_jax.params import count_params
from moe_jax.plan import LayerPlan, Plan, make_plan, planned_config, validate_plan

OWNED = (61, 61, 97, 97, 33, 33, 12, 12)
OWN = {"own_widths": True, "neuron_scope": "layer"}


def one_layer(moe: MoeConfig) -> ModelConfig:
    config = tiny_config()
    return dataclasses.replace(
        config, layers=(dataclasses.replace(config.layers[0], feed_forward=moe),)
    )


def cut_before(owned: tuple[int, ...] = OWNED) -> ModelConfig:
    return one_layer(MoeConfig(len(owned), 2, max(owned), expert_widths=owned))


def random_scores(config: ModelConfig, seed: int) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (config.moe(0).num_experts, config.moe(0).expert_width)
    return {0: rng.exponential(size=shape) * rng.lognormal(sigma=1.5, size=(shape[0], 1))}


def widths(layer: LayerPlan, experts: int) -> list[int]:
    return [len(layer.neurons.get(e, ())) for e in range(experts)]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 8, 16]),
    st.integers(1, 4),
    st.floats(0.1, 1),
    st.sampled_from([None, 1, 20]),
    st.booleans(),
    st.integers(0, 100),
)
def test_a_second_cut_keeps_to_its_limits(round_to, most, ratio, least, priced, seed):
    config = cut_before()
    price = np.random.default_rng(seed).uniform(0.5, 2, len(OWNED)) if priced else np.ones(8)
    plan = make_plan(
        random_scores(config, seed), config, width_ratio=ratio, round_to=round_to,
        max_buckets=most, min_width=least, neuron_prices={0: price}, **OWN,
    )  # fmt: skip
    validate_plan(plan, config)
    kept = widths(plan.layers[0], len(OWNED))
    first = -(-(least or 0) // round_to) * round_to
    floor = [min(first, owned) for owned in OWNED]
    assert len({*kept} - {0}) <= max(most, len({*floor}))
    for n, owned, lowest in zip(kept, OWNED, floor, strict=True):
        assert lowest <= n <= owned
        assert n % round_to == 0 or n == owned
    # The one expert that a layer needs may exceed what is left of the money.
    afforded = max(ratio * (price @ OWNED), price @ floor)
    assert sum(n > 0 for n in kept) == 1 or price @ kept <= afforded * (1 + 1e-8)


@pytest.mark.parametrize("size", [{"width_ratio": 1.0}, {"expert_width": 97}])
@pytest.mark.parametrize("priced", [False, True])
def test_keeping_all_keeps_all_that_experts_own(size, priced):
    config = cut_before()
    prices = {0: np.arange(1.0, 9)} if priced else None
    scores = random_scores(config, 0)
    plan = make_plan(scores, config, round_to=16, neuron_prices=prices, **size, **OWN)
    assert widths(plan.layers[0], len(OWNED)) == list(OWNED)
    assert planned_config(config, plan) == config


def test_neurons_that_do_not_exist_outrank_none():
    """Negative scores, of which the least bad stay."""
    config = cut_before((8, 8, 3))
    scores = np.full((3, 8), 99.0)  # past an expert's width, of no meaning
    scores[:2] = [3, 2, 1, -1, -1, -1, -1, -2]
    scores[2, :3] = [2, -1, -1]
    plan = make_plan({0: scores}, config, width_ratio=12 / 19, **OWN)
    assert sum(widths(plan.layers[0], 3)) == 12
    assert set(plan.layers[0].neurons[0]) >= {0, 1, 2}
    assert len(plan.layers[0].neurons[0]) == 7


def test_a_layer_keeps_no_more_of_its_one_expert_than_there_is():
    """The expert worth most stays where money buys none; here others are worth more for theirs."""
    config = cut_before((64, 64, 5, 5))
    scores = {0: np.where(np.arange(4) == 2, 100.0, 1.0)[:, None] * np.ones(64)}
    options = {**OWN, "round_to": 16, "neuron_prices": {0: np.array([1.0, 1, 1000, 1])}}
    plan = make_plan(scores, config, width_ratio=0.0001, **options)
    assert widths(plan.layers[0], 4) == [0, 0, 5, 0]
    limit = count_params(planned_config(config, plan)).total
    again = make_plan(scores, config, total_params=limit, **options)
    assert count_params(planned_config(config, again)).total <= limit


@pytest.mark.parametrize("budget", ["total_params", "active_params"])
@pytest.mark.parametrize("seed", [1, 3])
def test_a_budget_is_kept_where_models_do_not_grow_with_the_size(budget, seed):
    """A larger size may leave fewer parameters, as widths are given up for the others."""
    config = one_layer(MoeConfig(8, 2, 64))
    scores = random_scores(config, seed)
    options = {**OWN, "max_buckets": 2, "round_to": 8}

    def measured(**size) -> int:
        counts = count_params(planned_config(config, make_plan(scores, config, **size, **options)))
        return counts.total if budget == "total_params" else counts.active

    full = count_params(config)
    for share in (0.5, 0.6, 0.7, 0.8, 0.9):
        limit = int(share * (full.total if budget == "total_params" else full.active))
        assert 0.8 * limit <= measured(**{budget: limit}) <= limit


def test_models_that_differ_in_width_may_be_cut_by_hand():
    config = cut_before((8, 8, 3))
    plan = Plan({0: LayerPlan(neurons={0: (0, 1)})})
    assert planned_config(config, plan).moe(0).expert_widths == (2, 8, 3)
