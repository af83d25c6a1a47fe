"""How many neurons each expert keeps where experts may differ in width, by what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from moe_jax.config import ModelConfig, MoeConfig
from moe_jax.plan.budget import Budget, largest_that_fits
from moe_jax.plan.neuron_limits import NeuronLimits, kept_width
from moe_jax.plan.schema import LayerPlan
from moe_jax.plan.scores import Scores, check_shape, highest
from moe_jax.statistics import Stats

Layers = dict[int, LayerPlan]
Sizes = tuple[int | None, float | None, Budget | None]
# Widths of the experts with neurons, in the order of ``MoeConfig.expert_ids``, by layer.
Widths = dict[int, Int[np.ndarray, " E_kept"]]
_PARTS = 1000  # of the whole price: what a budget is shared out in


def neuron_prices(stats: Stats, active_share: float) -> dict[int, Float[np.ndarray, " E"]] | None:
    """What a neuron of each expert costs, by layer; None: the same for all.

    Args:
        stats: that tell how often each expert is chosen.
        active_share: 0 counts bytes; 1 counts the work per token, by how often an expert is chosen
            against the mean of its layer; between them, a mix.

    Raises:
        ValueError: no share.
    """
    if not 0 <= active_share <= 1:
        raise ValueError(f"active_share must be in [0, 1], got {active_share}")
    if not active_share:
        return None
    counts = {i: arrays["count"].astype(np.float64) for i, arrays in stats.layers.items()}
    # An expert that no token reached does no work, but must cost something.
    return {
        i: np.maximum(1 - active_share + active_share * count / count.mean(), 1e-3)
        for i, count in counts.items()
    }


def plan_own_widths(
    scores: Scores,
    config: ModelConfig,
    sizes: Sizes,
    limits: NeuronLimits,
    scope: str,
    prices: Scores | None,
    constants: bool,
) -> Layers:
    """What neuron scores ``[E, F]`` remove if experts are stored as wide as they are.

    Args:
        sizes: the average width, its share, or a budget: one of them.
        scope: ``layer`` or ``model``: across the experts of each layer, or of all.
        prices: what a neuron of each expert costs, ``[E]`` by layer; None: the same for all.
        constants: whether experts gain a constant, which budgets count.
    """
    layers = tuple(config.moe_layers)
    together = [(i,) for i in layers] if scope == "layer" else [layers]
    groups = [_group(members, scores, config, limits, prices) for members in together]

    def widths_of(share: Mapping[int, float]) -> Widths:
        """Given what each layer keeps, as a share of what all its neurons cost."""
        found: Widths = {}
        for group in groups:
            found |= _within(group, share, limits)
        return found

    def shapes_of(share: Mapping[int, float]) -> Layers:
        """Plans that leave the same shapes, quicker to check."""
        pairs = ((config.moe(i), i, widths) for i, widths in widths_of(share).items())
        return {
            i: _layer_plan(
                {e: tuple(range(n)) for e, n in zip(moe.expert_ids, widths, strict=True)}, constants
            )
            for moe, i, widths in pairs
        }

    share = _shares(config, sizes, shapes_of)
    return {i: _plan(scores[i], config.moe(i), n, constants) for i, n in widths_of(share).items()}


@dataclass(frozen=True)
class _Group:
    """Experts that are ranked together.

    Attributes:
        layer: of each.
        owned: neurons that each has.
        price: of each one's neurons.
        total: what the n highest neurons of each are worth together, for n from 0 to N.
        choices: numbers of neurons that each may keep, see ``share_out``.
    """

    layer: Int[np.ndarray, " E"]
    owned: Int[np.ndarray, " E"]
    price: Float[np.ndarray, " E"]
    total: Float[np.ndarray, "E N1"]
    choices: Int[np.ndarray, "E L"]


def _group(
    layers: Sequence[int],
    scores: Scores,
    config: ModelConfig,
    limits: NeuronLimits,
    prices: Scores | None,
) -> _Group:
    experts = [config.moe(i) for i in layers]
    bounds = [_bounds(moe, i, limits) for i, moe in zip(layers, experts, strict=True)]
    owned = [_own_widths(moe) for moe in experts]
    widest = max(moe.expert_width for moe in experts)
    worth = [
        _falling(scores[i][list(moe.expert_ids)], own, widest)
        for i, moe, own in zip(layers, experts, owned, strict=True)
    ]
    together = np.concatenate(owned)
    return _Group(
        np.repeat(layers, [len(own) for own in owned]),
        together,
        np.concatenate([_price(prices, i, moe) for i, moe in zip(layers, experts, strict=True)]),
        totals(np.concatenate(worth)),
        _choices(together, bounds[0][0], max(most for _, most in bounds), limits.round_to),
    )


def _falling(values: np.ndarray, owned: np.ndarray, width: int) -> np.ndarray:
    """Each expert's own scores, the highest first; zeros past its own width, up to ``width``."""
    inside = np.arange(values.shape[1]) < owned[:, None]
    falling = np.where(inside, -np.sort(np.where(inside, -values, np.inf), axis=1), 0)
    return np.pad(falling.astype(values.dtype), ((0, 0), (0, width - values.shape[1])))


def totals(worth: Float[np.ndarray, "E N"]) -> Float[np.ndarray, "E N1"]:
    """What the first n neurons of each expert are worth together, for n from 0 to N."""
    return np.concatenate([np.zeros((len(worth), 1)), np.cumsum(worth, 1, dtype=np.float64)], 1)


def _price(prices: Scores | None, layer: int, moe: MoeConfig) -> np.ndarray:
    ids = list(moe.expert_ids)
    if prices is None:
        return np.ones(len(ids))
    check_shape("neuron_prices", layer, prices[layer], (moe.num_experts,))
    price = np.asarray(prices[layer], np.float64)[ids]
    if not (price > 0).all() or not np.isfinite(price).all():
        raise ValueError(f"neuron_prices of layer {layer} must be positive, got {price.min()}")
    return price


def _shares(
    config: ModelConfig,
    sizes: Sizes,
    shapes_of: Callable[[Mapping[int, float]], Layers],
) -> dict[int, float]:
    """The share that each layer keeps; the largest one, of all layers, that fits a budget."""
    width, ratio, budget = sizes
    if budget is None:
        shares = {}
        for i in config.moe_layers:
            moe = config.moe(i)
            kept = kept_width(moe, i, width, ratio, 1)
            shares[i] = (ratio or 1.0) if width is None else kept / _own_widths(moe).mean()
        return shares

    def layers_of(size: int) -> Layers:
        return shapes_of(dict.fromkeys(config.moe_layers, size / _PARTS))

    size = largest_that_fits(budget, config, range(1, _PARTS + 1), layers_of)
    return dict.fromkeys(config.moe_layers, size / _PARTS)


def _own_widths(moe: MoeConfig) -> np.ndarray:
    return np.array([moe.width_of(e) for e in moe.expert_ids])


def _bounds(moe: MoeConfig, layer: int, limits: NeuronLimits) -> tuple[int, int]:
    """The fewest and the most neurons of an expert, if it can keep a multiple, or all."""
    least, most = limits.bounds(moe, layer)
    step = limits.round_to
    if most < moe.expert_width and most // step * step < max(least, 1):
        raise ValueError(
            f"layer {layer}: round_to = {step} must have a positive multiple in [{least}, {most}] "
            "(min_width, max_width)"
        )
    return least, most


def _choices(owned: np.ndarray, least: int, most: int, step: int) -> Int[np.ndarray, "E L"]:
    """Multiples of ``step`` for all, and for each expert all that it has; see ``share_out``."""
    first = -(-least // step) * step
    levels = sorted(
        {*range(first + step, most + 1, step)}.union(n for n in owned.tolist() if first < n <= most)
    )
    choices = np.tile(np.array([first, *levels]), (len(owned), 1))
    choices[:, 0] = np.minimum(first, owned)
    fits = (choices <= owned[:, None]) & ((choices % step == 0) | (choices == owned[:, None]))
    return np.where(fits, choices, -1)


def _within(group: _Group, share: Mapping[int, float], limits: NeuronLimits) -> Widths:
    """Widths of all experts of a group for so much of their price."""
    members = {i: group.layer == i for i in np.unique(group.layer).tolist()}
    price = group.owned * group.price
    money = sum(share[i] * price[rows].sum() for i, rows in members.items())
    found = few_widths(group.total, group.choices, group.price, money, limits.max_buckets)
    for rows in members.values():
        if not found[rows].any():  # a layer needs one expert with neurons
            best = np.flatnonzero(rows)[group.total[rows, -1].argmax()]
            found[best] = min(limits.round_to, group.owned[best])
    return {i: found[rows] for i, rows in members.items()}


def _plan(scores: np.ndarray, moe: MoeConfig, widths: np.ndarray, constants: bool) -> LayerPlan:
    kept = {
        e: tuple(highest(scores[e][: moe.width_of(e)], int(width)).tolist())
        for e, width in zip(moe.expert_ids, widths, strict=True)
    }
    return _layer_plan(kept, constants)


def _layer_plan(kept: Mapping[int, tuple[int, ...]], constants: bool) -> LayerPlan:
    return LayerPlan(
        novices=tuple(sorted(e for e, neurons in kept.items() if not neurons)),
        neurons={e: neurons for e, neurons in sorted(kept.items()) if neurons},
        own_widths=True,
        constants=constants,
    )


def share_out(
    total: Float[np.ndarray, "E N1"],
    choices: Int[np.ndarray, "E L"],
    price: Float[np.ndarray, " E"],
    budget: float,
) -> Int[np.ndarray, " E"]:
    """Neurons of each expert, all among its ``choices``, worth most for at most ``budget``.

    Steps from one number to the next are taken by their worth for the money until the next one
    exceeds the budget. An expert's neurons are worth less and less, so that its steps come in
    order, and what is taken is the best there is for its cost.

    Args:
        total: what each expert's first n neurons, the dearest first, are worth; see ``totals``.
        choices: numbers of neurons that each expert may have, ascending along the second axis; -1
            in place of those that it may not. Every expert has the first.
        price: what each neuron of an expert costs.
        budget: for all neurons together.
    """
    edges = np.maximum.accumulate(choices, axis=1)
    steps = np.diff(edges, axis=1)
    gain = np.diff(np.take_along_axis(total, edges, axis=1), axis=1).reshape(-1)
    cost = (steps * price[:, None]).reshape(-1)
    real = np.flatnonzero(cost)
    order = real[np.argsort(-(gain[real] / cost[real]), kind="stable")]
    spent = np.cumsum(cost[order]) + edges[:, 0] @ price
    taken = np.zeros(steps.size, bool)
    # Costs are sums of products: equality with the budget must survive their rounding.
    taken[order[: np.searchsorted(spent, budget * (1 + 1e-9), side="right")]] = True
    return edges[:, 0] + (steps * taken.reshape(steps.shape)).sum(1)


def few_widths(
    total: Float[np.ndarray, "E N1"],
    choices: Int[np.ndarray, "E L"],
    price: Float[np.ndarray, " E"],
    budget: float,
    most: int,
) -> Int[np.ndarray, " E"]:
    """The same with at most ``most`` different numbers above zero.

    The number without which least is lost is given up, one after the other; the first is not.
    """
    experts = np.arange(len(total))

    def value(widths: np.ndarray) -> float:
        return total[experts, widths].sum()

    widths = share_out(total, choices, price, budget)
    used = (choices == widths[:, None]).any(0)
    choices = choices[:, used | (np.arange(len(used)) == 0)]
    while len({*widths.tolist()} - {0}) > most and choices.shape[1] > 1:
        others = [np.delete(choices, n, axis=1) for n in range(1, choices.shape[1])]
        found = [share_out(total, fewer, price, budget) for fewer in others]
        best = max(range(len(found)), key=lambda n: value(found[n]))
        choices, widths = others[best], found[best]
    return widths
