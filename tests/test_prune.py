"""Pruning: identities, and each transform against what it is equivalent to."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import EXPERT_WIDTH, EXPERTS, neuron_masks, tiny_model, token_batches
from tiny_hf import save_tiny, torch_logits

from moe_jax.calibrate import calibrate
from moe_jax.hf import load_hf, save_hf
from moe_jax.model import forward
from moe_jax.model.moe import moe_layer, route
from moe_jax.params import abstract_params, leaves_with_path
from moe_jax.plan import LayerPlan, Plan, make_plan
from moe_jax.prune import apply_plan
from moe_jax.scoring import score

FAMILIES = ["olmoe", "phimoe", "qwen3_moe"]
TOKENS = token_batches(1)[0]["tokens"]


def assert_tree_equal(a, b):
    for (path, x), (other, y) in zip(leaves_with_path(a), leaves_with_path(b), strict=True):
        assert path == other
        np.testing.assert_array_equal(x, y)


def assert_tree_shared(a, b):
    for (path, x), (other, y) in zip(leaves_with_path(a), leaves_with_path(b), strict=True):
        assert path == other
        assert x is y


def assert_shapes_follow(params, config):
    expected = {path: leaf.shape for path, leaf in leaves_with_path(abstract_params(config))}
    assert {path: leaf.shape for path, leaf in leaves_with_path(params)} == expected


@pytest.fixture(scope="module")
def stats():
    params, config = tiny_model("olmoe")
    return calibrate(params, config, token_batches(), importance=("kd_topk",), warn=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_the_identity(family):
    """The arrays are the very same ones."""
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
        assert_tree_shared(new_params, params)


@pytest.mark.parametrize("family", FAMILIES)
def test_sliced_neurons_equal_masked_ones(family):
    params, config = tiny_model(family)
    rng = np.random.default_rng(0)
    scores = {i: rng.random((EXPERTS, EXPERT_WIDTH)) for i in config.moe_layers}
    plan = make_plan(scores, config, expert_width=5)
    small, sliced = apply_plan(params, config, plan)
    assert_shapes_follow(sliced, small)
    masked, _ = forward(params, config, TOKENS, neuron_masks=neuron_masks(plan))
    np.testing.assert_array_equal(forward(sliced, small, TOKENS)[0], masked)


def padded_plan(config) -> Plan:
    """Neurons ranked across each layer, whose experts then keep different numbers."""
    rng = np.random.default_rng(0)
    scores = {
        i: rng.random((EXPERTS, EXPERT_WIDTH)) + np.arange(EXPERTS)[:, None] / 12
        for i in config.moe_layers
    }
    return make_plan(scores, config, expert_width=4, neuron_scope="layer")


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_neurons_equal_masked_ones(family):
    params, config = tiny_model(family)
    plan = padded_plan(config)
    kept = [len(kept) for kept in plan.layers[0].neurons.values()]
    assert min(kept) < max(kept) <= plan.layers[0].padded_width < EXPERT_WIDTH
    small, sliced = apply_plan(params, config, plan)
    assert_shapes_follow(sliced, small)
    masked, _ = forward(params, config, TOKENS, neuron_masks=neuron_masks(plan))
    np.testing.assert_array_equal(forward(sliced, small, TOKENS)[0], masked)


def test_padding_is_zero_and_stays_so_in_training():
    params, config = tiny_model("olmoe")
    plan = padded_plan(config)
    small, sliced = apply_plan(params, config, plan)
    loss = jax.jit(lambda params: jnp.square(forward(params, small, TOKENS)[0]).mean())
    gradients = jax.grad(loss)(sliced)
    for i, layer in plan.layers.items():
        for tree, zero in ((sliced, "weights"), (gradients, "gradients")):
            experts = tree["layers"][i]["moe"]["experts"]
            for e, kept in layer.neurons.items():
                for name, axis in (("gate", 1), ("up", 1), ("down", 0)):
                    here, padding = np.split(experts[name][e], [len(kept)], axis)
                    assert not padding.any(), zero
                    assert here.any()


def test_padding_goes_first_when_narrowed_again():
    """A second cut across the layer, to the neurons that are no padding, changes no output."""
    params, config = tiny_model("olmoe")
    plan = padded_plan(config)
    small, sliced = apply_plan(params, config, plan)
    stats = calibrate(sliced, small, token_batches(1), warn=False)
    scores = score(stats, "weight_norm")
    width = small.moe(0).expert_width
    kept = sum(len(neurons) for neurons in plan.layers[0].neurons.values())
    again = make_plan(scores, small, expert_width=kept // EXPERTS, neuron_scope="layer")
    for i, layer in again.layers.items():
        assert layer.padded_width == width
        for e, neurons in layer.neurons.items():
            assert neurons == tuple(range(len(plan.layers[i].neurons[e])))
    assert_tree_equal(apply_plan(sliced, small, again)[1], sliced)


def test_experts_that_keep_all_are_padded_to_nothing():
    params, config = tiny_model("olmoe")
    scores = {i: np.ones((EXPERTS, EXPERT_WIDTH)) for i in config.moe_layers}
    plan = make_plan(scores, config, width_ratio=1.0, neuron_scope="layer")
    same, kept = apply_plan(params, config, plan)
    assert same == config
    assert_tree_shared(kept, params)


def test_the_stock_class_loads_padded_experts(tmp_path):
    source = save_tiny(tmp_path / "source", "phimoe")
    config, params = load_hf(source)
    rng = np.random.default_rng(0)
    scores = {i: rng.random((4, 8)) + np.arange(4)[:, None] / 12 for i in config.moe_layers}
    plan = make_plan(scores, config, expert_width=2, neuron_scope="layer")
    most = [max(map(len, layer.neurons.values())) for layer in plan.layers.values()]
    assert most == [4, 3]
    small, pruned = apply_plan(params, config, plan)
    assert [small.moe(i).expert_width for i in small.moe_layers] == [4, 4]
    save_hf(tmp_path / "out", pruned, small, source=source)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["intermediate_size"] == 4
    assert "auto_map" not in written
    tokens = rng.integers(0, config.vocab_size, (2, 12))
    ours = forward(pruned, small, tokens)[0]
    np.testing.assert_allclose(ours, torch_logits(tmp_path / "out", tokens), 0, 2e-4)


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


def test_a_weighted_novice_minimises_the_weighted_squared_error(stats):
    """Against every token's output, and better than any constant near it."""
    params, config = tiny_model("olmoe")
    plan = make_plan(score(stats, "mone"), config, keep_experts=4, replacement="weighted_novice")
    small, pruned = apply_plan(params, config, plan, stats)
    assert_shapes_follow(pruned, small)
    outputs: dict[tuple[int, int], list[np.ndarray]] = {}
    weights: dict[tuple[int, int], list[np.ndarray]] = {}
    for batch in token_batches():
        segments = batch["mask"].astype(np.int32)
        taps = ("output", "row_weight", "group_sizes")
        _, aux = forward(params, config, batch["tokens"], segments, taps)
        for i, layer in enumerate(aux["layers"]):
            ends = np.cumsum(layer["group_sizes"])
            for e, (first, last) in enumerate(zip(ends - layer["group_sizes"], ends, strict=True)):
                outputs.setdefault((i, e), []).append(np.asarray(layer["output"][first:last]))
                weights.setdefault((i, e), []).append(np.asarray(layer["row_weight"][first:last]))
    rng = np.random.default_rng(0)
    for i, layer in plan.layers.items():
        assert layer.novice_value == "weighted_mean"
        for place, e in enumerate(layer.novices):
            y, w = np.concatenate(outputs[i, e]), np.concatenate(weights[i, e])

            def error(constant, y=y, w=w):
                return (w * np.square(y - constant).sum(1)).sum()

            constant = np.asarray(pruned["layers"][i]["moe"]["novices"]["constant"][place])
            np.testing.assert_allclose(constant, w @ y / w.sum(), rtol=1e-4, atol=1e-6)
            for _ in range(20):
                step = 1e-2 * rng.normal(size=constant.shape)
                assert error(constant) < error(constant + step)


def test_a_weighted_novice_without_routing_weight_is_zero(stats):
    params, config = tiny_model("olmoe")
    layer = stats.layers[0]
    unused = {
        **layer,
        "routing_mass": np.where(np.arange(EXPERTS) == 2, 0, layer["routing_mass"]),
        "gated_output": np.where(np.arange(EXPERTS)[:, None] == 2, 0, layer["gated_output"]),
    }
    plan = Plan({0: LayerPlan(novices=(2, 3), novice_value="weighted_mean")})
    changed = dataclasses.replace(stats, layers={0: unused})
    _, pruned = apply_plan(params, config, plan, changed)
    constant = pruned["layers"][0]["moe"]["novices"]["constant"]
    np.testing.assert_array_equal(constant[0], 0)
    assert np.abs(constant[1]).max() > 0
    without = {0: {k: v for k, v in layer.items() if k != "gated_output"}}
    with pytest.raises(ValueError, match=r"statistics; pass stats \(there is no gated_output\)"):
        apply_plan(params, config, plan, dataclasses.replace(stats, layers=without))


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
def test_deleted_experts_equal_experts_that_are_never_chosen(family):
    params, config = tiny_model(family)
    plan = make_plan(
        {i: np.random.default_rng(i).random(EXPERTS) for i in config.moe_layers},
        config,
        keep_experts=3,
        replacement="delete",
    )
    small, pruned = apply_plan(params, config, plan)
    assert_shapes_follow(pruned, small)
    x = jax.random.normal(jax.random.key(0), (30, config.width))
    for i, layer in plan.layers.items():
        whole, moe = params["layers"][i]["moe"], config.moe(i)
        logits = (x @ whole["router"]["kernel"]).at[:, jnp.array(layer.deleted)].set(-jnp.inf)
        ids, weights = route(logits, moe.experts_per_token, config.router)
        gate, up, down = (whole["experts"][name] for name in ("gate", "up", "down"))
        hidden = jax.nn.silu(jnp.einsum("td,edf->tef", x, gate)) * jnp.einsum("td,edf->tef", x, up)
        outputs = jnp.einsum("tef,efd->ted", hidden, down)
        chosen = jnp.take_along_axis(outputs, ids[:, :, None], 1)
        expected = (weights[:, :, None] * chosen).sum(1)
        y, _ = moe_layer(pruned["layers"][i]["moe"], small.moe(i), config.router, x)
        np.testing.assert_allclose(y, expected, atol=1e-5)


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
    from moe_jax.processes import make_mesh, spec_tree

    params, config = tiny_model("olmoe")
    mesh = make_mesh({"expert": 2, "data": 4})
    sharded = jax.device_put(params, spec_tree(config, mesh))
    novices = make_plan(score(stats, "mone"), config, keep_experts=4)
    for plan in (novices, padded_plan(config)):
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
