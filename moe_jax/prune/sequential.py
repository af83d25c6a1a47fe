"""A cut layer by layer: each is measured on the output of the layers that were cut before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_jax.calibrate import Batches, LayerStream, warn_unreached
from moe_jax.config import DenseConfig, LayerConfig, ModelConfig
from moe_jax.metrics import progress_bar
from moe_jax.params import expert_leaves
from moe_jax.plan import (
    Cut,
    LayerPlan,
    Plan,
    Planned,
    padded_alike,
    plan_cut,
    plan_ranked,
    planned_config,
)
from moe_jax.prune import apply_plan
from moe_jax.prune.slicing import cut_leaves
from moe_jax.statistics import Layers, Stats


@dataclass(frozen=True)
class SequentialCut:
    """What ``sequential_cut`` leaves.

    Attributes:
        config, params: the smaller model.
        plan: what was removed; with statistics that hold second moments, ``apply_plan`` makes the
            same weights of it.
        stats: of each layer, on what the layers before it, already cut, made of the text; without
            the residual stream's distances. ``removal_cost`` [E, F] is what each neuron's removal
            cost (see ``repair.removal_costs``), unless a plan was given.
    """

    config: ModelConfig
    params: dict[str, Any]
    plan: Plan
    stats: Stats


def sequential_cut(
    params: dict[str, Any],
    config: ModelConfig,
    domains: Mapping[str, Batches],
    cut: Cut | Plan,
    *,
    second_moment_bytes: int | None = None,
    keep_second_moments: bool = False,
    dtype: Any = None,
) -> SequentialCut:
    """Narrows every layer's experts by OBS, from the first layer to the last.

    A layer is measured, planned, cut and repaired before the next one is measured, on the output of
    the layers that are already cut. One layer's second moments live at a time, whatever the depth.
    The residual stream of the text, ``positions x D`` numbers of ``dtype``, stays in host memory.

    Repair brings a layer's output near its own of before the cut, on that input
    (``repair_target="own"``: about two forward passes in all), or it also brings the stream behind
    the layer near the original model's (``"original"``): what earlier layers lost is shared out
    among the token's experts, and each takes over what is linear in the neurons that it keeps. That
    takes a third pass, the original's stream, and from the second layer with experts on
    ``E (F + 1) D`` numbers beside the second moments.

    Args:
        params, config: the model.
        domains: calibration batches by name, from ``domain_batches``.
        cut: of method ``obs``, or the plan of such a cut, to do it again. With
            ``neuron_scope="layer"`` all layers are padded to the widest once it is known, unless
            experts have their own widths.
        second_moment_bytes: see ``calibrate.plan_second_moments``, of one layer.
        keep_second_moments: leave those of all layers (and the gaps) in the statistics, in host
            memory.
        dtype: of computation; None: the embedding's.

    Raises:
        ValueError: no layer with experts, a domain without text, a width out of bounds, neurons
            ranked across layers (of which the later ones are not measured yet), or what does not
            fit in memory.
    """
    config.require_experts("a cut")
    repairs, target = _check(cut, config)
    stream = LayerStream(
        params,
        config,
        domains,
        follow_original=repairs and target == "original",
        second_moment_bytes=second_moment_bytes,
        dtype=dtype,
    )
    layers, shapes = list(params["layers"]), list(config.layers)
    plans: dict[int, LayerPlan] = {}
    measured: list[Stats] = []
    dense: Layers = {}
    settings: dict[str, Any] = {}
    with progress_bar(config.num_layers, "layer by layer", "layer") as bar:
        for i in range(config.num_layers):
            if i in config.moe_layers:
                stats, plan, shapes[i], layers[i] = _cut_layer(stream, layers, config, i, cut)
                plans[i], settings = plan.layers[i], plan.settings
                measured.append(stats if keep_second_moments else _without_second_moments(stats))
            else:
                dense[i] = stream.attention(layers[i])
            stream.advance(layers[i], shapes[i])
            bar.update()
    plans, layers = _pad_alike(plans, layers, config)
    plan = Plan(plans, "obs", {**settings, "sequential": True, "repair_target": target})
    together = _together(measured, dense)
    warn_unreached(together)
    return SequentialCut(planned_config(config, plan), {**params, "layers": layers}, plan, together)


def _check(cut: Cut | Plan, config: ModelConfig) -> tuple[bool, str]:
    """Whether the cut repairs, and toward what; raises ValueError for what no layer allows."""
    if isinstance(cut, Plan):
        planned_config(config, cut)
        target = cut.settings.get("repair_target", "original")
        return any(layer.repair for layer in cut.layers.values()), target
    dataclasses.replace(cut, sequential=True).check()
    for i in config.moe_layers:
        shape = (config.moe(i).num_experts, config.moe(i).expert_width)
        falling = np.broadcast_to(np.arange(shape[1], 0, -1.0), shape)
        plan_ranked(cut, _alone(config, i), Planned(Plan({}), {i: falling}))
    return cut.repairs, cut.repair_target


def _alone(config: ModelConfig, i: int) -> ModelConfig:
    """The model as if layer ``i`` alone had experts, for score, plan and cut of that layer."""
    layers = [dataclasses.replace(layer, feed_forward=DenseConfig(1)) for layer in config.layers]
    layers[i] = config.layers[i]
    return dataclasses.replace(config, layers=tuple(layers))


def _cut_layer(
    stream: LayerStream,
    layers: list[dict[str, Any]],
    config: ModelConfig,
    i: int,
    cut: Cut | Plan,
) -> tuple[Stats, Plan, LayerConfig, dict[str, Any]]:
    """Measures, plans, cuts and repairs layer ``i``.

    Returns:
        Its statistics with the costs, a plan for it alone, and what it then is: sizes and weights.
    """
    alone, params = _alone(config, i), {"layers": layers}
    stats = stream.measure(layers[i])
    if isinstance(cut, Plan):
        plan = dataclasses.replace(cut, layers={i: _as_planned(cut, config, i)})
    else:
        at_once = dataclasses.replace(cut, sequential=False)
        planned = plan_cut(at_once, stats, alone, params=params)
        plan, arrays = planned.plan, {**stats.layers[i], "removal_cost": planned.scores[i]}
        stats = dataclasses.replace(stats, layers={i: arrays})
    smaller, slimmed = apply_plan(params, alone, plan, stats)
    return stats, plan, smaller.layers[i], slimmed["layers"][i]


def _as_planned(plan: Plan, config: ModelConfig, i: int) -> LayerPlan:
    """A layer's plan as it was before all layers were padded to the widest of the model.

    Later layers were measured behind this width, and sums over another one round otherwise.
    """
    layer = plan.layers[i]
    if layer.padded_width is None:
        return layer
    return padded_alike({i: layer}, config, plan.settings.get("round_to", 1))[i]


def _pad_alike(
    plans: Mapping[int, LayerPlan], layers: Sequence[dict[str, Any]], config: ModelConfig
) -> tuple[dict[int, LayerPlan], list[dict[str, Any]]]:
    """Plans and weights with one stored width, or a narrower layer's own, where they are padded."""
    widest = max((plan.padded_width or 0 for plan in plans.values()), default=0)
    padded_plans, padded_layers = dict(plans), list(layers)
    for i, plan in plans.items():
        if plan.padded_width is None:
            continue
        width = min(widest, config.moe(i).expert_width)
        padded_plans[i] = dataclasses.replace(plan, padded_width=width)
        if plan.padded_width < width:
            moe = layers[i]["moe"]
            index = np.tile(np.arange(width), (len(moe["experts"]["down"]), 1))
            experts = cut_leaves(expert_leaves(config, i), moe["experts"], {"F": index})
            padded_layers[i] = {**layers[i], "moe": {**moe, "experts": experts}}
    return padded_plans, padded_layers


def _without_second_moments(stats: Stats) -> Stats:
    layers: Layers = {
        i: {n: array for n, array in layer.items() if n not in ("hidden_gram", "hidden_gap")}
        for i, layer in stats.layers.items()
    }
    return dataclasses.replace(stats, layers=layers)


def _together(parts: list[Stats], dense: Layers) -> Stats:
    """Statistics of several layers of the same text as one, with the attention of dense ones."""
    first = parts[0]
    domains: dict[str, Any] = {}
    for part in parts:
        for name, facts in part.facts["domains"].items():
            told = domains.setdefault(name, {**facts, "count": {}})
            told["count"] |= facts["count"]
    return Stats(
        {i: layer for part in parts for i, layer in part.layers.items()},
        first.tokens,
        first.sequences,
        first.batches,
        {"domains": domains},
        dense | {i: groups for part in parts for i, groups in part.attention.items()},
    )
