"""Plans whose experts keep different numbers of neurons: how many, which, and what they leave."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import EXPERT_WIDTH, EXPERTS, neuron_masks, tiny_model, token_batches

from moe_jax import apply_plan, calibrate, forward, make_plan, score
from moe_jax.params import count_params
from moe_jax.plan import Cut, LayerPlan, Plan, neuron_prices, plan_cut, planned_config
from moe_jax.plan.share_out import few_widths, share_out, totals
from moe_jax.repair import RIDGE


@pytest.fixture(scope="module")
def measured():
    params, config = tiny_model()
    stats = calibrate(params, config, token_batches(6, 8, 24), second_moments=True)
    return params, config, stats, score(stats, "obs", model=(params, config))


@pytest.mark.parametrize("price", [np.ones(3), np.array([0.5, 1.0, 2.0])])
@pytest.mark.parametrize("budget", [3.0, 6.0, 7.5, 12.0])
def test_no_other_widths_of_that_cost_are_worth_more(price, budget):
    rng = np.random.default_rng(0)
    worth = -np.sort(-rng.random((3, 6)), axis=1)
    levels = [0, 2, 4, 6]
    total = totals(worth)
    widths = share_out(total, np.tile(levels, (3, 1)), price, budget)
    spent = widths @ price
    assert spent <= budget
    best = max(
        total[range(3), np.array(other)].sum()
        for other in itertools.product(levels, repeat=3)
        if np.array(other) @ price <= spent + 1e-9
    )
    assert total[range(3), widths].sum() == pytest.approx(best)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 1000),
    st.integers(1, 4),
    st.floats(0.1, 1.0),
    st.sampled_from([(0, 2, 4, 6, 8), (1, 2, 3, 4, 5, 6, 7, 8)]),
)
def test_few_widths_keep_to_their_number_and_budget(seed, most, share, levels):
    worth = -np.sort(-np.random.default_rng(seed).exponential(size=(7, 8)), axis=1)
    price, budget = np.ones(7), share * 56
    total, choices = totals(worth), np.tile(levels, (7, 1))
    widths = few_widths(total, choices, price, budget, most)
    assert len({*widths.tolist()} - {0}) <= max(most, 1 + (levels[0] > 0))
    assert set(widths.tolist()) <= set(levels)
    assert widths.sum() <= max(budget + 1e-6, 7 * levels[0])
    assert (
        few_widths(total, choices, price, budget, 99) == share_out(total, choices, price, budget)
    ).all()


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_the_dearest_neurons_stay(measured, scope):
    _, config, _, scores = measured
    plan = make_plan(
        scores, config, width_ratio=0.5, neuron_scope=scope, own_widths=True, max_buckets=99
    )
    smaller = planned_config(config, plan)
    assert count_params(smaller).experts <= count_params(config).experts / 2 + EXPERTS * 16
    groups = [[i] for i in plan.layers] if scope == "layer" else [list(plan.layers)]
    for group in groups:
        kept, lost = [], []
        for i in group:
            layer = plan.layers[i]
            assert set(layer.novices) == set(range(EXPERTS)) - set(layer.neurons)
            for e in range(EXPERTS):
                stays = np.isin(np.arange(EXPERT_WIDTH), layer.neurons.get(e, ()))
                kept += scores[i][e][stays].tolist()
                lost += scores[i][e][~stays].tolist()
        assert len(kept) == EXPERTS * EXPERT_WIDTH * len(group) // 2
        assert min(kept) >= max(lost)


def test_widths_are_few_multiples_within_limits(measured):
    _, config, _, scores = measured
    plan = make_plan(
        scores, config, width_ratio=0.6, neuron_scope="layer", own_widths=True, round_to=2,
        max_buckets=2, min_width=2, max_width=6,
    )  # fmt: skip
    for i in plan.layers:
        widths = {len(kept) for kept in plan.layers[i].neurons.values()}
        assert widths <= {2, 4, 6}
        assert len(widths) <= 2
        assert not plan.layers[i].novices
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("constants", [False, True])
@pytest.mark.parametrize("neurons", [{"own_widths": True, "neuron_scope": "model"}, {}])
def test_budgets_count_constants_and_are_nearly_used(measured, constants, neurons):
    _, config, _, scores = measured
    limit = count_params(config).total * 3 // 4
    plan = make_plan(scores, config, total_params=limit, constants=constants, **neurons)
    found = count_params(planned_config(config, plan)).total
    step = 3 * config.width * (1 if neurons else 2 * EXPERTS)
    assert limit - step - 100 <= found <= limit


def test_prices_by_routing_leave_less_work(measured):
    _, config, stats, scores = measured
    chosen = {i: stats.layers[i]["count"] for i in config.moe_layers}

    def work(active_share):
        plan = make_plan(
            scores, config, width_ratio=0.5, neuron_scope="model", own_widths=True,
            max_buckets=99, neuron_prices=neuron_prices(stats, active_share),
        )  # fmt: skip
        return sum(
            chosen[i][e] * len(kept)
            for i, layer in plan.layers.items()
            for e, kept in layer.neurons.items()
        )

    full = sum(count.sum() for count in chosen.values()) * EXPERT_WIDTH
    assert work(1.0) <= full / 2 < work(0.0)
    assert work(1.0) <= work(0.5) <= work(0.0)


def test_cut_equals_masks(measured):
    params, config, stats, scores = measured
    plan = make_plan(
        scores, config, width_ratio=0.5, neuron_scope="layer", own_widths=True, min_width=1
    )
    smaller, cut = apply_plan(params, config, plan, stats)
    assert all(smaller.moe(i).expert_widths for i in smaller.moe_layers)
    tokens = token_batches(1)[0]["tokens"]
    masked = forward(params, config, tokens, neuron_masks=neuron_masks(plan))[0]
    np.testing.assert_allclose(forward(cut, smaller, tokens)[0], masked, rtol=0, atol=2e-5)


def test_constants_join_the_least_squares_in_float64(measured):
    params, config, stats, _ = measured
    kept = {0: (1, 2, 5), 2: (0, 7), 3: (3,), 4: tuple(range(EXPERT_WIDTH)), 5: (0, 1, 2, 6)}
    layer = LayerPlan(
        novices=(1,), novice_value="least_squares", neurons=kept, own_widths=True, repair=True,
        constants=True,
    )  # fmt: skip
    smaller, cut = apply_plan(params, config, Plan({0: layer}), stats)
    moe, weights = smaller.moe(0), cut["layers"][0]["moe"]
    down = np.asarray(params["layers"][0]["moe"]["experts"]["down"], np.float64)
    for e, neurons in {**kept, 1: ()}.items():
        gram = stats.layers[0]["hidden_gram"][e].astype(np.float64)
        gram = gram + RIDGE * np.diag(np.diag(gram))
        stays = [*neurons, EXPERT_WIDTH]
        gone = sorted(set(range(EXPERT_WIDTH)) - set(neurons))
        target = np.concatenate([down[e], np.zeros((1, config.width))])
        change = np.linalg.solve(
            gram[np.ix_(stays, stays)], gram[np.ix_(stays, gone)] @ target[gone]
        )
        expected = target[stays] + change
        if e == 1:
            np.testing.assert_allclose(weights["novices"]["constant"][0], expected[-1], atol=2e-5)
            continue
        place = moe.expert_ids.index(e)
        bucket = next(b for b in range(len(moe.buckets)) if e in moe.buckets[b].expert_ids)
        row = moe.buckets[bucket].expert_ids.index(e)
        got = np.asarray(weights["experts"][bucket]["down"][row])
        np.testing.assert_allclose(got, expected[:-1], atol=2e-4)
        np.testing.assert_allclose(weights["expert_bias"][place], expected[-1], atol=2e-4)


def test_constants_without_repair_are_means_of_what_goes(measured):
    params, config, stats, _ = measured
    neurons = dict.fromkeys(range(EXPERTS), (0, 3, 4))
    plan = Plan({0: LayerPlan(neurons=neurons, constants=True)})
    smaller, cut = apply_plan(params, config, plan, stats)
    assert smaller.moe(0).expert_bias
    assert not smaller.moe(0).expert_widths
    down = np.asarray(params["layers"][0]["moe"]["experts"]["down"], np.float64)
    means = stats.layers[0]["neuron_mean"].astype(np.float64)
    gone = [1, 2, 5, 6, 7]
    expected = np.einsum("ef,efd->ed", means[:, gone], down[:, gone])
    np.testing.assert_allclose(cut["layers"][0]["moe"]["expert_bias"], expected, atol=1e-5)


def test_keeping_everything_changes_nothing(measured):
    params, config, stats, scores = measured
    plan = make_plan(
        scores, config, width_ratio=1.0, neuron_scope="model", own_widths=True, repair=True,
        constants=True,
    )  # fmt: skip
    smaller, cut = apply_plan(params, config, plan, stats)
    tokens = token_batches(1)[0]["tokens"]
    assert smaller == config.replace_moe(0, expert_bias=True).replace_moe(1, expert_bias=True)
    np.testing.assert_allclose(
        forward(cut, smaller, tokens)[0], forward(params, config, tokens)[0], rtol=0, atol=2e-5
    )


def test_a_second_cut_of_different_widths(measured):
    params, config, stats, scores = measured
    options = {"neuron_scope": "model", "own_widths": True, "repair": True, "constants": True}
    plan = make_plan(scores, config, width_ratio=0.6, **options)
    smaller, cut = apply_plan(params, config, plan, stats)
    again = calibrate(cut, smaller, token_batches(6, 8, 24), second_moments=True)
    for i in smaller.moe_layers:
        moe, layer = smaller.moe(i), again.layers[i]
        past = (
            np.arange(moe.expert_width)
            >= np.array([moe.width_of(e) for e in range(EXPERTS)])[:, None]
        )
        assert not layer["neuron_mean"][past].any()
    second = make_plan(
        score(again, "obs", model=(cut, smaller)), smaller, width_ratio=0.5, **options
    )
    least, weights = apply_plan(cut, smaller, second, again)
    assert count_params(least).experts < 0.55 * count_params(smaller).experts
    logits, _ = forward(weights, least, token_batches(1)[0]["tokens"])
    assert np.isfinite(logits).all()


def test_order_of_experts_does_not_matter(measured):
    params, config, *_ = measured
    order = np.array([3, 1, 5, 0, 2, 4])
    moved = jax.tree.map(lambda leaf: leaf, params)
    for layer in moved["layers"]:
        moe = layer["moe"]
        moe["experts"] = {name: leaf[order] for name, leaf in moe["experts"].items()}
        moe["router"] = {"kernel": moe["router"]["kernel"][:, order]}
    batches = token_batches(6, 8, 24)
    results = []
    for weights in (params, moved):
        found = calibrate(weights, config, batches, second_moments=True)
        scores = score(found, "obs", model=(weights, config))
        plan = make_plan(
            scores, config, width_ratio=0.5, neuron_scope="model", own_widths=True, repair=True,
            constants=True, round_to=2,
        )  # fmt: skip
        smaller, cut = apply_plan(weights, config, plan, found)
        results.append(np.asarray(forward(cut, smaller, batches[0]["tokens"])[0]))
    np.testing.assert_allclose(*results, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"own_widths": True}, "'layer', 'model' or 'layer_width'"),
        ({"neuron_scope": "model"}, "needs own_widths"),
        ({"neuron_prices": {}}, "needs own_widths"),
        ({"own_widths": True, "neuron_scope": "layer", "max_buckets": 0}, "max_buckets"),
        ({"own_widths": True, "neuron_scope": "layer", "round_to": 9, "max_width": 7}, "multiple"),
        ({"neuron_scope": "everything"}, "'everything'"),
    ],
)
def test_what_does_not_go_together(measured, options, message):
    _, config, _, scores = measured
    with pytest.raises(ValueError, match=message):
        make_plan(scores, config, width_ratio=0.5, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"own_widths": True}, "own_widths needs neuron_scope"),
        ({"neuron_scope": "model"}, "needs own_widths"),
        ({"active_share": 0.5}, "active_share"),
        ({"own_widths": True, "neuron_scope": "layer", "active_share": 1.5}, r"\[0, 1\]"),
    ],
)
def test_stages_refuse_what_does_not_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        Cut.from_dict({"method": "obs", "width_ratio": 0.5, **fields}, "stages[0]")


def test_a_stage_across_the_model(measured):
    params, config, stats, _ = measured
    fields = {"neuron_scope": "model", "own_widths": True, "constants": True, "active_share": 0.5}
    stage = Cut.from_dict({"method": "obs", "width_ratio": 0.5, **fields}, "stages[0]")
    plan = plan_cut(stage, stats, config, params=params).plan
    assert all(
        layer.own_widths and layer.constants and layer.repair for layer in plan.layers.values()
    )
    smaller, _ = apply_plan(params, config, plan, stats)
    assert any(smaller.moe(i).expert_widths for i in smaller.moe_layers)
