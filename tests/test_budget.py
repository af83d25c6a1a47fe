"""Plans that fit a budget, and the limits on how many experts and neurons layers keep."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import EXPERT_WIDTH, EXPERTS, tiny_config

from moe_jax.config import LayerConfig, ModelConfig, MoeConfig
from moe_jax.hf.config_import import model_config
from moe_jax.kinds import GroupedQueryAttention
from moe_jax.params import count_params
from moe_jax.plan import LayerPlan, Plan, make_plan, planned_config, validate_plan

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = ("olmoe", "phimoe", "qwen3_moe")
REPLACEMENTS = ("novice", "zero", "delete")
quick = settings(max_examples=40, deadline=None)


def uneven_config() -> ModelConfig:
    """The first layer has two novices already, the second one narrower experts."""
    return tiny_config().replace_moe(0, novice_ids=(1, 4)).replace_moe(1, expert_width=5)


CONFIGS = {**{family: tiny_config(family) for family in FAMILIES}, "uneven": uneven_config()}


def expert_scores(config: ModelConfig, seed: int = 0) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {i: rng.random(config.moe(i).num_experts) for i in config.moe_layers}


def neuron_scores(config: ModelConfig, seed: int = 0) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {i: (config.moe(i).num_experts, config.moe(i).expert_width) for i in config.moe_layers}
    # Experts of different importance, so that ranking across a layer gives different widths.
    return {i: rng.random(s) * 10.0 ** rng.integers(0, 3, (s[0], 1)) for i, s in shapes.items()}


def total(config: ModelConfig, plan: Plan) -> int:
    return count_params(planned_config(config, plan)).total


def kept(config: ModelConfig, plan: Plan) -> dict[int, set[int]]:
    """Experts with neurons that stay."""
    return {
        i: set(config.moe(i).expert_ids) - set(layer.novices) - set(layer.deleted)
        for i, layer in plan.layers.items()
    }


def restored(plan: Plan, layer: int, expert: int) -> Plan:
    """The same plan without the removal of one expert."""
    old = plan.layers[layer]
    novices, deleted = (tuple(e for e in ids if e != expert) for ids in (old.novices, old.deleted))
    new = dataclasses.replace(old, novices=novices, deleted=deleted)
    return dataclasses.replace(plan, layers={**plan.layers, layer: new})


@quick
@given(
    st.sampled_from(sorted(CONFIGS)),
    st.sampled_from(REPLACEMENTS),
    st.floats(0, 1),
    st.integers(0, 100),
)
def test_global_ranking_takes_the_best_experts_that_fit(name, replacement, share, seed):
    """The best of the removed experts would exceed the budget, wherever it lies in between."""
    config = CONFIGS[name]
    scores = expert_scores(config, seed)
    options = {"scope": "global", "replacement": replacement}
    smallest = total(config, make_plan(scores, config, keep_experts=2, **options))
    limit = round(smallest + share * (count_params(config).total - smallest))
    plan = make_plan(scores, config, total_params=limit, **options)
    validate_plan(plan, config)
    assert smallest <= total(config, plan) <= limit
    removed = [
        (scores[i][e], -i, -e)
        for i, ids in kept(config, plan).items()
        for e in set(config.moe(i).expert_ids) - ids
    ]
    assert bool(removed) == (limit < count_params(config).total)
    if removed:
        _, i, e = max(removed)
        assert total(config, restored(plan, -i, -e)) > limit


@quick
@given(
    st.sampled_from(FAMILIES), st.sampled_from(REPLACEMENTS), st.floats(0, 1), st.integers(0, 100)
)
def test_layers_keep_the_largest_equal_number_that_fits(family, replacement, share, seed):
    config = tiny_config(family)
    scores = expert_scores(config, seed)
    sizes = {
        n: total(config, make_plan(scores, config, keep_experts=n, replacement=replacement))
        for n in range(2, EXPERTS + 1)
    }
    limit = round(sizes[2] + share * (sizes[EXPERTS] - sizes[2]))
    plan = make_plan(scores, config, total_params=limit, replacement=replacement)
    largest = max(n for n, size in sizes.items() if size <= limit)
    by_number = make_plan(scores, config, keep_experts=largest, replacement=replacement)
    assert plan.layers == by_number.layers


@quick
@given(
    st.sampled_from(sorted(CONFIGS)),
    st.sampled_from(["total_params", "active_params"]),
    st.sampled_from([1, 2, 3]),
    st.floats(0, 1),
)
def test_the_widest_experts_that_fit(name, budget, round_to, share):
    config = CONFIGS[name]
    scores = neuron_scores(config)

    def measure(plan: Plan) -> int:
        counts = count_params(planned_config(config, plan))
        return counts.total if budget == "total_params" else counts.active

    narrowest = LayerPlan(neurons=dict.fromkeys(range(EXPERTS), tuple(range(round_to))))
    smallest = measure(Plan(dict.fromkeys(config.moe_layers, narrowest)))
    largest = measure(Plan({}))
    limit = round(smallest + share * (largest - smallest))
    plan = make_plan(scores, config, round_to=round_to, **{budget: limit})
    validate_plan(plan, config)
    assert measure(plan) <= limit
    widths = {i: len(layer.neurons[0]) for i, layer in plan.layers.items()}
    for i, width in widths.items():
        assert width % round_to == 0 or width == config.moe(i).expert_width
    wider = {i: min(w + round_to, config.moe(i).expert_width) for i, w in widths.items()}
    if wider != widths:
        more = {
            i: LayerPlan(neurons=dict.fromkeys(range(EXPERTS), tuple(range(width))))
            for i, width in wider.items()
        }
        assert measure(Plan(more)) > limit


@quick
@given(st.sampled_from(FAMILIES), st.sampled_from([1, 2, 4]), st.floats(0, 1), st.integers(0, 100))
def test_neurons_ranked_across_a_layer_fit_as_they_are_stored(family, round_to, share, seed):
    config = tiny_config(family)
    scores = neuron_scores(config, seed)
    options = {"neuron_scope": "layer", "round_to": round_to}
    sizes = {
        width: total(config, make_plan(scores, config, expert_width=width, **options))
        for width in range(1, EXPERT_WIDTH + 1)
    }
    limit = round(sizes[1] + share * (sizes[EXPERT_WIDTH] - sizes[1]))
    plan = make_plan(scores, config, total_params=limit, **options)
    width = max(w for w, size in sizes.items() if size <= limit)
    assert plan.layers == make_plan(scores, config, expert_width=width, **options).layers


@quick
@given(
    st.sampled_from(sorted(CONFIGS)),
    st.sampled_from([{}, {"scope": "global"}, {"scope": "global", "align_experts": 2}]),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    st.integers(0, 100),
)
def test_a_larger_budget_keeps_all_that_a_smaller_one_does(name, options, shares, seed):
    config = CONFIGS[name]
    scores = expert_scores(config, seed)
    smallest = total(config, make_plan(scores, config, keep_experts=2, **options))
    limits = [round(smallest + s * (count_params(config).total - smallest)) for s in shares]
    small, large = (
        kept(config, make_plan(scores, config, total_params=limit, **options)) for limit in limits
    )
    assert all(small[i] <= large[i] for i in small)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("make", [expert_scores, neuron_scores])
def test_a_budget_that_the_model_meets_removes_nothing_and_warns(name, make, caplog):
    config = CONFIGS[name]
    size = count_params(config).total
    with caplog.at_level(logging.WARNING, "moe_jax"):
        plan = make_plan(make(config), config, total_params=size + 1)
    assert f"total_params = {size + 1:,}" in caplog.text
    assert f"{size:,}" in caplog.text
    assert planned_config(config, plan) == config
    caplog.clear()
    make_plan(make(config), config, total_params=size - 1)
    assert not caplog.text


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_budget_below_the_smallest_plan_names_both(scope):
    config = tiny_config("phimoe")
    smallest = total(config, make_plan(expert_scores(config), config, keep_experts=2))
    plan = make_plan(expert_scores(config), config, total_params=smallest, scope=scope)
    assert total(config, plan) == smallest
    with pytest.raises(ValueError, match=f"at least {smallest:,}, .*got {smallest - 1:,}$"):
        make_plan(expert_scores(config), config, total_params=smallest - 1, scope=scope)


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_bytes_are_those_of_all_weights(dtype, item):
    config = tiny_config()
    scores = neuron_scores(config)
    limit = count_params(config).total - 1000
    by_params = make_plan(scores, config, total_params=limit)
    by_bytes = make_plan(scores, config, total_bytes=limit * item, dtype=dtype)
    assert by_bytes.layers == by_params.layers
    assert by_bytes.settings["dtype"] == dtype
    with pytest.raises(ValueError, match=r"dtype must be one of .*got ''"):
        make_plan(scores, config, total_bytes=limit)


def test_groups_that_go_make_room_for_neurons():
    config = tiny_config("phimoe")
    groups = {i: np.arange(2.0) for i in range(config.num_layers)}
    limit = count_params(config).total - 1500
    plans = [
        make_plan(neuron_scores(config), config, total_params=limit, **cut)
        for cut in ({}, {"group_scores": groups, "kv_groups": 1})
    ]
    widths = [len(plan.layers[0].neurons[0]) for plan in plans]
    assert widths[1] > widths[0]
    assert all(total(config, plan) <= limit for plan in plans)


def test_deleting_experts_saves_little_of_what_a_token_reads():
    """Router rows alone; with novices in their place, nothing."""
    config = tiny_config()
    active = count_params(config).active
    plan = make_plan(expert_scores(config), config, active_params=active - 1, replacement="delete")
    assert {len(layer.deleted) for layer in plan.layers.values()} == {1}
    with pytest.raises(ValueError, match=f"at least {active:,}, .*got {active - 1:,}"):
        make_plan(expert_scores(config), config, active_params=active - 1)


def test_ties_within_a_budget_go_to_the_lower_layer_and_id():
    config = tiny_config()
    scores = {i: np.ones(EXPERTS) for i in config.moe_layers}
    one = 3 * config.width * EXPERT_WIDTH - config.width  # an expert's weights, less its novice's
    limit = count_params(config).total - 5 * one
    plan = make_plan(scores, config, total_params=limit, scope="global")
    assert {i: layer.novices for i, layer in plan.layers.items()} == {0: (5,), 1: (2, 3, 4, 5)}


@quick
@given(
    st.sampled_from(REPLACEMENTS),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([None, 3, 4]),
    st.sampled_from([None, 4, 5]),
    st.floats(0, 1),
    st.integers(0, 100),
)
def test_global_ranking_obeys_limits(replacement, align, least, most, share, seed):
    if align == 3 and least == 4:
        least = 3  # there is no multiple of three in [4, 5]
    config = tiny_config("qwen3_moe")
    scores = expert_scores(config, seed)
    options = {"scope": "global", "replacement": replacement, "align_experts": align}
    fewest = -(-(least or 2) // align) * align
    smallest = total(config, make_plan(scores, config, keep_experts=fewest, **options))
    limit = round(smallest + share * (count_params(config).total - smallest))
    options |= {"min_experts": least, "max_experts": most}
    plan = make_plan(scores, config, total_params=limit, **options)
    assert smallest <= total(config, plan) <= limit
    for i, ids in kept(config, plan).items():
        assert len(ids) % align == 0
        assert (least or 2) <= len(ids) <= (most or EXPERTS)
        assert ids == set(np.argsort(-scores[i])[: len(ids)].tolist())
        if replacement == "delete":
            assert planned_config(config, plan).moe(i).num_experts % align == 0


def test_aligned_experts_are_ranked_in_blocks():
    """Two and two: the pair with the higher mean stays, not the single highest expert."""
    config = tiny_config()
    scores = {0: np.array([9, 8, 7, 0, -1, -2.0]), 1: np.array([9, 8, 4, 4, -1, -2.0])}
    options = {"keep_experts": 3, "scope": "global", "replacement": "delete"}
    assert kept(config, make_plan(scores, config, **options)) == {0: {0, 1, 2}, 1: {0, 1, 2}}
    with pytest.raises(ValueError, match=r"kept experts must be a multiple of 2 .*got 3"):
        make_plan(scores, config, align_experts=2, **options)
    plan = make_plan(
        scores, config, total_params=total(config, make_plan(scores, config, **options)),
        scope="global", replacement="delete", align_experts=2,
    )  # fmt: skip
    assert kept(config, plan) == {0: {0, 1}, 1: {0, 1, 2, 3}}


@quick
@given(
    st.sampled_from([2, 3]),
    st.sampled_from([1, 2]),
    st.sampled_from(REPLACEMENTS),
    st.floats(0, 1),
    st.integers(0, 100),
)
def test_groups_of_ids_keep_equally_many_of_their_own_highest(
    num_groups, floor, replacement, share, seed
):
    config = tiny_config()
    scores = expert_scores(config, seed)
    options = {
        "scope": "group", "num_groups": num_groups, "min_per_group": floor,
        "replacement": replacement,
    }  # fmt: skip
    least = max(num_groups, num_groups * floor)
    smallest = total(config, make_plan(scores, config, keep_experts=least, **options))
    limit = round(smallest + share * (count_params(config).total - smallest))
    plan = make_plan(scores, config, total_params=limit, **options)
    assert total(config, plan) <= limit
    size = EXPERTS // num_groups
    for i, ids in kept(config, plan).items():
        each = len(ids) // num_groups
        assert each >= floor
        for group in range(num_groups):
            members = np.arange(group * size, (group + 1) * size)
            best = members[np.argsort(-scores[i][members])[:each]]
            assert ids & set(members.tolist()) == set(best.tolist())
    if each < size:
        more = make_plan(scores, config, keep_experts=(each + 1) * num_groups, **options)
        assert total(config, more) > limit


@pytest.mark.parametrize(
    ("ratio", "options", "expected"),
    [
        (0.6, {}, 4),  # 3.6
        (0.6, {"align_experts": 3}, 3),
        (0.8, {"align_experts": 3}, 6),
        (1.0, {"align_experts": 4}, 4),
        (0.9, {"scope": "group", "num_groups": 2}, 6),
        (0.5, {"scope": "group", "num_groups": 2}, 4),  # 1.5 of each, to the even one
        (0.5, {"scope": "group", "num_groups": 2, "align_experts": 3}, 6),
    ],
)
def test_shares_round_to_numbers_that_can_be_kept(ratio, options, expected):
    config = tiny_config()
    plan = make_plan(expert_scores(config), config, keep_ratio=ratio, **options)
    assert {len(ids) for ids in kept(config, plan).values()} == {expected}


@quick
@given(st.integers(1, 4), st.integers(4, EXPERT_WIDTH), st.integers(0, 100))
def test_widths_across_a_layer_obey_limits(least, most, seed):
    config = tiny_config()
    scores = neuron_scores(config, seed)
    plan = make_plan(
        scores, config, expert_width=4, neuron_scope="layer", min_width=least, max_width=most
    )
    for i, layer in plan.layers.items():
        sizes = [len(neurons) for neurons in layer.neurons.values()]
        assert sum(sizes) == 4 * EXPERTS
        assert least <= min(sizes) <= max(sizes) <= most
        for e, neurons in layer.neurons.items():
            assert set(neurons) == set(np.argsort(-scores[i][e])[: len(neurons)].tolist())


def test_widths_within_a_budget_obey_limits():
    config = tiny_config()
    scores, size = neuron_scores(config), count_params(config).total
    plan = make_plan(scores, config, total_params=size, max_width=7, round_to=3)
    assert len(plan.layers[0].neurons[0]) == 6
    with pytest.raises(ValueError, match="total_params must be at least"):
        make_plan(scores, config, total_params=size - 2000, min_width=7)
    with pytest.raises(ValueError, match=r"round_to = 5 must have a multiple in \[6, 7\]"):
        make_plan(scores, config, total_params=size, min_width=6, max_width=7, round_to=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_params": 9000, "keep_ratio": 0.5}, "exactly one of .*got .*keep_ratio"),
        ({"total_params": 9000, "active_params": 9000}, "exactly one of"),
        (
            {"expert_width": 4},
            r"one of .*experts \[E\].*, got \['expert_width'\]",
        ),
        ({"keep_experts": 4, "min_experts": 5}, r"must be in \[5, 6\], .*got 4"),
        ({"keep_experts": 4, "max_experts": 3}, r"must be in \[2, 3\], .*got 4"),
        ({"keep_experts": 4, "max_experts": 1}, r"in \[2, 1\] .*max_experts = 1"),
        ({"keep_experts": 4, "min_experts": 7}, r"in \[7, 6\] \(min_experts = 7"),
        ({"keep_experts": 4, "align_experts": 0}, "align_experts must be at least 1, got 0"),
        ({"keep_experts": 4, "align_experts": 7}, "multiple of 7"),
        ({"keep_experts": 5, "align_experts": 2}, "multiple of 2 .*got 5"),
        ({"keep_experts": 4, "scope": "group"}, "num_groups goes with scope 'group'"),
        ({"keep_experts": 4, "num_groups": 2}, "num_groups = 2 needs scope 'group'"),
        ({"keep_experts": 4, "min_per_group": 2}, "min_per_group = 2 needs scope 'group'"),
        ({"keep_experts": 4, "scope": "group", "num_groups": 4}, "must divide its 6 experts"),
        ({"keep_experts": 3, "scope": "group", "num_groups": 2}, "multiple of 2 .*got 3"),
        (
            {"keep_experts": 2, "scope": "group", "num_groups": 2, "min_per_group": 2},
            r"must be in \[4, 6\], in steps of 2, .*got 2",
        ),
        ({"keep_experts": 4, "scope": "global", "min_experts": 5}, r"in \[10, 12\].*got 8"),
        (
            {"keep_experts": 4, "min_width": 2},
            "min_width = 2 needs a ranking of neurons.*got scores of experts",
        ),
    ],
    ids=str,
)
def test_impossible_limits_are_named(arguments, message):
    config = tiny_config()
    with pytest.raises(ValueError, match=message):
        make_plan(expert_scores(config), config, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"expert_width": 4, "min_experts": 2},
            "min_experts = 2 needs a ranking of experts, got scores of neurons",
        ),
        ({"keep_ratio": 0.5}, r"exactly one of .*scores of neurons \[E, F\]"),
        ({"expert_width": 4, "min_width": 5}, r"must be in \[5, 8\] by min_width"),
        ({"expert_width": 4, "min_width": 5, "max_width": 4}, "in order, got 5 and 4"),
        ({"expert_width": 4, "max_width": 9}, r"must be in \[1, 8\] .*got 1 and 9"),
    ],
    ids=str,
)
def test_impossible_limits_of_widths_are_named(arguments, message):
    config = tiny_config()
    with pytest.raises(ValueError, match=message):
        make_plan(neuron_scores(config), config, **arguments)


def test_a_budget_needs_something_to_remove():
    config = tiny_config("phimoe")
    groups = {i: np.arange(2.0) for i in range(config.num_layers)}
    with pytest.raises(ValueError, match="total_params needs scores, got none"):
        make_plan(None, config, group_scores=groups, kv_groups=1, total_params=9000)


def test_groups_keep_no_more_than_the_one_with_most_novices_has():
    config = tiny_config().replace_moe(1, novice_ids=(4, 5))
    options = {"scope": "group", "num_groups": 2}
    scores = expert_scores(config)
    with pytest.raises(ValueError, match=r"layer 1: kept experts must be in \[2, 2\], .*got 4"):
        make_plan(scores, config, keep_experts=4, **options)
    plan = make_plan(scores, config, total_params=count_params(config).total, **options)
    assert kept(config, plan) == {0: set(range(6)), 1: {int(scores[1][:3].argmax()), 3}}


@pytest.mark.parametrize(
    "options", [{"align_experts": 2}, {"scope": "group", "num_groups": 2}], ids=str
)
def test_older_novices_can_stand_in_the_way_of_aligned_router_rows(options):
    config = tiny_config().replace_moe(1, novice_ids=(5,))
    scores = expert_scores(config)
    with pytest.raises(ValueError, match="layer 1: its 1 novices stay as router rows"):
        make_plan(scores, config, keep_experts=4, replacement="delete", **options)
    plan = make_plan(scores, config, keep_experts=4, **options)
    assert {len(ids) for ids in kept(config, plan).values()} == {4}


def qwen3_30b() -> ModelConfig:
    layer = LayerConfig(32, 4, MoeConfig(128, 8, 768))
    return ModelConfig(
        family="qwen3_moe", vocab_size=151_936, width=2048, layers=(layer,) * 48,
        attention=GroupedQueryAttention(128, qk_norm="head"),
    )  # fmt: skip


def olmoe_7b() -> ModelConfig:
    layer = LayerConfig(16, 16, MoeConfig(64, 8, 1024))
    return ModelConfig(
        family="olmoe", vocab_size=50_304, width=2048, layers=(layer,) * 16,
        attention=GroupedQueryAttention(128, qk_norm="full"),
    )  # fmt: skip


def phi_3_5_moe() -> ModelConfig:
    return model_config(json.loads((FIXTURES / "phi_3_5_moe.json").read_text()))


@pytest.mark.parametrize("model", [qwen3_30b, olmoe_7b, phi_3_5_moe])
@pytest.mark.parametrize(
    "options", [{}, {"scope": "global"}, {"scope": "global", "replacement": "delete"}], ids=str
)
def test_real_sizes_from_configurations_alone(model, options):
    config = model()
    scores = expert_scores(config)
    limit = int(count_params(config).total * 0.7)
    start = time.perf_counter()
    plan = make_plan(scores, config, total_params=limit, **options)
    assert time.perf_counter() - start < 60  # well below a second on an idle core
    one_more = 3 * config.width * config.moe(0).expert_width + config.width
    layers = 1 if options else config.num_layers
    assert limit - one_more * layers < total(config, plan) <= limit


def test_the_published_width_of_phi_mini_moe_follows_from_its_size():
    config = phi_3_5_moe()
    plan = make_plan(neuron_scores(config), config, total_params=7_647_632_704, round_to=64)
    assert planned_config(config, plan).moe(0).expert_width == 960
    assert total(config, plan) == 7_647_632_704
