"""How many hidden neurons experts may keep, and which: of each expert, or across experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from moe_jax.config import ModelConfig, MoeConfig
from moe_jax.plan.budget import Budget, largest_that_fits
from moe_jax.plan.neuron_limits import NeuronLimits, kept_width
from moe_jax.plan.schema import LayerPlan, NoviceValue
from moe_jax.plan.scores import Scores, check_shape, highest
from moe_jax.plan.widths import plan_own_widths

Layers = dict[int, LayerPlan]


def plan_neurons(
    scores: Scores,
    config: ModelConfig,
    expert_width: int | None,
    width_ratio: float | None,
    budget: Budget | None,
    limits: NeuronLimits,
    scope: str,
    prices: Scores | None = None,
    constants: bool = False,
    repair: bool = False,
) -> Layers:
    """What neuron scores ``[E, F]`` remove; see ``make_plan``."""
    _check_scope(scope, limits, prices)
    orders = {}
    for i in config.moe_layers:
        moe = config.moe(i)
        check_shape("scores", i, scores[i], (moe.num_experts, moe.expert_width))
        if moe.expert_widths and not limits.own_widths:
            raise ValueError(f"layer {i}: its experts differ in width; a plan needs own_widths")
        if scope == "layer" and not limits.own_widths:
            orders[i] = _layer_order(scores[i][list(moe.expert_ids)], *limits.bounds(moe, i))
    if limits.own_widths:
        sizes = (expert_width, width_ratio, budget)
        layers = plan_own_widths(scores, config, sizes, limits, scope, prices, constants)
    else:
        widths = (
            _kept_widths(config, limits, expert_width, width_ratio, scope)
            if budget is None
            else _widths_within(budget, config, orders, limits, constants)
        )
        layers = (
            _keep_in_layers(orders, config, widths, limits.round_to)
            if scope == "layer"
            else _keep_in_experts(scores, config, widths)
        )
    value: NoviceValue = "least_squares" if repair else "mean"
    return {
        i: dataclasses.replace(layer, constants=constants, repair=repair, novice_value=value)
        for i, layer in layers.items()
    }


def _check_scope(scope: str, limits: NeuronLimits, prices: Scores | None) -> None:
    if scope not in ("expert", "layer", "model"):
        raise ValueError(f"neuron_scope must be 'expert', 'layer' or 'model', got {scope!r}")
    if scope == "expert" and limits.own_widths:
        raise ValueError("own_widths goes with neuron_scope 'layer' or 'model', got 'expert'")
    if not limits.own_widths and (scope == "model" or prices is not None):
        given = "neuron_scope 'model'" if scope == "model" else "neuron_prices"
        raise ValueError(f"{given} needs own_widths")


def _kept_widths(
    config: ModelConfig, limits: NeuronLimits, width: int | None, ratio: float | None, scope: str
) -> dict[int, int]:
    """By layer, neurons that each of its experts keeps; raises ValueError outside the limits."""
    widths = {}
    # Across a layer, an explicit width is an average: what is stored is rounded up.
    step = 1 if scope == "layer" and width is not None else limits.round_to
    for i in config.moe_layers:
        widths[i] = kept_width(config.moe(i), i, width, ratio, step)
        least, most = limits.bounds(config.moe(i), i)
        if not least <= widths[i] <= most:
            raise ValueError(
                f"layer {i}: kept neurons must be in [{least}, {most}] by min_width and "
                f"max_width, got {widths[i]}"
            )
    return widths


def _widths_within(
    budget: Budget,
    config: ModelConfig,
    orders: Mapping[int, np.ndarray],
    limits: NeuronLimits,
    constants: bool,
) -> dict[int, int]:
    """The same for the largest widths that fit a budget, equal in all layers that are so wide.

    Args:
        orders: from ``_layer_order`` if neurons are ranked across layers, whose average width is
            found then; empty if within experts.

    Raises:
        ValueError: none fits.
    """
    # Across a layer, what is stored is rounded up, whatever the average is.
    sizes = _widths(config, limits, 1 if orders else limits.round_to)

    def clipped(width: int) -> dict[int, int]:
        return {i: min(width, config.moe(i).expert_width) for i in config.moe_layers}

    def same_shapes(width: int) -> Layers:
        """One neuron of each expert, padded: much less to check than all neurons."""
        stored = clipped(width)
        if orders:
            stored = _stored_widths(
                {i: _most_of_one(orders[i], config.moe(i), stored[i]) for i in orders},
                config,
                limits.round_to,
            )
        return {
            i: LayerPlan(
                neurons=dict.fromkeys(config.moe(i).expert_ids, (0,)),
                padded_width=n,
                constants=constants,
            )
            for i, n in stored.items()
        }

    return clipped(largest_that_fits(budget, config, sizes, same_shapes))


def _widths(config: ModelConfig, limits: NeuronLimits, step: int) -> list[int]:
    """Widths that can be asked for: multiples of ``step``, and the whole of the widest layer."""
    bounds = [limits.bounds(config.moe(i), i) for i in config.moe_layers]
    least, most = bounds[0][0], max(high for _, high in bounds)
    widths = list(range(-(-least // step) * step, most + 1, step))
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


def _keep_in_experts(scores: Scores, config: ModelConfig, widths: Mapping[int, int]) -> Layers:
    """Keeps the highest neurons of each expert."""
    return {
        i: _neuron_plan(config.moe(i), [highest(scores[i][e], width) for e in _ids(config, i)])
        for i, width in widths.items()
    }


def _keep_in_layers(
    orders: Mapping[int, np.ndarray], config: ModelConfig, widths: Mapping[int, int], step: int
) -> Layers:
    """Keeps the first neurons of each layer's order, padded to the widest expert of any layer."""
    layers = {}
    for i, width in widths.items():
        moe = config.moe(i)
        chosen = np.zeros((len(moe.expert_ids), moe.expert_width), bool)
        chosen.reshape(-1)[orders[i][: len(chosen) * width]] = True
        layers[i] = _neuron_plan(moe, [np.flatnonzero(row) for row in chosen])
    most = {i: max(map(len, layer.neurons.values())) for i, layer in layers.items()}
    stored = _stored_widths(most, config, step)
    return {i: dataclasses.replace(layer, padded_width=stored[i]) for i, layer in layers.items()}


def _neuron_plan(moe: MoeConfig, kept: Sequence[np.ndarray]) -> LayerPlan:
    neurons = (tuple(row.tolist()) for row in kept)
    return LayerPlan(neurons=dict(zip(moe.expert_ids, neurons, strict=True)))


def _ids(config: ModelConfig, layer: int) -> tuple[int, ...]:
    return config.moe(layer).expert_ids
