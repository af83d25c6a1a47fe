"""Plans: which ids survive, and that impossible ones are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import EXPERT_WIDTH, EXPERTS, tiny_config

from moe_jax.plan import LayerPlan, Plan, make_plan, validate_plan


def expert_scores(seed=0):
    rng = np.random.default_rng(seed)
    return {i: rng.permutation(EXPERTS).astype(float) for i in (0, 1)}


@given(st.integers(2, EXPERTS), st.integers(0, 100))
def test_the_lowest_scores_go(keep, seed):
    scores = expert_scores(seed)
    plan = make_plan(scores, tiny_config(), keep_experts=keep)
    for i, layer in plan.layers.items():
        assert len(layer.novices) == EXPERTS - keep
        assert set(layer.novices) == set(np.argsort(scores[i])[: EXPERTS - keep].tolist())
        assert list(layer.novices) == sorted(layer.novices)


def test_ties_go_to_the_lower_id():
    plan = make_plan({0: np.ones(6), 1: np.ones(6)}, tiny_config(), keep_experts=4)
    assert plan.layers[0].novices == (4, 5)


def test_global_scope_keeps_the_highest_and_at_least_k_per_layer():
    scores = {0: np.arange(6.0), 1: np.arange(6.0) + 100}
    plan = make_plan(scores, tiny_config(), keep_experts=4, scope="global", replacement="delete")
    assert plan.layers[0].deleted == (0, 1, 2, 3)
    assert plan.layers[1].deleted == ()


@given(st.integers(1, EXPERT_WIDTH), st.integers(0, 100))
def test_the_highest_neurons_stay(width, seed):
    rng = np.random.default_rng(seed)
    scores = {i: rng.random((EXPERTS, EXPERT_WIDTH)) for i in (0, 1)}
    plan = make_plan(scores, tiny_config(), expert_width=width)
    for i, layer in plan.layers.items():
        for e, kept in layer.neurons.items():
            assert kept == tuple(sorted(np.argsort(-scores[i][e])[:width].tolist()))


def test_widths_round_to_multiples():
    scores = {i: np.random.default_rng(0).random((EXPERTS, EXPERT_WIDTH)) for i in (0, 1)}
    plan = make_plan(scores, tiny_config(), width_ratio=0.3, round_to=4)
    assert {len(kept) for kept in plan.layers[0].neurons.values()} == {4}


ids = st.lists(st.integers(0, 50), unique=True).map(lambda items: tuple(sorted(items)))


@given(
    st.dictionaries(
        st.integers(0, 9),
        st.builds(
            LayerPlan,
            ids,
            ids,
            st.sampled_from(["mean", "zero"]),
            st.dictionaries(st.integers(0, 50), ids),
        ),
    )
)
def test_json_round_trip(layers):
    plan = Plan(layers, "mone", {"keep_experts": 3, "scope": "layer"})
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(json.loads(plan.to_json())) == plan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_experts": 1}, r"\[experts_per_token = 2, 6\], got 1"),
        ({"keep_experts": 7}, "got 7"),
        ({"keep_ratio": 0.0}, r"in \(0, 1\], got 0.0"),
        ({"keep_ratio": 1.5}, "got 1.5"),
        ({}, "exactly one of"),
        ({"keep_experts": 3, "keep_ratio": 0.5}, "exactly one of"),
        ({"keep_experts": 3, "scope": "model"}, "scope must be"),
        ({"keep_experts": 3, "replacement": "merge"}, "replacement must be"),
    ],
)
def test_impossible_expert_counts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(expert_scores(), tiny_config(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expert_width": 0}, r"in \[1, 8\], got 0"),
        ({"expert_width": 9}, "got 9"),
        ({"width_ratio": -1}, "got -1"),
        ({"expert_width": 4, "round_to": 0}, "round_to"),
    ],
)
def test_impossible_widths_are_refused(arguments, message):
    scores = {i: np.ones((EXPERTS, EXPERT_WIDTH)) for i in (0, 1)}
    with pytest.raises(ValueError, match=message):
        make_plan(scores, tiny_config(), **arguments)


def test_scores_must_fit_the_model():
    with pytest.raises(ValueError, match="must cover the MoE layers"):
        make_plan({0: np.ones(6)}, tiny_config(), keep_experts=3)
    with pytest.raises(ValueError, match=r"must be \[6\], got \(5,\)"):
        make_plan({0: np.ones(5), 1: np.ones(6)}, tiny_config(), keep_experts=3)
    with pytest.raises(ValueError, match="NaN"):
        make_plan({0: np.full(6, np.nan), 1: np.ones(6)}, tiny_config(), keep_experts=3)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LayerPlan(deleted=(6,)), r"deleted must be in \[0, 6\), got \[6\]"),
        (LayerPlan(deleted=(1,), novices=(1,)), "deleted and novices"),
        (LayerPlan(deleted=(0, 1, 2, 3, 4)), "experts_per_token = 2 router rows, leaves 1"),
        (LayerPlan(novices=(0, 1, 2, 3, 4, 5)), "no expert with neurons"),
        (LayerPlan(neurons={0: (1, 2)}), "same number of neurons"),
        (LayerPlan(neurons=dict.fromkeys(range(6), (8,))), r"in \[0, 8\), got \[8\]"),
        (LayerPlan(neurons=dict.fromkeys(range(6), ())), "at least one neuron"),
        (LayerPlan(novices=(2, 2)), "listed twice"),
    ],
)
def test_hand_written_plans_are_checked(layer, message):
    with pytest.raises(ValueError, match=message):
        validate_plan(Plan({0: layer}), tiny_config())


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": "moe_jax.plan", "version": 9}',
        '{"format": "moe_jax.plan", "version": 1}',
        '{"format": "moe_jax.plan", "version": 1, "layers": {"first": {}}}',
        '{"format": "moe_jax.plan", "version": 1, "layers": {"0": {"novice": [1]}}}',
        '{"format": "moe_jax.plan", "version": 1, "layers": {"0": {"novices": ["a"]}}}',
        '{"format": "moe_jax.plan", "version": 1, "layers": {"0": {"novice_value": "max"}}}',
    ],
)
def test_broken_plan_files_are_refused(text):
    with pytest.raises(ValueError, match="plan"):
        Plan.from_json(text)
