"""How many neurons each expert keeps where experts may differ in width, by what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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
    worth, price = {}, {}
    for i in config.moe_layers:
        moe = config.moe(i)
        worth[i] = -np.sort(-_existing(scores[i], moe), axis=1)
        price[i] = _price(prices, i, moe)
    groups = [(i,) for i in worth] if scope == "layer" else [tuple(worth)]

    def widths_of(average: Mapping[int, float]) -> Widths:
        """Given what experts keep on average, in neurons of average price."""
        found: Widths = {}
        for group in groups:
            money = sum(average[i] * price[i].sum() for i in group)
            found |= _within(group, config, limits, worth, price, money)
        return found

    def shapes_of(average: Mapping[int, float]) -> Layers:
        """Plans that leave the same shapes, quicker to check."""
        pairs = ((config.moe(i), i, widths) for i, widths in widths_of(average).items())
        return {
            i: _layer_plan(
                {e: tuple(range(n)) for e, n in zip(moe.expert_ids, widths, strict=True)}, constants
            )
            for moe, i, widths in pairs
        }

    average = _averages(config, limits, sizes, shapes_of)
    return {i: _plan(scores[i], config.moe(i), n, constants) for i, n in widths_of(average).items()}


def _existing(values: np.ndarray, moe: MoeConfig) -> np.ndarray:
    """Scores of the stored experts, in their order; zeros past an expert's own width."""
    inside = np.arange(moe.expert_width) < _own_widths(moe)[:, None]
    return np.where(inside, values[list(moe.expert_ids)], 0)


def _price(prices: Scores | None, layer: int, moe: MoeConfig) -> np.ndarray:
    ids = list(moe.expert_ids)
    if prices is None:
        return np.ones(len(ids))
    check_shape("neuron_prices", layer, prices[layer], (moe.num_experts,))
    price = np.asarray(prices[layer], np.float64)[ids]
    if not (price > 0).all() or not np.isfinite(price).all():
        raise ValueError(f"neuron_prices of layer {layer} must be positive, got {price.min()}")
    return price


def _averages(
    config: ModelConfig,
    limits: NeuronLimits,
    sizes: Sizes,
    shapes_of: Callable[[Mapping[int, float]], Layers],
) -> dict[int, float]:
    """What each layer's experts keep on average; the largest share that fits a budget."""
    width, ratio, budget = sizes
    full = {i: float(_own_widths(config.moe(i)).mean()) for i in config.moe_layers}
    if budget is None:
        if width is not None:
            return {i: kept_width(config.moe(i), i, width, None, 1) for i in full}
        for i in full:
            kept_width(config.moe(i), i, None, ratio, 1)
        return {i: (ratio or 1.0) * mean for i, mean in full.items()}
    parts = 1000  # of the whole width

    def layers_of(size: int) -> Layers:
        return shapes_of({i: size / parts * mean for i, mean in full.items()})

    size = largest_that_fits(budget, config, range(1, parts + 1), layers_of)
    return {i: size / parts * mean for i, mean in full.items()}


def _own_widths(moe: MoeConfig) -> np.ndarray:
    return np.array([moe.width_of(e) for e in moe.expert_ids])


def _levels(moe: MoeConfig, layer: int, limits: NeuronLimits) -> list[int]:
    """Numbers of neurons that an expert may keep: multiples, and all of them."""
    least, most = limits.bounds(moe, layer)
    step = limits.round_to
    levels = list(range(-(-least // step) * step, most + 1, step))
    if most == moe.expert_width and most % step:
        levels.append(most)
    if not levels or levels == [0]:
        raise ValueError(
            f"layer {layer}: round_to = {step} must have a positive multiple in [{least}, {most}] "
            "(min_width, max_width)"
        )
    return levels


def _within(
    layers: Sequence[int],
    config: ModelConfig,
    limits: NeuronLimits,
    worth: Mapping[int, np.ndarray],
    price: Mapping[int, np.ndarray],
    money: float,
) -> Widths:
    """Widths of all experts of some layers, ranked together, for so much money in all."""
    widest = max(config.moe(i).expert_width for i in layers)
    every = [np.pad(worth[i], ((0, 0), (0, widest - worth[i].shape[1]))) for i in layers]
    owned = np.concatenate([_own_widths(config.moe(i)) for i in layers])
    levels = sorted({n for i in layers for n in _levels(config.moe(i), i, limits)})
    together = (np.concatenate(every), levels, np.concatenate([price[i] for i in layers]), money)
    found = few_widths(*together, most=limits.max_buckets)
    ends = np.cumsum([len(worth[i]) for i in layers])[:-1]
    widths = dict(zip(layers, np.split(np.minimum(found, owned), ends), strict=True))
    for i, own in widths.items():
        if not own.any():  # a layer needs one expert with neurons
            own[worth[i].sum(1).argmax()] = min(n for n in levels if n)
    return widths


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
    worth: Float[np.ndarray, "E N"],
    levels: Sequence[int],
    price: Float[np.ndarray, " E"],
    budget: float,
) -> Int[np.ndarray, " E"]:
    """Neurons of each expert, all among ``levels``, that are worth most for at most ``budget``.

    Steps from one level to the next are taken by their worth for the money until the next one
    exceeds the budget. An expert's neurons are worth less and less, so that its steps come in
    order, and what is taken is the best there is for its cost.

    Args:
        worth: of each expert's neurons, descending along the second axis.
        levels: numbers of neurons that an expert may have, ascending; every expert has the first.
        price: what each neuron of an expert costs.
        budget: for all neurons together.
    """
    edges = np.asarray(levels)
    steps = np.diff(edges)
    total = np.concatenate([np.zeros((len(worth), 1)), np.cumsum(worth, 1, dtype=np.float64)], 1)
    gain = np.diff(total[:, edges], axis=1)
    cost = steps * price[:, None]
    order = np.argsort(-(gain / cost), axis=None, kind="stable")
    spent = np.cumsum(cost.reshape(-1)[order]) + edges[0] * price.sum()
    taken = np.zeros(gain.size, bool)
    # Costs are sums of products: equality with the budget must survive their rounding.
    taken[order[: np.searchsorted(spent, budget * (1 + 1e-9), side="right")]] = True
    return edges[taken.reshape(gain.shape).sum(1)]


def few_widths(
    worth: Float[np.ndarray, "E N"],
    levels: Sequence[int],
    price: Float[np.ndarray, " E"],
    budget: float,
    most: int,
) -> Int[np.ndarray, " E"]:
    """The same with at most ``most`` different numbers above zero.

    The level without which least is lost is given up, one after the other.
    """
    total = np.concatenate([np.zeros((len(worth), 1)), np.cumsum(worth, 1, dtype=np.float64)], 1)
    experts = np.arange(len(worth))

    def value(widths: np.ndarray) -> float:
        return total[experts, widths].sum()

    widths = share_out(worth, levels, price, budget)
    levels = [n for n in levels if n in {levels[0], *widths.tolist()}]
    while len({*widths.tolist()} - {0}) > most:
        others = [levels[:n] + levels[n + 1 :] for n in range(1, len(levels))]
        found = [share_out(worth, fewer, price, budget) for fewer in others]
        best = max(range(len(found)), key=lambda n: value(found[n]))
        levels, widths = others[best], found[best]
    return widths
