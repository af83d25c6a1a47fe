"""Applies a Plan to weights: pure transforms of the nested dict, jitted leaf by leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moe_jax.config import LayerConfig, ModelConfig, MoeConfig
from moe_jax.params import Leaf, abstract_params, split_experts, stack_experts
from moe_jax.plan import LayerPlan, Plan, planned_config
from moe_jax.prune.attention_repair import attention_moments, kept_heads, repair_attention
from moe_jax.prune.leaves import fit_neurons, take
from moe_jax.prune.measured import measured
from moe_jax.prune.merge import merge_experts
from moe_jax.prune.repair import (
    compensated_bias,
    repair_experts,
    second_moments,
    stream_gaps,
)
from moe_jax.statistics import Stats


def apply_plan(
    params: dict[str, Any], config: ModelConfig, plan: Plan, stats: Stats | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """The smaller model; the arguments are left as they are.

    Args:
        params, config: the model to prune; sharded leaves stay sharded the same way.
        plan: what to remove. Experts are merged first; neurons that it names are the merged
            expert's, in the order of the one that stays.
        stats: needed for novices, unless they are zero, for constants and for repair.

    Returns:
        The new configuration and weights. Arrays that the plan does not change are shared with
        ``params``.

    Raises:
        ValueError: the plan does not fit the model, or novices that are no zeros, constants or
            repair without statistics of this model.
    """
    smaller = planned_config(config, plan)
    in_place = planned_config(config, dataclasses.replace(plan, dropped_layers=()))
    made = {
        i: _from_statistics(layer_plan, params["layers"][i]["moe"], config.moe(i), i, stats)
        for i, layer_plan in plan.layers.items()
        if i in config.moe_layers
    }
    mixed = {
        i: attention_moments(config.layers[i], config.head_dim, i, stats)
        for i, layer_plan in plan.layers.items()
        if layer_plan.repair and layer_plan.kv_groups is not None
    }
    leaves = abstract_params(config)["layers"]
    layers = list(params["layers"])
    for i, layer_plan in sorted(plan.layers.items()):
        old, weights = config.layers[i], dict(layers[i])
        if (groups := layer_plan.kv_groups) is not None:
            attention = weights["attention"]
            if i in mixed:
                attention = repair_attention(attention, old, groups, mixed[i])
            weights["attention"] = _prune_attention(attention, leaves[i]["attention"], old, groups)
        if isinstance(old.feed_forward, MoeConfig):
            weights["moe"] = _prune_experts(
                weights["moe"],
                old.feed_forward,
                layer_plan,
                in_place.moe(i),
                made[i],
            )
        layers[i] = weights
    layers = [layer for i, layer in enumerate(layers) if i not in plan.dropped_layers]
    return smaller, {**params, "layers": layers}


class _Made(NamedTuple):
    """What one layer needs of statistics; None where its plan asks for none.

    Attributes:
        novices: constants of the new novices, [n, D].
        grams: second moments of stored experts, [E_kept, F + 1, F + 1].
        gaps: what pulls them towards the original's stream, [E_kept, F + 1, D], if measured.
        neuron_means: mean activations of stored experts, [E_kept, F].
    """

    novices: np.ndarray | tuple[()]
    grams: np.ndarray | None
    gaps: np.ndarray | None
    neuron_means: np.ndarray | None


def _from_statistics(plan: LayerPlan, weights, moe: MoeConfig, i: int, stats) -> _Made:
    novices = _novice_means(plan, weights, moe, i, stats) if plan.novices else ()
    repairs = plan.repair and (plan.neurons or plan.constants)
    grams = second_moments(moe, i, stats) if repairs else None
    gaps = stream_gaps(moe, i, stats) if repairs else None
    means = None
    if plan.constants and not plan.repair:
        shape = (moe.num_experts, moe.expert_width)
        means = _statistic("neuron_mean", shape, i, stats)[list(moe.expert_ids)]
    return _Made(novices, grams, gaps, means)


def _novice_means(plan: LayerPlan, weights, moe: MoeConfig, i: int, stats: Stats | None):
    """Constants of the new novices, [n, D], in the order of ``plan.novices``."""
    width = weights["router"]["kernel"].shape[0]
    ids = list(plan.novices)
    if plan.novice_value == "zero":
        return np.zeros((len(ids), width), np.float32)
    if plan.novice_value == "least_squares":
        grams, gaps = second_moments(moe, i, stats), stream_gaps(moe, i, stats)
        return _least_squares(weights, moe, ids, grams, gaps)
    name = "output_mean" if plan.novice_value == "mean" else "gated_output"
    values = _statistic(name, (moe.num_experts, width), i, stats)[ids]
    if name == "output_mean":
        return values
    return _weighted_means(values, _statistic("routing_mass", (moe.num_experts,), i, stats)[ids])


def _statistic(name: str, shape: tuple[int, ...], i: int, stats: Stats | None) -> np.ndarray:
    need = "constants take means of outputs from statistics; pass stats"
    return measured(stats.layers if stats else None, i, name, shape, need)


def _least_squares(weights, moe: MoeConfig, ids: Sequence[int], grams, gaps) -> np.ndarray:
    """What repair leaves of experts that keep no neuron: their constants."""
    rows = np.array([moe.expert_ids.index(e) for e in ids])
    down = stack_experts(weights["experts"], moe)["down"][rows]
    bias = _biases(weights, moe, rows)
    gaps = None if gaps is None else gaps[rows]
    _, constants = repair_experts(down, bias, [()] * len(rows), grams[rows], gaps)
    return np.asarray(constants, np.float32)


def _biases(weights, moe: MoeConfig, rows: np.ndarray) -> Array:
    """The constants of stored experts, zeros if they have none."""
    if moe.expert_bias:
        return take(weights["expert_bias"], rows, 0)
    kernel = weights["router"]["kernel"]
    return jnp.zeros((len(rows), kernel.shape[0]), kernel.dtype)


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
    index = {"heads": kept_heads(layer, groups), "kv_heads": kv_heads}

    def chosen(leaf: Leaf, array: Array) -> Array:
        for axis, name in enumerate(leaf.axes):
            if name in index:
                array = take(array, index[name], axis)
        return array

    return jax.tree.map(chosen, leaves, weights, is_leaf=lambda node: isinstance(node, Leaf))


def _prune_experts(weights, moe: MoeConfig, plan: LayerPlan, smaller: MoeConfig, made: _Made):
    weights = {**weights, "experts": stack_experts(weights["experts"], moe)}
    if plan.merges:
        weights = merge_experts(weights, moe, plan)
    left = [e for e in range(moe.num_experts) if e not in plan.vanishing]
    ids = [left[e] for e in smaller.expert_ids]
    rows = np.array([moe.expert_ids.index(e) for e in ids])
    neurons = [plan.neurons.get(e, range(moe.width_of(e))) for e in ids]
    experts = {name: take(leaf, rows, 0) for name, leaf in weights["experts"].items()}
    bias = _biases(weights, moe, rows) if smaller.expert_bias else None
    if made.grams is not None:
        gaps = None if made.gaps is None else made.gaps[rows]
        experts["down"], bias = repair_experts(
            experts["down"], bias, neurons, made.grams[rows], gaps
        )
    elif bias is not None and made.neuron_means is not None:
        bias = compensated_bias(experts["down"], bias, neurons, made.neuron_means[rows])
    experts = _prune_neurons(experts, neurons, moe, smaller.expert_width)
    pruned = {**weights, "experts": split_experts(experts, smaller)}
    if bias is not None:
        pruned["expert_bias"] = bias
    if plan.vanishing:
        kernel = take(weights["router"]["kernel"], np.array(left), 1)
        pruned["router"] = {**weights["router"], "kernel": kernel}
    if plan.vanishing or plan.novices:
        pruned.pop("novices", None)
        constants = _novice_constants(weights, moe, plan, made.novices)
        if constants:
            ordered = np.stack([constants[e] for e in sorted(constants)])
            dtype = experts["down"].dtype
            pruned["novices"] = {"constant": jnp.asarray(ordered).astype(dtype)}
    return pruned


def _novice_constants(weights, moe: MoeConfig, plan: LayerPlan, means) -> dict[int, np.ndarray]:
    """By router row before the plan: the new novices and those of the old that stay."""
    constants = dict(zip(plan.novices, means, strict=True))
    for row, e in enumerate(moe.novice_ids):
        if e not in plan.deleted:
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
    return fit_neurons(experts, index)
