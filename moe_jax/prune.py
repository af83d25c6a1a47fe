"""Applies a Plan to weights: pure transforms of the nested dict, jitted leaf by leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from moe_jax.config import LayerConfig, ModelConfig, MoeConfig
from moe_jax.plan import LayerPlan, Plan, planned_config
from moe_jax.shapes import Leaf, abstract_params
from moe_jax.statistics import Stats


def apply_plan(
    params: dict[str, Any], config: ModelConfig, plan: Plan, stats: Stats | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """The smaller model; the arguments are left as they are.

    Args:
        params, config: the model to prune; sharded leaves stay sharded the same way.
        plan: what to remove.
        stats: needed for novices with their mean output.

    Returns:
        The new configuration and weights. Arrays that the plan does not change are shared with
        ``params``.

    Raises:
        ValueError: the plan does not fit the model, or mean novices without statistics of this
            model.
    """
    smaller = planned_config(config, plan)
    in_place = planned_config(config, dataclasses.replace(plan, dropped_layers=()))
    means = {
        i: _novice_means(layer_plan, config.moe(i), config.width, i, stats)
        for i, layer_plan in plan.layers.items()
        if layer_plan.novices
    }
    leaves = abstract_params(config)["layers"]
    layers = list(params["layers"])
    for i, layer_plan in sorted(plan.layers.items()):
        old, weights = config.layers[i], dict(layers[i])
        if layer_plan.kv_groups is not None:
            weights["attention"] = _prune_attention(
                weights["attention"], leaves[i]["attention"], old, layer_plan.kv_groups
            )
        if isinstance(old.feed_forward, MoeConfig):
            weights["moe"] = _prune_experts(
                weights["moe"], old.feed_forward, layer_plan, in_place.moe(i), means.get(i, ())
            )
        layers[i] = weights
    layers = [layer for i, layer in enumerate(layers) if i not in plan.dropped_layers]
    return smaller, {**params, "layers": layers}


def _novice_means(plan: LayerPlan, moe: MoeConfig, width: int, i: int, stats: Stats | None):
    """Constants of the new novices, [n, D], in the order of ``plan.novices``."""
    if plan.novice_value == "zero":
        return np.zeros((len(plan.novices), width), np.float32)
    if stats is None or i not in stats.layers:
        raise ValueError(
            f"plan layer {i}: novices take their mean output from statistics; pass stats"
        )
    mean = stats.layers[i]["output_mean"]
    if mean.shape != (moe.num_experts, width):
        raise ValueError(
            f"statistics of layer {i} must be of this model, with output means "
            f"{(moe.num_experts, width)}, got {mean.shape}"
        )
    return mean[list(plan.novices)]


def _prune_attention(weights, leaves, layer: LayerConfig, groups: Sequence[int]):
    """Takes whole groups along every axis of heads; norms within a head and biases of D stay."""
    kv_heads = np.array(groups)
    heads = np.arange(layer.num_heads).reshape(layer.num_kv_heads, -1)[kv_heads].reshape(-1)
    index = {"heads": heads, "kv_heads": kv_heads}

    def take(leaf: Leaf, array: Array) -> Array:
        for axis, name in enumerate(leaf.axes):
            if name in index:
                array = _take(array, index[name], axis)
        return array

    return jax.tree.map(take, leaves, weights, is_leaf=lambda node: isinstance(node, Leaf))


def _prune_experts(weights, moe: MoeConfig, plan: LayerPlan, smaller: MoeConfig, means):
    gone = {*plan.deleted, *plan.novices}
    stored = moe.expert_ids
    rows = np.array([row for row, e in enumerate(stored) if e not in gone])
    experts = {name: _take(leaf, rows, 0) for name, leaf in weights["experts"].items()}
    everything = range(moe.expert_width)
    neurons = [plan.neurons.get(stored[row], everything) for row in rows]
    pruned = {**weights, "experts": _prune_neurons(experts, neurons, moe, smaller.expert_width)}
    if plan.deleted:
        router_rows = np.setdiff1d(np.arange(moe.num_experts), plan.deleted)
        kernel = _take(weights["router"]["kernel"], router_rows, 1)
        pruned["router"] = {**weights["router"], "kernel": kernel}
    if gone:
        pruned.pop("novices", None)
        constants = _novice_constants(weights, moe, plan, means)
        if constants:
            ordered = np.stack([constants[e] for e in sorted(constants)])
            dtype = experts["down"].dtype
            pruned["novices"] = {"constant": jnp.asarray(ordered).astype(dtype)}
    return pruned


def _novice_constants(weights, moe: MoeConfig, plan: LayerPlan, means) -> dict[int, np.ndarray]:
    """By router row before the plan: the new novices and those of the old that stay."""
    constants = dict(zip(plan.novices, means, strict=True))
    for row, e in enumerate(moe.novice_ids):
        if e not in plan.deleted and e not in constants:
            constants[e] = np.asarray(weights["novices"]["constant"][row], np.float32)
    return constants


def _prune_neurons(experts, kept: Sequence[Sequence[int]], moe: MoeConfig, stored_width: int):
    """Takes each expert's neurons, and zeros up to the stored width."""
    if all(len(neurons) == moe.expert_width for neurons in kept):
        return experts
    past_the_end = moe.expert_width
    index = np.full((len(kept), stored_width), past_the_end)
    for row, neurons in zip(index, kept, strict=True):
        row[: len(neurons)] = sorted(neurons)
    return {
        "gate": _take_neurons(experts["gate"], index[:, None, :], 2),
        "up": _take_neurons(experts["up"], index[:, None, :], 2),
        "down": _take_neurons(experts["down"], index[:, :, None], 1),
    }


def _take(leaf: Array, index: np.ndarray, axis: int) -> Array:
    """The entries at ascending, different indices; the leaf itself if these are all."""
    if index.size == leaf.shape[axis]:
        return leaf
    return _placed_like(_jit_take(leaf, index, axis), leaf)


def _take_neurons(leaf: Array, index: np.ndarray, axis: int) -> Array:
    return _placed_like(_jit_take_or_zero(leaf, index, axis), leaf)


def _placed_like(new: Array, old: Array) -> Array:
    """Keeps a NamedSharding, so that pruning a sharded model gives one."""
    sharding = getattr(old, "sharding", None)
    return jax.device_put(new, sharding) if isinstance(sharding, NamedSharding) else new


_jit_take = jax.jit(lambda leaf, index, axis: jnp.take(leaf, index, axis), static_argnums=2)
_jit_take_or_zero = jax.jit(
    lambda leaf, index, axis: jnp.take_along_axis(leaf, index, axis, mode="fill", fill_value=0),
    static_argnums=2,
)
