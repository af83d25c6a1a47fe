"""Plans: which ids survive, and that impossible ones are refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import EXPERT_WIDTH, EXPERTS, tiny_config

from moe_jax.config import ModelConfig
from moe_jax.plan import LayerPlan, Merge, Plan, make_plan, planned_config, validate_plan


def grouped_config() -> ModelConfig:
    """Four groups of two query heads in three layers, of which the middle one has no experts."""
    config = tiny_config("qwen3_moe")
    layers = (dataclasses.replace(layer, num_heads=8, num_kv_heads=4) for layer in config.layers)
    return dataclasses.replace(config, layers=tuple(layers))


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


def test_all_neurons_may_stay_whatever_the_multiple():
    scores = {i: np.ones((EXPERTS, EXPERT_WIDTH)) for i in (0, 1)}
    plan = make_plan(scores, tiny_config(), expert_width=EXPERT_WIDTH, round_to=3)
    assert planned_config(tiny_config(), plan) == tiny_config()


@given(st.integers(1, EXPERT_WIDTH), st.integers(1, EXPERT_WIDTH), st.integers(0, 100))
def test_neurons_ranked_across_a_layer(width, round_to, seed):
    rng = np.random.default_rng(seed)
    # Experts of very different importance, so that some would keep none.
    scores = {
        i: rng.random((EXPERTS, EXPERT_WIDTH)) * 10.0 ** rng.integers(0, 4, (EXPERTS, 1))
        for i in (0, 1)
    }
    config = tiny_config()
    plan = make_plan(scores, config, expert_width=width, round_to=round_to, neuron_scope="layer")
    validate_plan(plan, config)
    most = max(len(kept) for layer in plan.layers.values() for kept in layer.neurons.values())
    stored = min(EXPERT_WIDTH, -(-most // round_to) * round_to)
    for i, layer in plan.layers.items():
        assert layer.padded_width == stored
        assert sum(map(len, layer.neurons.values())) == EXPERTS * width
        kept = np.zeros((EXPERTS, EXPERT_WIDTH), bool)
        for e, neurons in layer.neurons.items():
            assert list(neurons) == sorted(neurons)
            kept[e, list(neurons)] = True
        best = np.zeros_like(kept)
        best[np.arange(EXPERTS), scores[i].argmax(1)] = True
        assert kept[best].all()
        # Whatever else stays scores more than all that goes.
        assert scores[i][kept & ~best].min(initial=np.inf) > scores[i][~kept].max(initial=-np.inf)


def test_equal_scores_of_a_layer_keep_the_lowest_ids():
    scores = {i: np.ones((EXPERTS, EXPERT_WIDTH)) for i in (0, 1)}
    plan = make_plan(scores, tiny_config(), expert_width=2, neuron_scope="layer")
    assert [len(kept) for kept in plan.layers[0].neurons.values()] == [7, 1, 1, 1, 1, 1]
    assert plan.layers[0].padded_width == 7
    assert all(kept[0] == 0 for kept in plan.layers[0].neurons.values())


@given(st.integers(1, 4), st.integers(0, 100), st.booleans())
def test_the_highest_groups_stay_in_every_layer(keep, seed, with_experts):
    config = grouped_config()
    rng = np.random.default_rng(seed)
    groups = {i: rng.permutation(4).astype(float) for i in range(3)}
    experts = {i: rng.permutation(EXPERTS).astype(float) for i in config.moe_layers}
    alone = make_plan(None, config, group_scores=groups, kv_groups=keep)
    plan = alone
    if with_experts:
        plan = make_plan(experts, config, keep_experts=3, group_scores=groups, kv_groups=keep)
        without = make_plan(experts, config, keep_experts=3)
        assert set(plan.layers) == {0, 1, 2}
        assert without.layers == {
            i: dataclasses.replace(plan.layers[i], kv_groups=None) for i in config.moe_layers
        }
    validate_plan(plan, config)
    for i, layer in plan.layers.items():
        assert layer.kv_groups == tuple(sorted(np.argsort(-groups[i])[:keep].tolist()))
        assert layer.kv_groups == alone.layers[i].kv_groups
    small = planned_config(config, plan)
    assert {(layer.num_heads, layer.num_kv_heads) for layer in small.layers} == {(2 * keep, keep)}


def merging(kept: int, *removed: int, **more) -> LayerPlan:
    return LayerPlan(merges=(Merge(kept, removed, (1.0,) * (1 + len(removed))),), **more)


ids = st.lists(st.integers(0, 50), unique=True).map(lambda items: tuple(sorted(items)))
merges = st.builds(
    Merge, st.integers(0, 50), ids, st.lists(st.floats(0, 1e9), max_size=4).map(tuple)
)


@given(
    st.dictionaries(
        st.integers(0, 9),
        st.builds(
            LayerPlan,
            ids,
            ids,
            st.sampled_from(["mean", "weighted_mean", "zero"]),
            st.dictionaries(st.integers(0, 50), ids),
            st.none() | st.integers(1, 50),
            st.none() | ids,
            st.lists(merges, max_size=2).map(tuple),
            st.booleans(),
            st.sampled_from(["mean", "kept"]),
        ),
    ),
    ids,
)
def test_json_round_trip(layers, dropped):
    plan = Plan(layers, "mone", {"keep_experts": 3, "scope": "layer"}, dropped)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(json.loads(plan.to_json())) == plan


def test_plans_from_before_groups_merges_and_dropped_layers_are_read():
    """What names files by a plan's digest finds them again: younger fields are not in it."""
    raw = json.loads(Plan({0: LayerPlan(novices=(1,))}).to_json())
    assert "shared_neurons" not in raw["layers"]["0"]
    for name in ("kv_groups", "padded_width", "merges", "merge_align", "merge_router"):
        raw["layers"]["0"].pop(name)
    raw.pop("dropped_layers")
    assert Plan.from_json(raw) == Plan({0: LayerPlan(novices=(1,))})


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
        (
            {"keep_experts": 3, "neuron_scope": "model"},
            "model. needs a ranking of neurons",
        ),
        (
            {"keep_experts": 3, "neuron_prices": {0: -np.ones(2)}},
            "prices needs scores of neurons",
        ),
        ({"keep_experts": 3, "round_to": 8}, "round_to = 8 needs a ranking of neurons"),
        ({"keep_experts": 3, "constants": True}, "constants = True needs a ranking of neurons"),
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
        ({"expert_width": 4, "neuron_scope": "global"}, "neuron_scope must be"),
        ({"expert_width": 5, "round_to": 3}, "multiple of round_to = 3, or all 8, got 5"),
        ({"expert_width": 4, "scope": "global"}, "scope = .global. needs a ranking of experts"),
        (
            {"expert_width": 4, "replacement": "delete"},
            "delete. needs a ranking of exp",
        ),
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
    ("scores", "arguments", "message"),
    [
        ({0: 4, 1: 4, 2: 4}, {"kv_groups": 0}, r"kv_groups must be in \[1, 4\], got 0"),
        ({0: 4, 1: 4, 2: 4}, {"kv_groups": 5}, "got 5"),
        ({0: 4, 1: 3, 2: 4}, {"kv_groups": 2}, r"group_scores of layer 1 must be \[4\]"),
        ({0: 4, 2: 4}, {"kv_groups": 2}, r"must cover the layers \(0, 1, 2\), got \[0, 2\]"),
        ({0: 4, 1: 4, 2: 4}, {}, "need each other"),
        ({}, {"kv_groups": 2}, "need each other"),
        ({}, {}, "got neither"),
        (
            {0: 4, 1: 4, 2: 4},
            {"kv_groups": 2, "scope": "global"},
            "scope = .global. needs a ranking of experts",
        ),
        ({0: 4, 1: 4, 2: 4}, {"kv_groups": 2, "width_ratio": 0.5}, "width_ratio needs scores"),
    ],
)
def test_impossible_group_requests_are_refused(scores, arguments, message):
    group_scores = {i: np.ones(n) for i, n in scores.items()}
    with pytest.raises(ValueError, match=message):
        make_plan(None, grouped_config(), group_scores=group_scores, **arguments)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LayerPlan(kv_groups=()), "at least one of kv_groups"),
        (LayerPlan(kv_groups=(4,)), r"kv_groups must be in \[0, 4\), got \[4\]"),
        (LayerPlan(kv_groups=(1, 1)), "kv_groups are listed twice"),
        (LayerPlan(kv_groups=(2, 1)), r"ascending, got \[2, 1\]"),
        (LayerPlan(kv_groups=(1,), novices=(0,)), "only kv_groups can be cut"),
        (LayerPlan(padded_width=4), "only kv_groups can be cut"),
    ],
)
def test_hand_written_cuts_of_a_layer_without_experts_are_checked(layer, message):
    with pytest.raises(ValueError, match=f"plan layer 1: .*{message}"):
        validate_plan(Plan({1: layer}), grouped_config())


def test_layers_may_keep_different_groups():
    plan = Plan({0: LayerPlan(kv_groups=(3,)), 1: LayerPlan(kv_groups=(0, 2))})
    small = planned_config(grouped_config(), plan)
    assert [layer.num_heads for layer in small.layers] == [2, 4, 8]


def test_groups_whose_norm_is_shared_are_refused():
    with pytest.raises(ValueError, match="over all heads together"):
        validate_plan(Plan({0: LayerPlan(kv_groups=(0, 1))}), tiny_config("olmoe"))
    scores = {i: np.ones(2) for i in (0, 1)}
    with pytest.raises(ValueError, match="over all heads together"):
        make_plan(None, tiny_config("olmoe"), group_scores=scores, kv_groups=1)


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
        (LayerPlan(padded_width=7), r"padded_width must be in \[8, 8\], .*got 7"),
        (LayerPlan(neurons=dict.fromkeys(range(6), (0, 1)), padded_width=1), r"in \[2, 8\]"),
        (LayerPlan(neurons=dict.fromkeys(range(6), (0, 1)), padded_width=9), "got 9"),
        (merging(1, 6), r"experts of merges must be in \[0, 6\), got \[6\]"),
        (merging(1, 1), "experts of merges are listed twice"),
        (merging(1, 0, deleted=(0,)), r"merged experts \[0\] are deleted or novices"),
        (merging(1, 0, novices=(1,)), r"merged experts \[1\] are deleted or novices"),
        (LayerPlan(merges=(Merge(1, (0,), (1.0,)),)), "into expert 1: needs 2 weights, got 1"),
        (LayerPlan(merges=(Merge(1, (0,), (0.0, 0.0)),)), "not all zero"),
        (LayerPlan(merges=(Merge(1, (0,), (2.0, -1.0)),)), r"not negative .*got \[2.0, -1.0\]"),
        (LayerPlan(merges=(Merge(1, (0,), (1.0, float("inf"))),)), "finite"),
        (merging(1, 0, 2, 3, 4, 5), "experts_per_token = 2 router rows, leaves 1"),
        (merging(1, 0, repair=True), "repair and merges exclude each other"),
        (merging(1, 0, constants=True), "constants and merges exclude each other"),
        (LayerPlan(neurons=dict.fromkeys(range(6), (2, 0))), r"expert 0 must be ascending"),
    ],
)
def test_hand_written_plans_are_checked(layer, message):
    with pytest.raises(ValueError, match=message):
        validate_plan(Plan({0: layer}), tiny_config())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan({}, dropped_layers=(2,)), r"in \[0, 2\) and leave at least one layer, got \[2\]"),
        (Plan({}, dropped_layers=(0, 1)), "leave at least one layer"),
        (Plan({}, dropped_layers=(1, 1)), "must be different"),
        (Plan({1: LayerPlan(deleted=(0,))}, dropped_layers=(1,)), r"\[1\] are cut and dropped"),
    ],
)
def test_hand_written_drops_are_checked(plan, message):
    with pytest.raises(ValueError, match=message):
        validate_plan(plan, tiny_config())


def test_existing_novices_are_no_new_ones():
    """Their constant would be replaced by that of an expert without neurons."""
    config = tiny_config().replace_moe(0, novice_ids=(2,))
    with pytest.raises(ValueError, match=r"plan layer 0: experts \[2\] are novices already"):
        validate_plan(Plan({0: LayerPlan(novices=(1, 2))}), config)


def test_existing_novices_are_never_merged():
    config = tiny_config().replace_moe(0, novice_ids=(2,))
    for layer in (merging(1, 2), merging(2, 1)):
        with pytest.raises(ValueError, match=r"merged experts \[2\] are deleted or novices"):
            validate_plan(Plan({0: layer}), config)


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
        '{"format": "moe_jax.plan", "version": 1, "layers": {"0": {"kv_groups": [1.5]}}}',
        '{"format": "moe_jax.plan", "version": 1, "layers": {"0": {"kv_groups": "01"}}}',
        '{"format": "moe_jax.plan", "version": 1, "layers": {"0": {"kv_groups": 2}}}',
        '{"format": "moe_jax.plan", "version": 1, "layers": {"0": {"padded_width": "8"}}}',
        '{"format": "moe_jax.plan", "version": 1, "layers": {"0": {"merges": [{"kept": 1}]}}}',
        '{"format": "moe_jax.plan", "version": 1, "layers": {"0": {"merges": [[1, 2]]}}}',
        '{"format": "moe_jax.plan", "version": 1, "layers": {"0": {"merge_router": "sum"}}}',
        '{"format": "moe_jax.plan", "version": 1, "layers": {"0": {"merge_align": "no"}}}',
        '{"format": "moe_jax.plan", "version": 1, "layers": {}, "dropped_layers": [1.5]}',
        '{"format": "moe_jax.plan", "version": 1, "layers": {"0": [1]}}',
        '{"format": "moe_jax.plan", "version": 1, "layers": {}, "droped_layers": [1]}',
        '{"format": "moe_jax.plan", "version": 1, "layers": {}, "settings": null}',
        '{"format": "moe_jax.plan", "version": 1, "layers": {}, "method": 3}',
    ],
)
def test_broken_plan_files_are_refused(text):
    with pytest.raises(ValueError, match="plan"):
        Plan.from_json(text)
