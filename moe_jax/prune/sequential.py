"""A cut layer by layer: each is measured on the output of the layers that were cut before it."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moe_jax.calibrate import Batches, LayerMeasurement, LayerStream, LayerWanted, warn_unreached
from moe_jax.config import DenseConfig, LayerConfig, ModelConfig
from moe_jax.layer_store import LayerStore
from moe_jax.metrics import progress_bar
from moe_jax.params import expert_leaves
from moe_jax.plan import (
    Cut,
    LayerPlan,
    Plan,
    Planned,
    padded_alike,
    parse_plan,
    plan_cut,
    plan_ranked,
    planned_config,
)
from moe_jax.prune import apply_plan
from moe_jax.prune.slicing import cut_leaves
from moe_jax.statistics import Stats, joined
from moe_jax.statistics_table import SHARED
from moe_jax.stored import in_memory, in_turn

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SequentialCut:
    """What ``sequential_cut`` leaves.

    Attributes:
        config, params: the smaller model; its layers are on disk if they were stored.
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
    measurement: LayerMeasurement = LayerMeasurement(),  # noqa: B008, immutable
    *,
    keep_second_moments: bool = False,
    store: LayerStore | None = None,
) -> SequentialCut:
    """Narrows every layer's experts by OBS, from the first layer to the last.

    A layer is measured, planned, cut and repaired before the next one is measured, on the output of
    the layers that are already cut. One layer's second moments live at a time, whatever the depth.
    The residual stream of the text, ``positions x D`` numbers of ``dtype``, stays in host memory,
    or in files beside ``store``.

    With ``shared_width`` the shared expert is narrowed by OBS and repaired, too, toward its own
    output on that input, whatever the target of the routed ones is.

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
        measurement: how each layer is measured (bound, dtype, backend); what is measured of it
            follows from the cut.
        keep_second_moments: leave those of all layers (and the gaps) in the statistics, in host
            memory.
        store: where each layer goes as soon as it is cut, for models on disk (see ``stored``):
            one layer is in memory at a time. A call that was killed, made again, goes on after
            the last layer that is there.

    Raises:
        ValueError: no layer with experts, a domain without text, a width out of bounds, neurons
            ranked across layers (of which the later ones are not measured yet), or what does not
            fit in memory.
    """
    config.require_experts("a cut")
    if store is not None and keep_second_moments:
        raise ValueError("keep_second_moments needs all layers in memory: it goes without store")
    repairs, target, moments = _check(cut, config)
    if store is not None:
        _drop_unreadable(store, config.num_layers)
    measurement = dataclasses.replace(
        measurement,
        wanted=LayerWanted(shared=moments),
        follow_original=repairs and target == "original",
    )
    folder = None if store is None else store.folder / "stream"
    stream = LayerStream(params, config, domains, measurement, folder=folder)
    sources = in_turn(params)["layers"]
    found = list(_cut_in_turn(stream, sources, config, cut, store, keep_second_moments))
    planned = {i: layer.plan for i, layer in enumerate(found) if layer.plan is not None}
    plans = {i: plan.layers[i] for i, plan in planned.items()}
    plans, layers = _pad_alike(plans, [layer.weights for layer in found], config, store)
    stream.remove()
    settings = {**planned[max(planned)].settings, "sequential": True, "repair_target": target}
    plan = Plan(plans, "obs", settings)
    together = joined([layer.stats for layer in found])
    warn_unreached(together)
    return SequentialCut(planned_config(config, plan), {**params, "layers": layers}, plan, together)


def _check(cut: Cut | Plan, config: ModelConfig) -> tuple[bool, str, bool]:
    """Whether the cut repairs, toward what, and whether that takes shared experts' second moments.

    Raises:
        ValueError: what no layer allows.
    """
    if isinstance(cut, Plan):
        planned_config(config, cut)
        target = cut.settings.get("repair_target", "original")
        repaired = [layer for layer in cut.layers.values() if layer.repair]
        return bool(repaired), target, any(la.shared_neurons is not None for la in repaired)
    dataclasses.replace(cut, sequential=True).check()
    for i in config.moe_layers:
        shape = (config.moe(i).num_experts, config.moe(i).expert_width)
        falling = np.broadcast_to(np.arange(shape[1], 0, -1.0), shape)
        shared = config.moe(i).shared
        own = {i: np.arange(shared.width, 0, -1.0)} if shared and cut.narrows_shared else {}
        ranked = Planned(Plan({}), {i: falling}, shared_scores=own)
        plan_ranked(cut, _alone(config, i), ranked)
    return cut.repairs, cut.repair_target, cut.needs_shared_moments


def _alone(config: ModelConfig, i: int) -> ModelConfig:
    """The model as if layer ``i`` alone had experts, for score, plan and cut of that layer."""
    layers = [dataclasses.replace(layer, feed_forward=DenseConfig(1)) for layer in config.layers]
    layers[i] = config.layers[i]
    return dataclasses.replace(config, layers=tuple(layers))


class _Layer(NamedTuple):
    """A layer after its cut.

    Attributes:
        stats: of the layer, with the costs of its neurons.
        plan: for it alone; None of a dense one.
        shape, weights: what it then is.
    """

    stats: Stats
    plan: Plan | None
    shape: LayerConfig
    weights: dict[str, Any]


def _drop_unreadable(store: LayerStore, count: int) -> None:
    """Empties a store of which a layer's statistics are damaged, or of another version's format.

    The stream is behind the last layer that was cut: no earlier one could be measured again.
    """
    try:
        for i in filter(store.has, range(count)):
            Stats.load(store.folder / f"statistics-{i}")
    except (OSError, ValueError) as error:
        _logger.warning("cutting all layers again: %s", error)
        shutil.rmtree(store.folder)


def _cut_in_turn(
    stream: LayerStream,
    sources: Sequence[dict[str, Any]],
    config: ModelConfig,
    cut: Cut | Plan,
    store: LayerStore | None,
    keep_second_moments: bool,
) -> Iterator[_Layer]:
    """Each layer after its cut, which the stream has passed."""
    with progress_bar(config.num_layers, "layer by layer", "layer") as bar:
        for i in range(config.num_layers):
            if store is not None and store.has(i):
                found = _stored(store, config, i)
            else:
                found = _kept(store, i, _cut_layer(stream, sources[i], config, i, cut))
            if not keep_second_moments:
                found = found._replace(stats=found.stats.without_requested())
            if stream.layer == i:
                stream.advance(in_memory(found.weights), found.shape)
            bar.update()
            yield found


def _stored(store: LayerStore, config: ModelConfig, i: int) -> _Layer:
    """A layer that an earlier call has cut."""
    told, stats = store.about(i), Stats.load(store.folder / f"statistics-{i}")
    if told is None:
        return _Layer(stats, None, config.layers[i], store.layer(i))
    plan = parse_plan(json.dumps(told), store.folder)
    shape = planned_config(_alone(config, i), plan).layers[i]
    return _Layer(stats, plan, shape, store.layer(i))


def _kept(store: LayerStore | None, i: int, layer: _Layer) -> _Layer:
    """A layer whose weights are on disk from here on, if there is a store."""
    if store is None:
        return layer
    layer.stats.without_requested().save(store.folder / f"statistics-{i}")
    told = None if layer.plan is None else json.loads(layer.plan.to_json())
    store.write(i, layer.weights, told)
    return layer._replace(weights=store.layer(i))


def _cut_layer(
    stream: LayerStream, weights: dict[str, Any], config: ModelConfig, i: int, cut: Cut | Plan
) -> _Layer:
    """Measures, plans, cuts and repairs layer ``i``; a dense one stays."""
    if i not in config.moe_layers:
        stats = Stats({}, 0, 0, 0, attention={i: stream.attention(weights)})
        return _Layer(stats, None, config.layers[i], weights)
    alone = _alone(config, i)
    layers = [weights if j == i else {} for j in range(config.num_layers)]
    params = {"layers": layers}
    stats = stream.measure(weights)
    if isinstance(cut, Plan):
        plan = dataclasses.replace(cut, layers={i: _as_planned(cut, config, i)})
    else:
        at_once = dataclasses.replace(cut, sequential=False)
        planned = plan_cut(at_once, stats, alone, params=params)
        plan, arrays = planned.plan, {**stats.layers[i], "removal_cost": planned.scores[i]}
        if planned.shared_scores:
            arrays[f"{SHARED}removal_cost"] = planned.shared_scores[i][None]
        stats = dataclasses.replace(stats, layers={i: arrays})
    smaller, slimmed = apply_plan(params, alone, plan, stats)
    return _Layer(stats, plan, smaller.layers[i], slimmed["layers"][i])


def _as_planned(plan: Plan, config: ModelConfig, i: int) -> LayerPlan:
    """A layer's plan as it was before all layers were padded to the widest of the model.

    Later layers were measured behind this width, and sums over another one round otherwise.
    """
    layer = plan.layers[i]
    if layer.padded_width is None:
        return layer
    steps = {name: plan.settings[name] for name in ("round_to", "mesh") if name in plan.settings}
    return padded_alike({i: layer}, config, Cut(**steps).width_step)[i]


def _pad_alike(
    plans: Mapping[int, LayerPlan],
    layers: Sequence[dict[str, Any]],
    config: ModelConfig,
    store: LayerStore | None,
) -> tuple[dict[int, LayerPlan], list[dict[str, Any]]]:
    """Plans and weights with one stored width, or a narrower layer's own, where they are padded."""
    widest = max((plan.padded_width or 0 for plan in plans.values()), default=0)
    padded_plans, padded_layers = dict(plans), list(layers)
    for i, plan in plans.items():
        if plan.padded_width is None:
            continue
        width = min(widest, config.moe(i).expert_width)
        padded_plans[i] = dataclasses.replace(plan, padded_width=width)
        if layers[i]["moe"]["experts"]["down"].shape[1] < width:
            layer = in_memory(layers[i])
            moe = layer["moe"]
            index = np.tile(np.arange(width), (len(moe["experts"]["down"]), 1))
            experts = cut_leaves(expert_leaves(config, i), moe["experts"], {"F": index})
            padded = {**layer, "moe": {**moe, "experts": experts}}
            if store is not None:
                store.write(i, padded, store.about(i))
                padded = store.layer(i)
            padded_layers[i] = padded
    return padded_plans, padded_layers
