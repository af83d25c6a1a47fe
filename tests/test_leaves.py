"""A parameter that nobody has heard of is treated right everywhere, by what its Leaf says of it.

Each expert gets a made-up ``scale [E, F]``, a number for each of its neurons: an expert's (E), cut
and ordered with its neurons (F), trained with the experts, not decayed.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from models import EXPERT_WIDTH, EXPERTS, tiny_model

from moe_jax.checkpoint import load_leaves, save_params
from moe_jax.distill import TrainSettings
from moe_jax.distill.objective import cast_for_compute
from moe_jax.distill.step import make_optimizer, split_trained
from moe_jax.params import (
    AXES,
    Leaf,
    abstract_params,
    expert_sizes,
    leaves_with_path,
    split_experts,
    stack_experts,
    stack_leaves,
)
from moe_jax.plan import LayerPlan, Merge, planned_config
from moe_jax.plan.schema import Plan
from moe_jax.processes import leaf_shardings, make_mesh
from moe_jax.prune.apply import cut_layer
from moe_jax.prune.compensation import Compensation
from moe_jax.prune.merging import merge_experts

NOTHING = Compensation(np.zeros((0, 16), np.float32))
SETTINGS = TrainSettings(steps=10, warmup_steps=0, weight_decay=0.5)


def made_up(experts: int = EXPERTS, width: int = EXPERT_WIDTH) -> Leaf:
    return Leaf((experts, width), "EF", "experts", "ones", decay=False)


def with_made_up():
    """Leaves and weights of a tiny model whose experts have one more array."""
    params, config = tiny_model("olmoe")
    leaves = abstract_params(config)
    params = jax.tree.map(lambda leaf: leaf, params)
    for i in config.moe_layers:
        leaves["layers"][i]["moe"]["experts"]["scale"] = made_up()
        scale = np.random.default_rng(i).random((EXPERTS, EXPERT_WIDTH)).astype(np.float32)
        params["layers"][i]["moe"]["experts"]["scale"] = jnp.asarray(scale)
    return leaves, params, config


def cut(plan: LayerPlan, weights=None):
    leaves, params, config = with_made_up()
    small = planned_config(config, Plan({0: plan}))
    shapes = config.layers[0], small.layers[0]
    return cut_layer(
        leaves["layers"][0], weights or params["layers"][0], shapes, plan, NOTHING
    ), small


def test_pruning_cuts_it_with_its_experts_and_neurons():
    _, params, _ = with_made_up()
    before = np.asarray(params["layers"][0]["moe"]["experts"]["scale"])
    neurons = {e: tuple(range(e, e + 3)) for e in (0, 2, 3, 5)}
    layer, _ = cut(LayerPlan(deleted=(1, 4), neurons=neurons))
    found = layer["moe"]["experts"]["scale"]
    np.testing.assert_array_equal(found, [before[e, list(kept)] for e, kept in neurons.items()])


def test_padding_fills_it_with_zeros():
    neurons = {e: tuple(range(1 + e % 3)) for e in range(EXPERTS)}
    layer, small = cut(LayerPlan(neurons=neurons, padded_width=4))
    scale = np.asarray(layer["moe"]["experts"]["scale"])
    assert scale.shape == (EXPERTS, small.moe(0).expert_width) == (EXPERTS, 4)
    kept = np.arange(4) < np.array([1 + e % 3 for e in range(EXPERTS)])[:, None]
    np.testing.assert_array_equal(scale != 0, kept)


def test_experts_of_their_own_widths_are_stacked_and_split_with_it():
    buckets = [
        {"scale": made_up(2, 5), "down": Leaf((2, 5, 3), "EFD", "experts")},
        {"scale": made_up(4, 2), "down": Leaf((4, 2, 3), "EFD", "experts")},
    ]
    rng = np.random.default_rng(0)
    experts = [
        {name: jnp.asarray(rng.normal(size=leaf.shape)) for name, leaf in bucket.items()}
        for bucket in buckets
    ]
    stacked = stack_experts(experts, buckets[0])
    assert stacked["scale"].shape == (6, 5)
    assert not stacked["scale"][2:, 2:].any()
    again = split_experts(stacked, buckets)
    jax.tree.map(np.testing.assert_array_equal, again, experts)


@pytest.mark.parametrize("align", [True, False])
def test_merging_takes_its_mean_in_the_order_of_the_neurons(align):
    """Expert 3 becomes a copy of expert 1 with its neurons in another order."""
    leaves, params, config = with_made_up()
    moe, order = params["layers"][0]["moe"], np.random.default_rng(0).permutation(EXPERT_WIDTH)
    experts = {}
    for name, leaf in leaves["layers"][0]["moe"]["experts"].items():
        array = np.array(moe["experts"][name])
        array[3] = np.take(array[1], order, leaf.axes.index("F") - 1)
        experts[name] = jnp.asarray(array)
    plan = LayerPlan(merges=(Merge(1, (3,), (1.0, 2.0)),), merge_align=align)
    weights = {**moe, "experts": experts}
    merged = merge_experts(leaves["layers"][0]["moe"], weights, config.moe(0), plan)
    one = np.asarray(merged["experts"]["scale"][1])
    expected = experts["scale"][1] if align else (experts["scale"][1] + 2 * experts["scale"][3]) / 3
    np.testing.assert_allclose(one, expected, rtol=1e-6)


def test_it_trains_with_the_experts_and_does_not_decay():
    leaves, params, _ = with_made_up()
    settings = dataclasses.replace(SETTINGS, trainable="experts")
    trained, frozen = split_trained(params, leaves, settings)
    assert trained["layers"][0]["moe"]["experts"]["scale"] is not None
    assert frozen["layers"][0]["moe"]["experts"]["scale"] is None
    optimizer = make_optimizer(settings, leaves)
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, trained), optimizer.init(trained), trained
    )
    changed = {path[-1] for path, update in leaves_with_path(updates) if np.any(update)}
    assert changed - {None} == {"gate", "up", "down"}
    cast = cast_for_compute(params, leaves, jnp.bfloat16)["layers"][0]["moe"]["experts"]
    assert (cast["scale"].dtype, cast["gate"].dtype) == (jnp.float32, jnp.bfloat16)


def test_it_lies_on_the_mesh_by_its_letters():
    leaves, _, _ = with_made_up()
    mesh = make_mesh({"expert": 2, "tensor": 2})
    for tree, stacked in ((leaves["layers"][0], ()), (stack_leaves(leaves)["layers"], (None,))):
        found = leaf_shardings(tree, mesh)["moe"]["experts"]["scale"]
        assert found.spec == PartitionSpec(*stacked, "expert", "tensor")


def test_counts_and_checkpoints_hold_it(tmp_path):
    leaves, params, config = with_made_up()
    sizes = expert_sizes(leaves["layers"][0]["moe"])
    assert sizes == [(3 * config.width + 1) * EXPERT_WIDTH] * EXPERTS
    save_params(tmp_path / "params", params)
    loaded = load_leaves(tmp_path / "params", leaves)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    del leaves["layers"][0]["moe"]["experts"]["scale"]
    with pytest.raises(ValueError, match=r"experts\.scale must have shape none, got \(6, 8\)"):
        load_leaves(tmp_path / "params", leaves)


def test_every_leaf_says_what_its_axes_are():
    for family in ("olmoe", "phimoe", "qwen3_moe"):
        _, config = tiny_model(family)
        for _, leaf in leaves_with_path(abstract_params(config)):
            assert len(leaf.axes) == len(set(leaf.axes)) == len(leaf.shape)
            assert set(leaf.axes) <= AXES.keys()
    with pytest.raises(ValueError, match="axes must be one letter"):
        Leaf((2, 3), "E", "experts")


def test_all_trains_everything_and_only_matrices_decay():
    """Constants of experts included."""
    _, config = tiny_model("phimoe")
    config = config.replace_moe(0, expert_bias=True, novice_ids=(1,))
    leaves = abstract_params(config)
    trained, frozen = split_trained(leaves, leaves, SETTINGS)
    assert not [leaf for _, leaf in leaves_with_path(frozen) if leaf is not None]
    moe = trained["layers"][0]["moe"]
    assert (moe["expert_bias"].part, moe["novices"]["constant"].part) == ("experts", "novices")
    for path, leaf in leaves_with_path(trained):
        is_vector = path[-1] in ("bias", "scale", "constant", "expert_bias")
        assert leaf.decay is not is_vector, path
