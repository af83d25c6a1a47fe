"""Plans told the mesh that their result will lie on: sizes divide, and the price is said."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import EXPERT_WIDTH, EXPERTS, tiny_config

from moe_jax import make_plan
from moe_jax.params import count_params
from moe_jax.plan import Cut, Plan, Planned, mesh_cost, plan_ranked, planned_config
from moe_jax.plan.share_out import few_widths, totals
from moe_jax.plan.widths import _in_teams, _Pool
from moe_jax.processes import make_mesh, spec_tree
from moe_jax.statistics import Stats

MESH = {"expert": 2, "tensor": 2}
CONFIG = dataclasses.replace(tiny_config("olmoe"), vocab_size=64)


def random_scores(seed: int, *shape: int) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {i: rng.exponential(size=shape) for i in CONFIG.moe_layers}


def planned_for(fields: dict[str, Any]) -> Plan:
    cut = Cut.from_dict(fields)
    shape = (EXPERTS,) if cut.ranks == "experts" else (EXPERTS, EXPERT_WIDTH)
    return plan_ranked(cut, CONFIG, Planned(Plan({}, ""), random_scores(0, *shape)))


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 1000),
    st.sampled_from(["delete", "novice"]),
    st.sampled_from(["layer", "global"]),
    st.floats(0.5, 1.0),
)
def test_kept_experts_divide(seed, replacement, scope, ratio):
    scores = random_scores(seed, EXPERTS)
    plan = make_plan(
        scores, CONFIG, keep_ratio=ratio, replacement=replacement, scope=scope, mesh=MESH
    )
    smaller = planned_config(CONFIG, plan)
    spec_tree(smaller, make_mesh(MESH))  # refuses what does not divide
    assert all(len(smaller.moe(i).expert_ids) % 2 == 0 for i in smaller.moe_layers)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 1000),
    st.sampled_from(
        [
            {"neuron_scope": "model", "own_widths": True},
            {"neuron_scope": "model", "own_widths": True, "max_buckets": 1},
            {"neuron_scope": "layer", "own_widths": True, "active_share": 0.5},
            {"neuron_scope": "layer_width", "own_widths": True},
            {"neuron_scope": "layer_width"},
            {"neuron_scope": "layer"},
            {},
        ]
    ),
    st.floats(0.25, 1.0),
)
def test_widths_and_the_experts_of_each_divide(seed, fields, ratio):
    cut = Cut("slim", width_ratio=ratio, mesh=MESH, **fields)
    cut.check()
    scores = random_scores(seed, EXPERTS, EXPERT_WIDTH)
    prices = None
    if cut.active_share:
        prices = {i: values.mean(1) for i, values in scores.items()}
    plan = plan_ranked(cut, CONFIG, Planned(Plan({}, "slim"), scores), prices)
    smaller = planned_config(CONFIG, plan)
    spec_tree(smaller, make_mesh(MESH))
    assert len({*smaller.moe(0).expert_widths}) <= cut.max_buckets
    if cut.neuron_scope == "model":
        whole = count_params(CONFIG).experts
        # One team that keeps the narrowest width is the least that a layer can have.
        least = len(CONFIG.moe_layers) * 2 * 2 * 3 * CONFIG.width
        assert count_params(smaller).experts <= ratio * whole * (1 + 1e-9) + least


def test_a_budget_is_kept_with_a_mesh():
    limit = int(count_params(CONFIG).total * 0.8)
    for scores, fields in (
        (random_scores(0, EXPERTS), {"replacement": "delete"}),
        (random_scores(0, EXPERTS, EXPERT_WIDTH), {"neuron_scope": "model", "own_widths": True}),
    ):
        plan = make_plan(scores, CONFIG, total_params=limit, mesh=MESH, **fields)
        smaller = planned_config(CONFIG, plan)
        spec_tree(smaller, make_mesh(MESH))
        assert count_params(smaller).total <= limit


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(4, 7), st.floats(0.2, 1.0))
def test_teams_are_equally_wide_and_near_the_best(seed, experts, share):
    """Against all ways to pair experts and to give each pair one of three widths."""
    rng = np.random.default_rng(seed)
    worth = -np.sort(-rng.exponential(size=(experts, 4)), axis=1)
    choices = np.tile([0, 2, 4], (experts, 1))
    one = np.ones(experts)
    pool = _Pool(np.zeros(experts, int), one.astype(int) * 4, one, totals(worth), choices, one > 0)
    budget = share * experts * 4
    alone = few_widths(pool.total, choices, one, budget, 9)
    teams, team_of = _in_teams(pool, alone, 2)
    widths = few_widths(teams.total, teams.choices, teams.price, budget, 9)[team_of]
    assert all(count % 2 == 0 for width, count in collections.Counter(widths).items() if width)
    spent = widths.sum()
    assert spent <= budget
    best = max(
        pool.total[range(experts), other].sum()
        for other in map(np.array, itertools.product([0, 2, 4], repeat=experts))
        if other.sum() <= spent
        and all(n % 2 == 0 for w, n in collections.Counter(other.tolist()).items() if w)
    )
    assert pool.total[range(experts), widths].sum() >= 0.85 * best


def test_teams_of_one_change_nothing():
    scores = random_scores(3, EXPERTS, EXPERT_WIDTH)
    fields = {"width_ratio": 0.5, "neuron_scope": "model", "own_widths": True}
    without = make_plan(scores, CONFIG, **fields)
    assert make_plan(scores, CONFIG, mesh={"data": 4}, **fields).layers == without.layers


def test_experts_that_are_left_over_become_novices():
    scores = random_scores(0, EXPERTS, EXPERT_WIDTH)
    fields = {"width_ratio": 0.6, "neuron_scope": "model", "own_widths": True}
    size = 4
    assert EXPERTS % size
    plan = make_plan(scores, CONFIG, mesh={"expert": size}, **fields)
    for layer in plan.layers.values():
        assert len(layer.novices) >= EXPERTS % size
        widths = collections.Counter(map(len, layer.neurons.values()))
        assert all(count % size == 0 for count in widths.values())
    with pytest.raises(ValueError, match=rf"multiple of 4 .*got {EXPERTS} experts.*min_width = 4"):
        make_plan(scores, CONFIG, mesh={"expert": size}, min_width=4, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_experts": 3, "mesh": MESH}, "multiple of 2 .*got 3"),
        ({"expert_width": 3, "mesh": MESH}, "multiple of .* = 2.*got 3"),
        ({"kv_groups": 1, "mesh": MESH}, "kv_groups must be a multiple of .* = 2, got 1"),
        ({"keep_ratio": 0.5, "mesh": {"experts": 2}}, "axes among .*'expert'.*got .*'experts'"),
        ({"keep_ratio": 0.5, "mesh": {"expert": 0}}, "positive sizes .*got .*0"),
        ({"drop_layers": 1, "mesh": MESH}, "mesh .*needs a ranking of experts or neurons"),
    ],
)
def test_what_does_not_divide_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        planned_for(fields)


def test_what_the_mesh_costs_is_counted():
    scores = random_scores(0, EXPERTS)
    cut = Cut("mone", keep_ratio=0.75, replacement="delete", mesh={"expert": 4})
    found = plan_ranked(cut, CONFIG, Planned(Plan({}, "mone"), scores))
    planned = Planned(found, scores)
    text = mesh_cost(cut, planned, Stats({}, 0, 0, 0), CONFIG)
    free = make_plan(scores, CONFIG, keep_ratio=0.75, replacement="delete")
    sizes = [count_params(planned_config(CONFIG, plan)).total for plan in (found, free)]
    assert f"{sizes[0]:,} parameters, {sizes[0] / sizes[1] - 1:+.2%}" in text
    lost = [
        sum(scores[i][list(plan.layers[i].deleted)].sum() for i in plan.layers)
        / sum(values.sum() for values in scores.values())
        for plan in (found, free)
    ]
    assert f"{lost[0]:.2%} of all scores go instead of {lost[1]:.2%}" in text
    assert mesh_cost(dataclasses.replace(cut, mesh={}), planned, Stats({}, 0, 0, 0), CONFIG) == ""
