"""How many hidden neurons experts keep, and which: of each expert, or across experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from moe_jax.config import ModelConfig, MoeConfig
from moe_jax.plan.budget import find_budget, largest_that_fits
from moe_jax.plan.cut import Cut
from moe_jax.plan.schema import LayerPlan, NoviceValue
from moe_jax.plan.scores import Scores, check_shape, highest
from moe_jax.plan.widths import kept_width, plan_layer_widths, plan_own_widths, width_bounds

Layers = dict[int, LayerPlan]


def plan_neurons(
    scores: Scores,
    config: ModelConfig,
    cut: Cut,
    prices: Scores | None = None,
    shared: Scores | None = None,
) -> Layers:
    """What neuron scores ``[E, F]`` remove.

    Args:
        scores, config, cut: as of ``make_plan``.
        shared: scores ``[U]`` of shared experts' neurons, which ``cut.rank_shared`` reads.
        prices: with own widths, what a neuron of each expert costs; see ``neuron_prices``.
    """
    if prices is not None and not cut.own_widths:
        raise ValueError("neuron_prices needs own_widths")
    orders = {}
    for i in config.moe_layers:
        moe = config.moe(i)
        check_shape("scores", i, scores[i], (moe.num_experts, moe.expert_width))
        if moe.expert_widths and not cut.own_widths:
            raise ValueError(f"layer {i}: its experts differ in width; a plan needs own_widths")
        if cut.neuron_scope == "layer" and not cut.own_widths:
            orders[i] = _layer_order(scores[i][list(moe.expert_ids)], *width_bounds(cut, moe, i))
    own = shared if cut.rank_shared else None
    if cut.neuron_scope == "layer_width":
        layers = plan_layer_widths(scores, config, cut, own)
        layers = layers if cut.own_widths else padded_alike(layers, config, cut.width_step)
    elif cut.own_widths:
        layers = plan_own_widths(scores, config, cut, prices, own)
    elif cut.neuron_scope == "layer":
        layers = _keep_in_layers(orders, config, _kept_widths(config, cut, orders), cut)
    else:
        layers = _keep_in_experts(scores, config, _kept_widths(config, cut, orders))
    value: NoviceValue = "least_squares" if cut.repairs else "mean"
    return {
        i: dataclasses.replace(
            layer, constants=cut.constants, repair=cut.repairs, novice_value=value
        )
        for i, layer in layers.items()
    }


def narrowed_shapes(config: ModelConfig, cut: Cut) -> Layers:
    """Layers that leave the shapes of a cut of neurons, if all experts keep equally many."""
    return _same_shapes(config, _kept_widths(config, cut, {}), cut)


def _same_shapes(config: ModelConfig, stored: Mapping[int, int], cut: Cut) -> Layers:
    """One neuron of each expert, padded: much less to check than all neurons.

    Of a shared expert that is ranked with them the same share stays.
    """
    return {
        i: LayerPlan(
            neurons=dict.fromkeys(moe.expert_ids, (0,)),
            padded_width=n,
            constants=cut.constants,
            shared_neurons=tuple(range(-(-moe.shared.width * n // moe.expert_width)))
            if cut.rank_shared and moe.shared
            else None,
        )
        for i, n in stored.items()
        for moe in [config.moe(i)]
    }


def _kept_widths(config: ModelConfig, cut: Cut, orders: Mapping[int, np.ndarray]) -> dict[int, int]:
    """By layer, neurons that each of its experts keeps, or on average if ranked across it.

    Args:
        config, cut: how many.
        orders: from ``_layer_order`` if neurons are ranked across layers and a budget needs to
            know what is then stored; empty otherwise.

    Raises:
        ValueError: a width outside the limits, or a budget that none fits.
    """
    # Across a layer, an explicit width is an average: what is stored is rounded up.
    if (budget := find_budget(cut)) is None:
        step = 1 if cut.neuron_scope == "layer" and cut.expert_width is not None else cut.width_step
        return {i: _kept_width(config.moe(i), i, cut, step) for i in config.moe_layers}

    def clipped(width: int) -> dict[int, int]:
        return {i: min(width, config.moe(i).expert_width) for i in config.moe_layers}

    def shapes_of(width: int) -> Layers:
        stored = clipped(width)
        if orders:
            most = {i: _most_of_one(orders[i], config.moe(i), stored[i]) for i in orders}
            stored = _stored_widths(most, config, cut.width_step)
        return _same_shapes(config, stored, cut)

    sizes = _widths(config, cut, 1 if orders else cut.width_step)
    return clipped(largest_that_fits(budget, config, sizes, shapes_of))


def _kept_width(moe: MoeConfig, layer: int, cut: Cut, step: int) -> int:
    width = kept_width(moe, layer, cut.expert_width, cut.width_ratio, step)
    least, most = width_bounds(cut, moe, layer)
    if not least <= width <= most:
        raise ValueError(
            f"layer {layer}: kept neurons must be in [{least}, {most}] by min_width and "
            f"max_width, got {width}"
        )
    return width


def _widths(config: ModelConfig, cut: Cut, step: int) -> list[int]:
    """Widths that can be asked for: multiples of ``step``, and the whole of the widest layer."""
    bounds = [width_bounds(cut, config.moe(i), i) for i in config.moe_layers]
    least, most = bounds[0][0], max(high for _, high in bounds)
    widths = list(range(-(-max(least, 1) // step) * step, most + 1, step))
    if most % step and most in {config.moe(i).expert_width for i in config.moe_layers}:
        widths.append(most)
    if not widths:
        raise ValueError(
            f"round_to = {step} must have a multiple in [{least}, {most}] (min_width, max_width)"
        )
    return widths


def _layer_order(values: np.ndarray, least: int, most: int) -> np.ndarray:
    """Flat indices into scores ``[E, F]``, those that are kept first at the front.

    First each expert's own ``least`` highest, then by score all that are among the ``most``
    highest of their expert; ties go to the lower index.
    """
    ranks = np.argsort(np.argsort(-values, axis=1, kind="stable"), axis=1)
    ranked = np.where(ranks < least, np.inf, values.astype(np.float64)).reshape(-1)
    order = np.argsort(-ranked, kind="stable")
    return order[ranks.reshape(-1)[order] < most]


def _most_of_one(order: np.ndarray, moe: MoeConfig, width: int) -> int:
    """Neurons that the widest expert of a layer keeps, if experts keep ``width`` on average."""
    kept = order[: len(moe.expert_ids) * width] // moe.expert_width
    return int(np.bincount(kept).max())


def _stored_widths(most: Mapping[int, int], config: ModelConfig, step: int) -> dict[int, int]:
    """The one width that holds the largest expert of any layer, or a narrower layer's own."""
    width = -(-max(most.values()) // step) * step
    return {i: min(width, config.moe(i).expert_width) for i in most}


def padded_alike(plans: Layers, config: ModelConfig, round_to: int) -> Layers:
    """Plans that keep different numbers of neurons, padded to the widest of all layers."""
    most = {i: max(map(len, plan.neurons.values())) for i, plan in plans.items()}
    stored = _stored_widths(most, config, round_to)
    return {i: dataclasses.replace(plan, padded_width=stored[i]) for i, plan in plans.items()}


def _keep_in_experts(scores: Scores, config: ModelConfig, widths: Mapping[int, int]) -> Layers:
    """Keeps the highest neurons of each expert."""
    return {
        i: _neuron_plan(moe, [highest(scores[i][e], width) for e in moe.expert_ids])
        for i, width in widths.items()
        for moe in [config.moe(i)]
    }


def _keep_in_layers(
    orders: Mapping[int, np.ndarray], config: ModelConfig, widths: Mapping[int, int], cut: Cut
) -> Layers:
    """Keeps the first neurons of each layer's order, padded to the widest expert of any layer."""
    layers = {}
    for i, width in widths.items():
        moe = config.moe(i)
        chosen = np.zeros((len(moe.expert_ids), moe.expert_width), bool)
        chosen.reshape(-1)[orders[i][: len(chosen) * width]] = True
        layers[i] = _neuron_plan(moe, [np.flatnonzero(row) for row in chosen])
    return padded_alike(layers, config, cut.width_step)


def _neuron_plan(moe: MoeConfig, kept: Sequence[np.ndarray]) -> LayerPlan:
    neurons = (tuple(row.tolist()) for row in kept)
    return LayerPlan(neurons=dict(zip(moe.expert_ids, neurons, strict=True)))
