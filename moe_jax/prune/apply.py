"""Applies a Plan to weights: pure transforms of the nested dict, jitted leaf by leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moe_jax.config import LayerConfig, ModelConfig, MoeConfig
from moe_jax.plan import LayerPlan, Plan, planned_config
from moe_jax.prune.leaves import take, take_neurons
from moe_jax.prune.merge import merge_experts
from moe_jax.prune.repair import repair_down, second_moments
from moe_jax.shapes import Leaf, abstract_params
from moe_jax.statistics import Stats


def apply_plan(
    params: dict[str, Any], config: ModelConfig, plan: Plan, stats: Stats | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """The smaller model; the arguments are left as they are.

    Args:
        params, config: the model to prune; sharded leaves stay sharded the same way.
        plan: what to remove. Experts are merged first; neurons that it names are the merged
            expert's, in the order of the one that stays.
        stats: needed for novices, unless they are zero, and for repair.

    Returns:
        The new configuration and weights. Arrays that the plan does not change are shared with
        ``params``.

    Raises:
        ValueError: the plan does not fit the model, or novices that are no zeros, or repair,
            without statistics of this model.
    """
    smaller = planned_config(config, plan)
    in_place = planned_config(config, dataclasses.replace(plan, dropped_layers=()))
    means = {
        i: _novice_means(layer_plan, config.moe(i), config.width, i, stats)
        for i, layer_plan in plan.layers.items()
        if layer_plan.novices
    }
    grams = {
        i: second_moments(config.moe(i), i, stats)
        for i, layer_plan in plan.layers.items()
        if layer_plan.repair
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
                weights["moe"],
                old.feed_forward,
                layer_plan,
                in_place.moe(i),
                means.get(i, ()),
                grams.get(i),
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
    arrays = stats.layers[i]
    name = "output_mean" if plan.novice_value == "mean" else "gated_output"
    found = arrays[name].shape if name in arrays else "none"
    if found != (moe.num_experts, width):
        raise ValueError(
            f"statistics of layer {i} must be of this model, with {name} "
            f"{(moe.num_experts, width)}, got {found}"
        )
    values = arrays[name][list(plan.novices)]
    if name == "output_mean":
        return values
    return _weighted_means(values, arrays["routing_mass"][list(plan.novices)])


def _weighted_means(gated: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """``sum_t w_t y_t / sum_t w_t``: the constant c that minimises ``sum_t w_t ||y_t - c||^2``.

    MoNE's plain mean minimises the sum without weights; here the tokens that give an expert a large
    part in their output count for more. Zero for an expert that has no routing weight.
    """
    mass = mass[:, None].astype(np.float64)
    mean = np.divide(gated, mass, out=np.zeros(gated.shape), where=mass > 0)
    return mean.astype(np.float32)


def _prune_attention(weights, leaves, layer: LayerConfig, groups: Sequence[int]):
    """Takes whole groups along every axis of heads; norms within a head and biases of D stay."""
    kv_heads = np.array(groups)
    heads = np.arange(layer.num_heads).reshape(layer.num_kv_heads, -1)[kv_heads].reshape(-1)
    index = {"heads": heads, "kv_heads": kv_heads}

    def chosen(leaf: Leaf, array: Array) -> Array:
        for axis, name in enumerate(leaf.axes):
            if name in index:
                array = take(array, index[name], axis)
        return array

    return jax.tree.map(chosen, leaves, weights, is_leaf=lambda node: isinstance(node, Leaf))


def _prune_experts(weights, moe: MoeConfig, plan: LayerPlan, smaller: MoeConfig, means, grams):
    if plan.merges:
        weights = merge_experts(weights, moe, plan)
    gone = {*plan.vanishing, *plan.novices}
    stored = moe.expert_ids
    rows = np.array([row for row, e in enumerate(stored) if e not in gone])
    experts = {name: take(leaf, rows, 0) for name, leaf in weights["experts"].items()}
    everything = range(moe.expert_width)
    neurons = [plan.neurons.get(stored[row], everything) for row in rows]
    if grams is not None:
        experts["down"] = repair_down(experts["down"], neurons, grams[rows])
    pruned = {**weights, "experts": _prune_neurons(experts, neurons, moe, smaller.expert_width)}
    if plan.vanishing:
        router_rows = np.setdiff1d(np.arange(moe.num_experts), list(plan.vanishing))
        kernel = take(weights["router"]["kernel"], router_rows, 1)
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
        "gate": take_neurons(experts["gate"], index[:, None, :], 2),
        "up": take_neurons(experts["up"], index[:, None, :], 2),
        "down": take_neurons(experts["down"], index[:, :, None], 1),
    }
