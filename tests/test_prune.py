"""Pruning: identities, and each transform against what it is equivalent to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import EXPERT_WIDTH, EXPERTS, tiny_model, token_batches

from moe_jax import moe
from moe_jax.calibrate import calibrate
from moe_jax.model import forward
from moe_jax.plan import LayerPlan, Plan, make_plan
from moe_jax.prune import apply_plan
from moe_jax.scoring import score
from moe_jax.shapes import abstract_params, leaves_with_path

FAMILIES = ["olmoe", "phimoe", "qwen3_moe"]
TOKENS = token_batches(1)[0]["tokens"]


def assert_tree_equal(a, b):
    for (path, x), (other, y) in zip(leaves_with_path(a), leaves_with_path(b), strict=True):
        assert path == other
        np.testing.assert_array_equal(x, y)


def assert_shapes_follow(params, config):
    expected = {path: leaf.shape for path, leaf in leaves_with_path(abstract_params(config))}
    assert {path: leaf.shape for path, leaf in leaves_with_path(params)} == expected


@pytest.fixture(scope="module")
def stats():
    params, config = tiny_model("olmoe")
    return calibrate(params, config, token_batches(), importance=("kd_topk",), warn=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_the_identity(family):
    params, config = tiny_model(family)
    rng = np.random.default_rng(0)
    experts = {i: rng.random(EXPERTS) for i in config.moe_layers}
    neurons = {i: rng.random((EXPERTS, EXPERT_WIDTH)) for i in config.moe_layers}
    for plan in (
        make_plan(experts, config, keep_ratio=1.0, replacement="delete"),
        make_plan(neurons, config, expert_width=EXPERT_WIDTH),
        Plan({}),
    ):
        new_config, new_params = apply_plan(params, config, plan)
        assert new_config == config
        assert_tree_equal(new_params, params)


@pytest.mark.parametrize("family", FAMILIES)
def test_sliced_neurons_equal_masked_ones(family):
    params, config = tiny_model(family)
    rng = np.random.default_rng(0)
    scores = {i: rng.random((EXPERTS, EXPERT_WIDTH)) for i in config.moe_layers}
    plan = make_plan(scores, config, expert_width=5)
    small, sliced = apply_plan(params, config, plan)
    assert_shapes_follow(sliced, small)
    masks = {}
    for i, layer in plan.layers.items():
        mask = np.zeros((EXPERTS, EXPERT_WIDTH), np.float32)
        for e, kept in layer.neurons.items():
            mask[e, list(kept)] = 1
        masks[i] = jnp.asarray(mask)
    masked, _ = forward(params, config, TOKENS, neuron_masks=masks)
    np.testing.assert_array_equal(forward(sliced, small, TOKENS)[0], masked)


def test_a_novice_is_the_mean_output_of_its_expert(stats):
    params, config = tiny_model("olmoe")
    plan = make_plan(score(stats, "mone"), config, keep_experts=4)
    small, pruned = apply_plan(params, config, plan, stats)
    assert_shapes_follow(pruned, small)
    for i in config.moe_layers:
        novices = list(plan.layers[i].novices)
        assert small.moe(i).novice_ids == tuple(novices)
        new, old = pruned["layers"][i]["moe"], params["layers"][i]["moe"]
        np.testing.assert_array_equal(new["router"]["kernel"], old["router"]["kernel"])
        expected = stats.layers[i]["output_mean"][novices]
        np.testing.assert_array_equal(new["novices"]["constant"], expected)
        kept = list(small.moe(i).expert_ids)
        np.testing.assert_array_equal(
            new["experts"]["down"], np.asarray(old["experts"]["down"])[kept]
        )


def test_zero_novices_equal_experts_whose_output_is_zero(stats):
    params, config = tiny_model("olmoe")
    plan = make_plan(score(stats, "mone"), config, keep_experts=4, replacement="zero")
    small, pruned = apply_plan(params, config, plan)
    silenced = jax.tree.map(lambda leaf: leaf, params)
    for i, layer in plan.layers.items():
        experts = silenced["layers"][i]["moe"]["experts"]
        experts["down"] = experts["down"].at[jnp.array(layer.novices)].set(0)
    expected, _ = forward(silenced, config, TOKENS)
    np.testing.assert_allclose(forward(pruned, small, TOKENS)[0], expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_deleted_experts_equal_experts_that_are_never_chosen(family, monkeypatch):
    params, config = tiny_model(family)
    scores = {i: np.random.default_rng(i).random(EXPERTS) for i in config.moe_layers}
    plan = make_plan(scores, config, keep_experts=3, replacement="delete")
    small, pruned = apply_plan(params, config, plan)
    assert_shapes_follow(pruned, small)
    result, _ = forward(pruned, small, TOKENS)
    remaining = [layer.deleted for _, layer in sorted(plan.layers.items())]
    route = moe.route

    def route_without_deleted(logits, *arguments):
        return route(logits.at[:, jnp.array(remaining.pop(0))].set(-jnp.inf), *arguments)

    monkeypatch.setattr(moe, "route", route_without_deleted)
    expected, _ = forward(params, config, TOKENS)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_stages_compose(stats):
    """Novices, then deletion of one of them and of an expert, then narrower experts."""
    params, config = tiny_model("olmoe")
    config1, params1 = apply_plan(params, config, Plan({0: LayerPlan(novices=(1, 4))}), stats)
    config2, params2 = apply_plan(params1, config1, Plan({0: LayerPlan(deleted=(0, 1))}))
    neurons = dict.fromkeys((0, 1, 3), (0, 3, 5))
    config3, params3 = apply_plan(params2, config2, Plan({0: LayerPlan(neurons=neurons)}))
    facts = config3.moe(0)
    assert (facts.num_experts, facts.novice_ids, facts.expert_width) == (4, (2,), 3)
    assert_shapes_follow(params3, config3)
    layer = params3["layers"][0]["moe"]
    np.testing.assert_array_equal(
        layer["novices"]["constant"][0], stats.layers[0]["output_mean"][4]
    )
    old = params["layers"][0]["moe"]["experts"]["gate"]
    np.testing.assert_array_equal(layer["experts"]["gate"][2], np.asarray(old)[5][:, [0, 3, 5]])


def test_sharded_in_sharded_out(stats):
    from moe_jax.sharding import make_mesh, spec_tree

    params, config = tiny_model("olmoe")
    mesh = make_mesh({"expert": 2, "data": 4})
    sharded = jax.device_put(params, spec_tree(config, mesh))
    plan = make_plan(score(stats, "mone"), config, keep_experts=4)
    _small, pruned = apply_plan(sharded, config, plan, stats)
    experts = pruned["layers"][0]["moe"]["experts"]["gate"]
    assert experts.sharding.spec[0] == "expert"
    _, expected = apply_plan(params, config, plan, stats)
    assert_tree_equal(pruned, expected)


def test_novices_need_statistics_of_this_model(stats):
    params, config = tiny_model("olmoe")
    plan = Plan({0: LayerPlan(novices=(1,))})
    with pytest.raises(ValueError, match="pass stats"):
        apply_plan(params, config, plan)
    wrong = {i: layer | {"output_mean": np.zeros((4, 3))} for i, layer in stats.layers.items()}
    with pytest.raises(ValueError, match="of this model"):
        apply_plan(params, config, plan, type(stats)(wrong, 1, 1, 1))
