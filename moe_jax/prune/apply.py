"""Applies a Plan to weights: pure transforms of the nested dict, jitted array by array.

A cut of a layer is an index for each letter of ``params.AXES`` along which something goes: router
rows (R), experts with neurons (E), their own neurons (F), novices (C), the shared expert's neurons
(U), key/value heads (G) and the query heads that read them (N). Every parameter that has the letter
is cut by it, whatever its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import LayerConfig, ModelConfig, MoeConfig
from moe_jax.params import abstract_params, split_experts
from moe_jax.plan import LayerPlan, Plan, planned_config
from moe_jax.processes import gather, mesh_of, spec_tree
from moe_jax.prune.compensation import (
    Compensation,
    LayerStatistics,
    compensated_bias,
    compensation,
    expert_constants,
    repair_attention,
    repair_experts,
    repair_shared,
)
from moe_jax.prune.merging import merge_experts
from moe_jax.prune.slicing import cut_leaves, neuron_index, stacked
from moe_jax.statistics import Stats
from moe_jax.stored import in_turn


def apply_plan(
    params: dict[str, Any], config: ModelConfig, plan: Plan, stats: Stats | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """The smaller model; the arguments are left as they are.

    Args:
        params, config: the model to prune, on one device or on a mesh, see ``load_hf``.
        plan: what to remove. Experts are merged first; neurons that it names are the merged
            expert's, in the order of the one that stays.
        stats: needed for novices, unless they are zero, for constants and for repair.

    Returns:
        The new configuration and weights. Arrays that the plan does not change are shared with
        ``params``.

    Raises:
        ValueError: the plan does not fit the model, or leaves sizes that its mesh does not divide
            (see ``processes.leaf_shardings``), or novices that are no zeros, constants or repair
            without statistics of this model.
    """
    smaller = planned_config(config, plan)
    if (mesh := mesh_of(params)) is not None:
        spec_tree(smaller, mesh)  # what the mesh does not divide is refused before any work
    in_place = planned_config(config, dataclasses.replace(plan, dropped_layers=()))
    old, new = (abstract_params(model)["layers"] for model in (config, in_place))
    layers = list(params["layers"])
    # All is read before the first layer is cut: what is missing is said before any work.
    made = {
        i: compensation(layer, config.layers[i], old[i], layers[i], LayerStatistics(i, stats))
        for i, layer in sorted(plan.layers.items())
    }
    for i, comp in made.items():
        shapes = (config.layers[i], in_place.layers[i])
        layers[i] = _cut((old[i], new[i]), layers[i], shapes, plan.layers[i], comp)
    layers = [layer for i, layer in enumerate(layers) if i not in plan.dropped_layers]
    params = {**params, "layers": layers}
    if (mesh := mesh_of(params)) is not None:  # constants that were made lie on one device
        params = jax.device_put(params, spec_tree(smaller, mesh))
    return smaller, params


def cut_in_turn(
    params: dict[str, Any],
    config: ModelConfig,
    plan: Plan,
    stats: Stats | None = None,
    first: int = 0,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The layers that ``apply_plan`` leaves with their new numbers, each made when asked for.

    The arguments are those of ``apply_plan``; of a model on disk (see ``stored``), one layer is in
    memory at a time. Those before the new number ``first`` are passed over.
    """
    in_place = planned_config(config, dataclasses.replace(plan, dropped_layers=()))
    old, new = (abstract_params(model)["layers"] for model in (config, in_place))
    layers = in_turn(params)["layers"]
    kept = [i for i in range(config.num_layers) if i not in plan.dropped_layers]
    for n, i in list(enumerate(kept))[first:]:
        layer, weights = config.layers[i], layers[i]
        if i in plan.layers:
            statistics, shapes = LayerStatistics(i, stats), (layer, in_place.layers[i])
            weights = _cut(
                (old[i], new[i]), weights, shapes, plan.layers[i],
                compensation(plan.layers[i], layer, old[i], weights, statistics),
            )  # fmt: skip
        yield n, weights
        del weights  # before the next layer is read


def _cut(
    leaves: tuple[dict[str, Any], dict[str, Any]],
    weights: dict[str, Any],
    shapes: tuple[LayerConfig, LayerConfig],
    plan: LayerPlan,
    made: Compensation,
) -> dict[str, Any]:
    """``cut_layer`` of a layer as it is stored; leaves and shapes are those before and after."""
    cut = cut_layer(*stacked(leaves[0], weights), shapes, plan, made)
    if "moe" in cut:
        experts = split_experts(cut["moe"]["experts"], leaves[1]["moe"]["experts"])
        cut["moe"] = {**cut["moe"], "experts": experts}
    return cut


def cut_layer(
    leaves: dict[str, Any],
    weights: dict[str, Any],
    shapes: tuple[LayerConfig, LayerConfig],
    plan: LayerPlan,
    made: Compensation,
) -> dict[str, Any]:
    """One layer's weights after its cut, experts stacked.

    Args:
        leaves, weights: of the layer, experts stacked; the leaves' sizes are not looked at.
        shapes: of the layer before and after.
        plan: what goes.
        made: what makes up for it.
    """
    old, new = (shape.feed_forward for shape in shapes)
    index: dict[str, np.ndarray] = {}
    if plan.kv_groups is not None:
        index = {"G": np.array(plan.kv_groups), "N": kept_heads(shapes[0], plan.kv_groups)}
        if made.mixed_gram is not None:
            attention = repair_attention(weights["attention"], index["N"], made.mixed_gram)
            weights = {**weights, "attention": attention}
    if not isinstance(old, MoeConfig) or not isinstance(new, MoeConfig):
        return cut_leaves(leaves, weights, index)
    if plan.merges:
        moe = merge_experts(leaves["moe"], weights["moe"], old, plan)
        weights = {**weights, "moe": moe}
    if plan.shared_neurons is not None:
        index["U"] = np.array(plan.shared_neurons)
        if made.shared_gram is not None:
            shared = repair_shared(weights["moe"]["shared"], index["U"], made.shared_gram)
            weights = {**weights, "moe": {**weights["moe"], "shared": shared}}
    left = [e for e in range(old.num_experts) if e not in plan.vanishing]
    experts = [left[row] for row in new.expert_ids]
    stored = [old.expert_ids.index(e) for e in experts]
    novices = [row for row, e in enumerate(old.novice_ids) if e not in plan.deleted]
    index |= {"R": np.array(left), "E": np.array(stored), "C": np.array(novices, int)}
    weights = cut_leaves(leaves, weights, index)
    neurons = [plan.neurons.get(e, range(old.width_of(e))) for e in experts]
    moe = _compensated(weights["moe"], new, neurons, stored, made)
    if any(len(kept) < old.expert_width for kept in neurons):
        among = {"F": neuron_index(neurons, old.expert_width, new.expert_width)}
        moe |= cut_leaves(leaves["moe"], {name: moe[name] for name in leaves["moe"]}, among)
    return {**weights, "moe": _with_novices(moe, old, plan, made)}


def kept_heads(layer: LayerConfig, kv_groups: Sequence[int]) -> np.ndarray:
    """The query heads that read these key/value heads, in their order."""
    by_kv_head = np.arange(layer.num_heads).reshape(layer.num_kv_heads, -1)
    return by_kv_head[np.array(kv_groups)].reshape(-1)


def _compensated(
    weights: dict[str, Any],
    moe: MoeConfig,
    neurons: Sequence[Sequence[int]],
    stored: Sequence[int],
    made: Compensation,
) -> dict[str, Any]:
    """The experts that stay, with what makes up for the neurons that they are about to lose."""
    down = weights["experts"]["down"]
    bias = expert_constants(weights) if moe.expert_bias else None
    if made.moments is not None:
        down, bias = repair_experts(down, bias, neurons, made.moments.of(stored))
    elif bias is not None and made.neuron_means is not None:
        bias = compensated_bias(down, bias, neurons, made.neuron_means[stored])
    weights = {**weights, "experts": {**weights["experts"], "down": down}}
    return weights if bias is None else {**weights, "expert_bias": bias}


def _with_novices(
    weights: dict[str, Any], moe: MoeConfig, plan: LayerPlan, made: Compensation
) -> dict[str, Any]:
    """The layer with its new novices among those that stay, in the order of their router rows."""
    staying = [e for e in moe.novice_ids if e not in plan.deleted]
    if not plan.novices:
        without = moe.novice_ids and not staying
        return {n: part for n, part in weights.items() if n != "novices" or not without}
    rows = dict(zip(plan.novices, made.novices, strict=True))
    for row, e in enumerate(staying):
        rows[e] = gather(weights["novices"]["constant"][row]).astype(np.float32)
    constants = jnp.asarray(np.stack([rows[e] for e in sorted(rows)]))
    dtype = weights.get("expert_bias", weights["experts"]["down"]).dtype
    return {**weights, "novices": {"constant": constants.astype(dtype)}}
