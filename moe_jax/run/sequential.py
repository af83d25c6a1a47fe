"""OBS layer by layer: each is measured on the output of the layers that were cut before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moe_jax.calibrate import LayerStream, warn_unreached
from moe_jax.calibrate.stream import Batches
from moe_jax.config import LayerConfig, ModelConfig
from moe_jax.metrics import progress_bar
from moe_jax.plan import LayerPlan, Plan, make_plan, neuron_prices, planned_config
from moe_jax.prune import apply_plan
from moe_jax.prune.leaves import take_neurons
from moe_jax.scoring import score
from moe_jax.statistics import Layers, Stats

REPAIR_TARGETS = ("original", "own")


@dataclass(frozen=True)
class SequentialCut:
    """What ``sequential_cut`` leaves.

    Attributes:
        config, params: the smaller model.
        plan: what was removed; with statistics that hold second moments, ``apply_plan`` makes the
            same weights of it.
        stats: of each layer, on what the layers before it, already cut, made of the text; without
            the residual stream's distances. ``removal_cost`` [E, F] is what each neuron's removal
            cost (see ``repair.removal_costs``).
    """

    config: ModelConfig
    params: dict[str, Any]
    plan: Plan
    stats: Stats


def sequential_cut(
    params: dict[str, Any],
    config: ModelConfig,
    domains: Mapping[str, Batches],
    *,
    expert_width: int | None = None,
    width_ratio: float | None = None,
    round_to: int = 1,
    neuron_scope: Literal["expert", "layer"] = "expert",
    own_widths: bool = False,
    active_share: float = 0,
    constants: bool = False,
    repair: bool = True,
    repair_target: Literal["original", "own"] = "original",
    second_moment_bytes: int | None = None,
    keep_second_moments: bool = False,
    dtype: Any = None,
    backend: str = "auto",
    **options: Any,
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
        expert_width, width_ratio, round_to, neuron_scope, own_widths, constants, repair: as of
            ``make_plan``. With ``neuron_scope="layer"`` all layers are padded to the widest once it
            is known, unless experts have their own widths.
        active_share: what own widths count, see ``plan.neuron_prices``.
        repair_target: what repair is to come near to.
        second_moment_bytes: see ``calibrate.plan_second_moments``, of one layer.
        keep_second_moments: leave those of all layers (and the gaps) in the statistics, in host
            memory.
        dtype: of computation; None: the embedding's.
        backend: of ``ops.grouped_matmul``.
        options: others of ``make_plan`` about neurons.

    Raises:
        ValueError: no text, a width out of bounds, neurons ranked across layers (of which the later
            ones are not measured yet), or what does not fit in memory.
    """
    size: dict[str, Any] = {
        "expert_width": expert_width,
        "width_ratio": width_ratio,
        "round_to": round_to,
        "neuron_scope": neuron_scope,
        "own_widths": own_widths,
        "constants": constants,
        "repair": repair,
        **options,
    }
    _check_size(config, size)
    if repair_target not in REPAIR_TARGETS:
        raise ValueError(f"repair_target must be one of {REPAIR_TARGETS}, got {repair_target!r}")
    stream = LayerStream(
        params,
        config,
        domains,
        follow_original=repair and repair_target == "original",
        second_moment_bytes=second_moment_bytes,
        dtype=dtype,
        backend=backend,
    )
    layers, shapes = list(params["layers"]), list(config.layers)
    plans: dict[int, LayerPlan] = {}
    measured: list[Stats] = []
    settings: dict[str, Any] = {}
    with progress_bar(config.num_layers, "layer by layer", "layer") as bar:
        for i in range(config.num_layers):
            if i in config.moe_layers:
                stats = stream.measure(layers[i])
                stats, plan = _planned(
                    stats, layers[i], _alone(config, shapes[i]), i, size, active_share
                )
                shapes[i], layers[i] = _cut(stats, layers[i], shapes[i], config, i, plan)
                plans[i], settings = plan.layers[0], plan.settings
                measured.append(stats if keep_second_moments else _without_second_moments(stats))
            stream.advance(layers[i], shapes[i])
            bar.update()
    settings = {**settings, "sequential": True, "repair_target": repair_target}
    plan = Plan(_padded_alike(plans, config), "obs", settings)
    smaller = planned_config(config, plan)
    for i, layer in plan.layers.items():
        if layer.padded_width is not None:
            layers[i] = {**layers[i], "moe": _padded(layers[i]["moe"], layer.padded_width)}
    together = _together(measured)
    warn_unreached(together)
    return SequentialCut(smaller, {**params, "layers": layers}, plan, together)


def _check_size(config: ModelConfig, size: Mapping[str, Any]) -> None:
    """Raises ValueError before any work for what no layer can be cut to."""
    if size["neuron_scope"] not in ("expert", "layer"):
        raise ValueError(
            "neuron_scope must be 'expert' or 'layer' where layers are cut one after the other, "
            f"got {size['neuron_scope']!r}"
        )
    for i in config.moe_layers:
        shape = (config.moe(i).num_experts, config.moe(i).expert_width)
        falling = np.broadcast_to(np.arange(shape[1], 0, -1.0), shape)
        make_plan({0: falling}, _alone(config, config.layers[i]), **size)


def _alone(config: ModelConfig, shape: LayerConfig) -> ModelConfig:
    """A model of one layer, as score, plan and cut of that layer see it."""
    return dataclasses.replace(config, layers=(shape,))


def _as_first(stats: Stats, i: int) -> Stats:
    return Stats({0: stats.layers[i]}, stats.tokens, stats.sequences, stats.batches)


def _planned(
    stats: Stats, weights, alone: ModelConfig, i: int, size: Mapping[str, Any], active_share: float
) -> tuple[Stats, Plan]:
    """Statistics with the costs, and what goes from a layer, as a plan for that layer alone."""
    first = _as_first(stats, i)
    model = ({"layers": [weights]}, alone)
    scores = score(first, "obs", model=model, constant=size["constants"])
    prices = neuron_prices(first, active_share) if size["own_widths"] else None
    plan = make_plan(scores, alone, **size, neuron_prices=prices, method="obs")
    arrays = {**stats.layers[i], "removal_cost": scores[0]}
    return dataclasses.replace(stats, layers={i: arrays}), plan


def _cut(
    stats: Stats, weights, shape: LayerConfig, config: ModelConfig, i: int, plan: Plan
) -> tuple[LayerConfig, dict[str, Any]]:
    smaller, params = apply_plan(
        {"layers": [weights]}, _alone(config, shape), plan, _as_first(stats, i)
    )
    return smaller.layers[0], params["layers"][0]


def _padded_alike(plans: Mapping[int, LayerPlan], config: ModelConfig) -> dict[int, LayerPlan]:
    """The same with one stored width, or a narrower layer's own, where layers are padded."""
    widest = max((plan.padded_width or 0 for plan in plans.values()), default=0)
    return {
        i: dataclasses.replace(plan, padded_width=min(widest, config.moe(i).expert_width))
        if plan.padded_width is not None
        else plan
        for i, plan in plans.items()
    }


def _padded(moe: dict[str, Any], width: int) -> dict[str, Any]:
    """A layer's experts filled up with neurons whose weights are zero."""
    experts = {}
    for name, leaf in moe["experts"].items():
        axis = 1 if name == "down" else 2
        index = np.expand_dims(np.tile(np.arange(width), (len(leaf), 1)), 3 - axis)
        experts[name] = leaf if leaf.shape[axis] == width else take_neurons(leaf, index, axis)
    return {**moe, "experts": experts}


def _without_second_moments(stats: Stats) -> Stats:
    layers: Layers = {
        i: {n: array for n, array in layer.items() if n not in ("hidden_gram", "hidden_gap")}
        for i, layer in stats.layers.items()
    }
    return dataclasses.replace(stats, layers=layers)


def _together(parts: list[Stats]) -> Stats:
    """Statistics of several layers of the same text as one."""
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
        {i: groups for part in parts for i, groups in part.attention.items()},
    )
