"""Applies a Plan to weights: pure transforms of the nested dict, jitted leaf by leaf."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from moe_jax.config import ModelConfig, MoeConfig
from moe_jax.plan import LayerPlan, Plan, validate_plan
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
        The new configuration and weights. Layers that the plan does not name share their arrays
        with ``params``.

    Raises:
        ValueError: the plan does not fit the model, or mean novices without statistics of this
            model.
    """
    validate_plan(plan, config)
    layers = list(params["layers"])
    for i, layer_plan in sorted(plan.layers.items()):
        moe = config.moe(i)
        means = _novice_means(layer_plan, moe, config.width, i, stats)
        new_moe, weights = _prune_layer(layers[i]["moe"], moe, layer_plan, means)
        layers[i] = {**layers[i], "moe": weights}
        config = config.replace_moe(
            i,
            num_experts=new_moe.num_experts,
            expert_width=new_moe.expert_width,
            novice_ids=new_moe.novice_ids,
        )
    return config, {**params, "layers": layers}


def _novice_means(plan: LayerPlan, moe: MoeConfig, width: int, i: int, stats: Stats | None):
    """Constants of the new novices, [n, D], in the order of ``plan.novices``."""
    if not plan.novices or plan.novice_value == "zero":
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


def _prune_layer(weights, moe: MoeConfig, plan: LayerPlan, means):
    stored = {e: row for row, e in enumerate(moe.expert_ids)}
    gone = set(plan.deleted) | set(plan.novices)
    kept = [e for e in moe.expert_ids if e not in gone]
    rows = np.array([stored[e] for e in kept])
    experts = {name: _take(leaf, rows, 0) for name, leaf in weights["experts"].items()}
    expert_width = moe.expert_width
    if plan.neurons:
        everything = range(moe.expert_width)
        neurons = np.array([sorted(plan.neurons.get(e, everything)) for e in kept])
        expert_width = neurons.shape[1]
        if expert_width < moe.expert_width:
            experts = {
                "gate": _take_neurons(experts["gate"], neurons[:, None, :], 2),
                "up": _take_neurons(experts["up"], neurons[:, None, :], 2),
                "down": _take_neurons(experts["down"], neurons[:, :, None], 1),
            }
    router_rows = [e for e in range(moe.num_experts) if e not in set(plan.deleted)]
    new_id = {e: row for row, e in enumerate(router_rows)}
    router = weights["router"]
    if plan.deleted:
        router = {"kernel": _take(router["kernel"], np.array(router_rows), 1)}
    new_weights = {**weights, "router": router, "experts": experts}
    new_weights.pop("novices", None)
    constants = dict(zip(plan.novices, means, strict=True))
    for row, e in enumerate(moe.novice_ids):
        if e in new_id and e not in constants:
            constants[e] = np.asarray(weights["novices"]["constant"][row], np.float32)
    novice_ids = sorted(e for e in constants if e in new_id)
    if novice_ids:
        dtype = weights["experts"]["down"].dtype
        constant = jnp.asarray(np.stack([constants[e] for e in novice_ids])).astype(dtype)
        new_weights["novices"] = {"constant": constant}
    new_moe = MoeConfig(
        len(router_rows),
        moe.experts_per_token,
        expert_width,
        tuple(new_id[e] for e in novice_ids),
    )
    return new_moe, new_weights


def _take(leaf: Array, index: np.ndarray, axis: int) -> Array:
    if index.size == leaf.shape[axis]:
        return leaf
    return _placed_like(_jit_take(leaf, index, axis), leaf)


def _take_neurons(leaf: Array, index: np.ndarray, axis: int) -> Array:
    return _placed_like(_jit_take_along(leaf, index, axis), leaf)


def _placed_like(new: Array, old: Array) -> Array:
    """Keeps a NamedSharding, so that pruning a sharded model gives one."""
    sharding = getattr(old, "sharding", None)
    return jax.device_put(new, sharding) if isinstance(sharding, NamedSharding) else new


_jit_take = jax.jit(lambda leaf, index, axis: jnp.take(leaf, index, axis), static_argnums=2)
_jit_take_along = jax.jit(
    lambda leaf, index, axis: jnp.take_along_axis(leaf, index, axis), static_argnums=2
)
