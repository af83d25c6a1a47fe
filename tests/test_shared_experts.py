"""Shared experts that lose neurons: which go, what makes up for them, and what loads the result."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from family_cuts import export_error
from models import EXPERT_WIDTH, EXPERTS, SHARED_WIDTH, tiny_config, token_batches
from tiny_hf import save_tiny

from moe_jax import apply_plan, calibrate, forward, make_plan, score
from moe_jax.calibrate import Measurement, calibrate_domains, plan_second_moments
from moe_jax.model import init_params
from moe_jax.params import count_params
from moe_jax.plan import Cut, LayerPlan, Plan, foreseen, plan_cut, planned_config
from moe_jax.processes import make_mesh, spec_tree
from moe_jax.prune.sequential import sequential_cut
from moe_jax.repair import RIDGE
from moe_jax.scoring import MODEL_CRITERIA, NEURON_CRITERIA
from moe_jax.statistics_table import requested_bytes

FAMILY = "qwen2_moe"
KEPT = 4
MEASURED = {"importance": ("lm",), "second_moments": True, "shared_moments": True}


@pytest.fixture(scope="module")
def measured():
    config = tiny_config(FAMILY, vocab_size=64)
    params = init_params(config, jax.random.key(0))
    return params, config, calibrate(params, config, token_batches(), warn=False, **MEASURED)


def greedy_costs(gram, down):
    """OBS one after the other in float64: the running maximum of what each removal costs."""
    gram = gram.astype(np.float64)
    gram = gram + RIDGE * np.diag(np.diag(gram))
    left, weights, costs, highest = list(range(len(down))), down.astype(np.float64), {}, 0.0
    while left:
        inverse = np.linalg.inv(gram[np.ix_(left, left)])
        each = (weights[left] ** 2).sum(1) / np.diag(inverse)
        n = int(each.argmin())
        highest = max(highest, each[n])
        costs[left[n]] = highest
        weights[left] -= np.outer(inverse[:, n] / inverse[n, n], weights[left[n]])
        del left[n]
    return np.array([costs[j] for j in range(len(down))])


def test_costs_are_those_of_removal_one_after_the_other(measured):
    params, config, stats = measured
    found = score(stats, "obs", of="shared", model=(params, config))
    energy = score(stats, "energy", of="shared", model=(params, config))
    for i in config.moe_layers:
        gram = stats.layers[i]["shared_hidden_gram"][0, :-1, :-1]
        down = np.asarray(params["layers"][i]["moe"]["shared"]["down"])
        np.testing.assert_allclose(found[i], greedy_costs(gram, down), rtol=2e-3)
        np.testing.assert_allclose(energy[i], np.diag(gram) * (down**2).sum(1), rtol=1e-5)


def test_every_criterion_of_neurons_ranks_them(measured):
    params, config, stats = measured
    arrays = {n: a.astype(np.float64)[0] for n, a in stats.layers[0].items() if "shared_" in n}
    square = arrays["shared_gated_energy"]
    gradient = arrays["lm.shared_gradient_square"]
    tokens = stats.tokens
    expected = {
        "wanda": np.sqrt(square) * arrays["shared_down_sum"],
        "camera": arrays["shared_down_norm"] ** 2
        * (0.1 * square + 0.9 * arrays["shared_gated_peak"] ** 2),
        "heapr": square / tokens * gradient / tokens,
        "token_fisher": arrays["lm.shared_token_square"],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(score(stats, name, of="shared")[0], values, rtol=1e-4)
    for name, criterion in (NEURON_CRITERIA | MODEL_CRITERIA).items():
        if not criterion.loss.startswith("kd"):
            found = score(stats, name, of="shared", model=(params, config))
            assert found.keys() == set(config.moe_layers)
            assert {values.shape for values in found.values()} == {(SHARED_WIDTH,)}


def test_sliced_computes_what_masked_does(measured):
    params, config, stats = measured
    cut = Cut.from_dict({"method": "token_fisher", "shared_width": KEPT})
    planned = plan_cut(cut, stats, config)
    plan = Plan.from_json(planned.plan.to_json())
    assert plan == planned.plan
    small, weights = apply_plan(params, config, plan)
    assert small == planned_config(config, plan) == foreseen(cut, config)
    assert {small.moe(i).shared.width for i in small.moe_layers} == {KEPT}
    masked = {**params, "layers": list(params["layers"])}
    for i, layer in plan.layers.items():
        best = np.argsort(-planned.shared_scores[i])[:KEPT]
        assert layer.shared_neurons == tuple(sorted(best.tolist()))
        moe, stays = masked["layers"][i]["moe"], np.isin(np.arange(SHARED_WIDTH), best)
        shared = {**moe["shared"], "down": moe["shared"]["down"] * stays[:, None]}
        masked["layers"][i] = {**masked["layers"][i], "moe": {**moe, "shared": shared}}
    tokens = token_batches(1)[0]["tokens"]
    found, expected = (forward(*m, tokens)[0] for m in ((weights, small), (masked, config)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_repair_is_the_least_squares_solution(measured):
    params, config, stats = measured
    cut = Cut.from_dict({"method": "obs", "width_ratio": 0.5, "shared_width": KEPT})
    plan = plan_cut(cut, stats, config, params=params).plan
    _, weights = apply_plan(params, config, plan, stats)
    for i, layer in plan.layers.items():
        assert len(layer.neurons[0]) == EXPERT_WIDTH // 2
        gram = stats.layers[i]["shared_hidden_gram"][0, :-1, :-1].astype(np.float64)
        down = np.asarray(params["layers"][i]["moe"]["shared"]["down"], np.float64)
        kept = list(layer.shared_neurons)
        gone = [j for j in range(SHARED_WIDTH) if j not in kept]
        own = gram[np.ix_(kept, kept)]
        own = own + RIDGE * np.diag(np.diag(own))
        expected = down[kept] + np.linalg.solve(own, gram[np.ix_(kept, gone)] @ down[gone])
        found = weights["layers"][i]["moe"]["shared"]["down"]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
        assert np.abs(expected - down[kept]).max() > 0.05
    with pytest.raises(ValueError, match=r"shared_moments=True.*no shared_hidden_gram"):
        apply_plan(params, config, plan, stats.without_requested())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_one_ranking_keeps_what_is_worth_most_for_its_price(measured, share):
    _, config, stats = measured
    cut = Cut.from_dict(
        {
            "method": "token_fisher", "neuron_scope": "model", "own_widths": True,
            "rank_shared": True, "width_ratio": 0.5, "max_buckets": 99, "active_share": share,
        }
    )  # fmt: skip
    planned = plan_cut(cut, stats, config)
    kept, lost, spent, whole = [], [], 0.0, 0.0
    for i, layer in planned.plan.layers.items():
        count = stats.layers[i]["count"]
        prices = 1 - share + share * count / count.mean()
        rows = [(planned.scores[i][e], layer.neurons.get(e, ()), max(prices[e], 1e-3))
                for e in range(EXPERTS)]  # fmt: skip
        # Every token runs through it: three times as many as through one of six, two of them
        # chosen.
        rows += [(planned.shared_scores[i], layer.shared_neurons, 1 + 2 * share)]
        for values, neurons, price in rows:
            stays = np.isin(np.arange(len(values)), neurons)
            kept += (values[stays] / price).tolist()
            lost += (values[~stays] / price).tolist()
            spent, whole = spent + price * len(neurons), whole + price * len(values)
    assert min(kept) >= max(lost)
    assert whole / 2 - 3 < spent <= whole / 2 + 1e-6


@pytest.mark.parametrize("scope", ["layer", "model", "layer_width"])
def test_one_ranking_keeps_to_budgets(measured, scope):
    _, config, stats = measured
    limit = count_params(config).total * 3 // 5
    cut = Cut.from_dict(
        {
            "method": "token_fisher", "neuron_scope": scope, "own_widths": True,
            "rank_shared": True, "total_params": limit,
        }
    )  # fmt: skip
    plan = plan_cut(cut, stats, config).plan
    small = planned_config(config, plan)
    assert 0.95 * limit < count_params(small).total <= limit
    assert all(1 <= small.moe(i).shared.width <= SHARED_WIDTH for i in small.moe_layers)
    assert any(small.moe(i).shared.width < SHARED_WIDTH for i in small.moe_layers)
    assert foreseen(cut, config).moe(0).shared.width < SHARED_WIDTH


def test_a_cut_in_turn_starts_as_one_pass_does(measured):
    params, config, _ = measured
    domains = {"one": token_batches(3), "other": token_batches(2, seed=1)}
    cut = Cut("obs", expert_width=4, shared_width=KEPT)
    found = sequential_cut(params, config, domains, cut, keep_second_moments=True)
    wanted = Measurement(second_moments=True, shared_moments=True)
    stats = calibrate_domains(params, config, domains, wanted)
    for name, array in stats.layers[0].items():
        np.testing.assert_array_equal(found.stats.layers[0][name], array, err_msg=name)
    plan = plan_cut(cut, stats, config, params=params).plan
    assert found.plan.layers[0] == plan.layers[0]
    assert "shared_removal_cost" in found.stats.layers[1]
    small, weights = apply_plan(params, config, found.plan, found.stats)
    assert small == found.config
    jax.tree.map(np.testing.assert_array_equal, weights, found.params)


def test_a_sharded_model_is_measured_and_cut_alike(measured):
    params, config, stats = measured
    mesh = make_mesh({"data": 2, "tensor": 2})
    placed = jax.device_put(params, spec_tree(config, mesh))
    found = calibrate(placed, config, token_batches(), warn=False, **MEASURED)
    for name, array in found.layers[0].items():
        if "shared_" in name:
            np.testing.assert_allclose(array, stats.layers[0][name], rtol=2e-4, atol=1e-5)
    plan = Plan({0: LayerPlan(shared_neurons=(1, 2, 5, 8), repair=True)})
    one, many = (apply_plan(model, config, plan, stats)[1] for model in (params, placed))
    for name, array in one["layers"][0]["moe"]["shared"].items():
        if name != "output_gate":
            sharded = many["layers"][0]["moe"]["shared"][name]
            assert "tensor" in sharded.sharding.spec
            np.testing.assert_allclose(sharded, array, rtol=1e-4, atol=1e-5)


def test_second_moments_have_a_plan_of_their_own():
    config = tiny_config(FAMILY)
    sizes = requested_bytes(config, "shared_moments")
    assert sizes == dict.fromkeys(config.moe_layers, 4 * (SHARED_WIDTH + 1) ** 2)
    plan = plan_second_moments(config, False, shared=True)
    assert (plan.by_layer, plan.wanted(0).shared) == (sizes, config.moe_layers)
    assert not requested_bytes(tiny_config("olmoe"), "shared_moments")


@pytest.mark.parametrize(
    ("family", "cut", "stock"),
    [
        ("qwen2_moe", "shared", True),
        ("deepseek_v2", "shared", True),
        # Ten neurons are no multiple of a routed expert's eight, in which the file counts them.
        ("ernie4_5_moe", {"method": "token_fisher", "shared_width": 10, "refit": True}, False),
    ],
)
def test_an_export_gives_the_logits_of_the_cut(tmp_path, family, cut, stock):
    error, found = export_error(save_tiny(tmp_path / "source", family), tmp_path / "out", cut)
    assert error <= 2e-4
    assert found is stock


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "mone", "keep_ratio": 0.5, "shared_width": 4}, "needs a ranking of neurons"),
        ({"shared_width": 4, "rank_shared": True}, "rank_shared = True needs own_widths"),
        ({"shared_width": 0}, "shared_width must be at least 1, got 0"),
        (
            {
                "shared_width": 4, "rank_shared": True, "own_widths": True, "width_ratio": 0.5,
                "neuron_scope": "layer",
            },
            "rank_shared leaves no shared_width",
        ),
        ({"shared_width": 4, "own_widths": True}, "own_widths = True needs"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Cut.from_dict(fields)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("olmoe", {"shared_width": 4}, "layer 0: shared_width = 4 needs a shared expert; olmoe"),
        (FAMILY, {"shared_width": 11}, r"layer 0: shared_width must be in \[1, 10\], got 11"),
        (FAMILY, {"shared_width": 5, "round_to": 2}, "multiple of round_to = 2, or all 10, got 5"),
    ],
)
def test_what_a_model_has_not_is_refused(family, fields, message):
    with pytest.raises(ValueError, match=message):
        foreseen(Cut.from_dict(fields), tiny_config(family))


@pytest.mark.parametrize(
    ("kept", "message"),
    [((), "at least one of shared_neurons"), ((10,), r"in \[0, 10\)"), ((2, 1), "ascending")],
)
def test_plans_that_do_not_fit_are_refused(kept, message):
    with pytest.raises(ValueError, match=message):
        planned_config(tiny_config(FAMILY), Plan({0: LayerPlan(shared_neurons=kept)}))
    with pytest.raises(ValueError, match="layer 0: shared_neurons need a shared expert"):
        planned_config(tiny_config("olmoe"), Plan({0: LayerPlan(shared_neurons=(0,))}))


def test_scores_and_sizes_need_each_other():
    config = tiny_config(FAMILY)
    scores = {i: np.arange(SHARED_WIDTH) for i in config.moe_layers}
    plan = make_plan(None, config, shared_scores=scores, shared_width=2)
    assert plan.layers[0] == LayerPlan(shared_neurons=(8, 9))
    for fields in ({"shared_scores": scores, "kv_groups": 1}, {"shared_width": 2, "kv_groups": 1}):
        with pytest.raises(ValueError, match="need each other"):
            make_plan(None, config, **fields)
