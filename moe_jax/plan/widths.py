"""How many neurons experts may keep, and what each does where they may differ in width."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from moe_jax.config import ModelConfig, MoeConfig
from moe_jax.plan.budget import find_budget, largest_that_fits
from moe_jax.plan.cut import Cut
from moe_jax.plan.schema import LayerPlan
from moe_jax.plan.scores import Scores, check_shape, highest
from moe_jax.plan.share_out import few_widths, share_out, totals
from moe_jax.settings import check_bounds
from moe_jax.statistics import Stats

Layers = dict[int, LayerPlan]
# Widths of the experts with neurons, in the order of ``MoeConfig.expert_ids``, by layer; last that
# of the shared expert where it is ranked with them.
Widths = dict[int, Int[np.ndarray, " E_kept"]]
_PARTS = 1000  # of the whole price: what a budget is shared out in
_SHARED_CHOICES = 128  # numbers of neurons that a shared expert may keep, about


def width_bounds(cut: Cut, moe: MoeConfig, layer: int) -> tuple[int, int]:
    """The fewest and the most neurons of an expert; raises ValueError if there are none."""
    fewest = 0 if cut.own_widths else 1
    least = fewest if cut.min_width is None else cut.min_width
    most = moe.expert_width if cut.max_width is None else cut.max_width
    if not fewest <= least <= most <= moe.expert_width or most == 0:
        raise ValueError(
            f"layer {layer}: min_width and max_width must be in [{fewest}, "
            f"{moe.expert_width}] and in order, got {least} and {most}"
        )
    return least, most


def kept_width(
    moe: MoeConfig, layer: int, width: int | None, ratio: float | None, step: int
) -> int:
    """Neurons that each expert of a layer keeps, a multiple of ``step`` or all that it has.

    Raises:
        ValueError: a number or a share out of bounds, or a number that is no multiple.
    """
    if width is None:
        share = 1.0 if ratio is None else ratio
        check_bounds("width_ratio", share, "(0, 1]")
        width = min(moe.expert_width, max(1, round(moe.expert_width * share / step)) * step)
    if not 1 <= width <= moe.expert_width:
        raise ValueError(
            f"layer {layer}: expert_width must be in [1, {moe.expert_width}], got {width}"
        )
    if width % step and width != moe.expert_width:
        raise ValueError(
            f"layer {layer}: expert_width must be a multiple of round_to = {step}, or all "
            f"{moe.expert_width}, got {width}"
        )
    return width


def neuron_prices(stats: Stats, active_share: float) -> dict[int, Float[np.ndarray, " E"]] | None:
    """What a neuron of each expert costs, by layer; None: the same for all.

    Args:
        stats: that tell how often each expert is chosen.
        active_share: 0 counts bytes; 1 counts the work per token, by how often an expert is chosen
            against the mean of its layer; between them, a mix.
    """
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
    cut: Cut,
    prices: Scores | None,
    shared: Scores | None = None,
) -> Layers:
    """What neuron scores ``[E, F]`` remove if experts are stored as wide as they are.

    Args:
        scores, config, cut: see ``make_plan``.
        prices: what a neuron of each expert costs, ``[E]`` by layer; None: the same for all.
        shared: scores ``[U]`` of the neurons of shared experts, which are ranked with them; None:
            these stay as they are.
    """
    layers = tuple(config.moe_layers)
    together = [(i,) for i in layers] if cut.neuron_scope == "layer" else [layers]
    pools = [
        _with_shared(_pool(members, scores, config, cut, prices), config, cut, shared)
        for members in together
    ]

    def widths_of(share: Mapping[int, float]) -> Widths:
        """Given what each layer keeps, as a share of what all its neurons cost."""
        found: Widths = {}
        for pool in pools:
            found |= _within(pool, share, cut)
        return found

    def shapes_of(share: Mapping[int, float]) -> Layers:
        """Plans that leave the same shapes, quicker to check."""
        return {
            i: _layer_plan(config.moe(i), [tuple(range(n)) for n in widths], cut.constants)
            for i, widths in widths_of(share).items()
        }

    share, plans = _shares(config, cut, shapes_of), {}
    for i, widths in widths_of(share).items():
        moe = config.moe(i)
        rows = [scores[i][e][: moe.width_of(e)] for e in moe.expert_ids]
        rows += [] if shared is None else [shared[i]]
        kept = [tuple(highest(row, int(n)).tolist()) for row, n in zip(rows, widths, strict=True)]
        plans[i] = _layer_plan(moe, kept, cut.constants)
    return plans


def plan_layer_widths(
    scores: Scores, config: ModelConfig, cut: Cut, shared: Scores | None = None
) -> Layers:
    """What neuron scores ``[E, F]`` remove if all experts of a layer keep equally many.

    A layer is one thing to share out to: its n-th neuron is the n-th highest of each expert. So is
    its shared expert where it is ranked with them, see ``plan_own_widths``.
    """
    layers = list(config.moe_layers)
    moes = [config.moe(i) for i in layers]
    bounds = [_bounds(moe, i, cut) for i, moe in zip(layers, moes, strict=True)]
    owned = np.array([moe.expert_width for moe in moes])
    worth = [
        _falling(scores[i][list(moe.expert_ids)], _own_widths(moe), max(owned)).sum(0)
        for i, moe in zip(layers, moes, strict=True)
    ]
    price = np.array([float(len(moe.expert_ids)) for moe in moes])
    choices = _choices(owned, max(bounds[0][0], 1), max(most for _, most in bounds), cut.width_step)
    every = np.ones(len(layers), bool)
    alike = _Pool(np.array(layers), owned, price, totals(np.stack(worth)), choices, every)
    pool = _with_shared(alike, config, cut, shared)

    def widths_of(share: Mapping[int, float]) -> Widths:
        found = share_out(pool.total, pool.choices, pool.price, pool.money(share))
        return {i: found[pool.layer == i] for i in layers}

    def shapes_of(share: Mapping[int, float]) -> Layers:
        return {
            i: LayerPlan(
                neurons=dict.fromkeys(config.moe(i).expert_ids, tuple(range(n))),
                shared_neurons=tuple(range(own[0])) if own else None,
            )
            for i, (n, *own) in widths_of(share).items()
        }

    share = _shares(config, cut, shapes_of)
    return {
        i: LayerPlan(
            neurons={e: tuple(highest(scores[i][e], n).tolist()) for e in config.moe(i).expert_ids},
            shared_neurons=tuple(highest(shared[i], own[0]).tolist()) if shared and own else None,
        )
        for i, (n, *own) in widths_of(share).items()
    }


class _Pool(NamedTuple):
    """Experts that are ranked together.

    Attributes:
        layer: of each.
        owned: neurons that each has.
        price: of each one's neurons.
        total: what the n highest neurons of each are worth together, for n from 0 to N.
        choices: numbers of neurons that each may keep, see ``share_out``.
        routed: whether each is a routed one.
    """

    layer: Int[np.ndarray, " E"]
    owned: Int[np.ndarray, " E"]
    price: Float[np.ndarray, " E"]
    total: Float[np.ndarray, "E N1"]
    choices: Int[np.ndarray, "E L"]
    routed: Bool[np.ndarray, " E"]

    def money(self, share: Mapping[int, float]) -> float:
        """What such shares of each layer's neurons cost."""
        price = self.owned * self.price
        return sum(share[i] * price[self.layer == i].sum() for i in np.unique(self.layer).tolist())


def _pool(
    layers: Sequence[int],
    scores: Scores,
    config: ModelConfig,
    cut: Cut,
    prices: Scores | None,
) -> _Pool:
    experts = [config.moe(i) for i in layers]
    bounds = [_bounds(moe, i, cut) for i, moe in zip(layers, experts, strict=True)]
    owned = [_own_widths(moe) for moe in experts]
    widest = max(moe.expert_width for moe in experts)
    worth = [
        _falling(scores[i][list(moe.expert_ids)], own, widest)
        for i, moe, own in zip(layers, experts, owned, strict=True)
    ]
    together = np.concatenate(owned)
    return _Pool(
        np.repeat(layers, [len(own) for own in owned]),
        together,
        np.concatenate([_price(prices, i, moe) for i, moe in zip(layers, experts, strict=True)]),
        totals(np.concatenate(worth)),
        _choices(together, bounds[0][0], max(most for _, most in bounds), cut.width_step),
        np.ones(len(together), bool),
    )


def _with_shared(pool: _Pool, config: ModelConfig, cut: Cut, shared: Scores | None) -> _Pool:
    """The pool with the shared expert of each of its layers, behind the others of the layer."""
    if shared is None:
        return pool
    layers = np.unique(pool.layer)
    own = [shared[i] for i in layers.tolist()]
    owned = np.array([len(values) for values in own])
    worth = [_falling(v[None], owned[n : n + 1], max(owned)) for n, v in enumerate(own)]
    # Every token runs through it: E/K times as often as through a routed expert on average.
    moes = [config.moe(i) for i in layers.tolist()]
    work = np.array([moe.num_experts / moe.experts_per_token for moe in moes])
    step = cut.width_step * -(-max(owned) // (_SHARED_CHOICES * cut.width_step))
    more = _Pool(
        layers,
        owned,
        1 - cut.active_share + cut.active_share * work,
        totals(np.concatenate(worth)),
        _choices(owned, 1, max(owned), step),
        np.zeros(len(owned), bool),
    )
    order = np.argsort(np.concatenate([pool.layer, more.layer]), kind="stable")
    sizes = [max(getattr(p, name).shape[1] for p in (pool, more)) for name in ("total", "choices")]

    def widened(one: _Pool) -> _Pool:
        total, choices = (
            ((0, 0), (0, size - array.shape[1]))
            for size, array in zip(sizes, (one.total, one.choices), strict=True)
        )
        return one._replace(
            total=np.pad(one.total, total, "edge"),
            choices=np.pad(one.choices, choices, constant_values=-1),
        )

    pairs = zip(widened(pool), widened(more), strict=True)
    return _Pool(*(np.concatenate(pair)[order] for pair in pairs))


def _falling(values: np.ndarray, owned: np.ndarray, width: int) -> np.ndarray:
    """Each expert's own scores, the highest first; zeros past its own width, up to ``width``."""
    inside = np.arange(values.shape[1]) < owned[:, None]
    falling = np.where(inside, -np.sort(np.where(inside, -values, np.inf), axis=1), 0)
    return np.pad(falling.astype(values.dtype), ((0, 0), (0, width - values.shape[1])))


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
    config: ModelConfig, cut: Cut, shapes_of: Callable[[Mapping[int, float]], Layers]
) -> dict[int, float]:
    """The share that each layer keeps; the largest one, of all layers, that fits a budget."""
    width, ratio = cut.expert_width, cut.width_ratio
    if (budget := find_budget(cut)) is None:
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


def _bounds(moe: MoeConfig, layer: int, cut: Cut) -> tuple[int, int]:
    """The fewest and the most neurons of an expert, if it can keep a multiple, or all."""
    least, most = width_bounds(cut, moe, layer)
    step = cut.width_step
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


def _within(pool: _Pool, share: Mapping[int, float], cut: Cut) -> Widths:
    """Widths of all experts of a pool for so much of their price."""
    money = pool.money(share)

    def widths_of(pool: _Pool) -> Int[np.ndarray, " E"]:
        limits = (cut.max_buckets, pool.routed)
        return few_widths(pool.total, pool.choices, pool.price, money, *limits)

    found = widths_of(pool)
    team_of = np.arange(len(found))
    if cut.expert_step > 1:
        pool, team_of = _in_teams(pool, found, cut.expert_step)
        found = widths_of(pool)
    for i in np.unique(pool.layer).tolist():
        rows = (pool.layer == i) & pool.routed
        if not found[rows].any():  # a layer needs one expert with neurons
            best = np.flatnonzero(rows)[pool.total[rows, -1].argmax()]
            found[best] = min(cut.width_step, pool.owned[best])
    layer, widths = pool.layer[team_of], found[team_of]
    return {i: widths[layer == i] for i in np.unique(layer).tolist()}


def _in_teams(
    pool: _Pool, widths: Int[np.ndarray, " E"], size: int
) -> tuple[_Pool, Int[np.ndarray, " E"]]:
    """The routed experts of each layer as teams of ``size`` that are equally wide.

    Those that would be about as wide on their own make a team. If ``size`` does not divide a
    layer's experts, the narrowest are left over, and keep nothing.

    Returns:
        A pool of teams, and of each expert the team that it is in.

    Raises:
        ValueError: experts are left over that must keep some neurons, or there is no whole team.
    """
    team_of, count = np.empty(len(widths), int), 0
    left_over = []
    for i in np.unique(pool.layer).tolist():
        rows = np.flatnonzero((pool.layer == i) & pool.routed)
        rows = rows[np.lexsort((-pool.total[rows, -1], -widths[rows]))]
        team_of[rows] = count + np.arange(len(rows)) // size
        count += -(-len(rows) // size)
        alone = np.flatnonzero((pool.layer == i) & ~pool.routed)
        team_of[alone] = count + np.arange(len(alone))
        count += len(alone)
        if extra := len(rows) % size:
            fewest = pool.choices[rows[-extra:], 0]
            if len(rows) < size or fewest.any():
                raise ValueError(
                    f"layer {i}: experts of each width must be a multiple of {size} "
                    f"(mesh axis 'expert'), got {len(rows)} experts, of which "
                    f"{extra} would have to keep nothing, and min_width = {fewest.max()}"
                )
            left_over.append(team_of[rows[-1]])
    first = np.unique(team_of, return_index=True)[1]
    members = team_of == np.arange(count)[:, None]
    price, total = (
        np.stack([values[team].sum(0) for team in members]) for values in (pool.price, pool.total)
    )
    choices = np.stack(
        [np.where((c := pool.choices[team]).min(0) < 0, -1, c.min(0)) for team in members]
    )
    choices[left_over, 1:] = -1
    owned = np.array([pool.owned[team].min() for team in members])
    return _Pool(pool.layer[first], owned, price, total, choices, pool.routed[first]), team_of


def _layer_plan(moe: MoeConfig, kept: Sequence[tuple[int, ...]], constants: bool) -> LayerPlan:
    """The plan of a layer whose experts, in the order of ``Widths``, keep these neurons."""
    ids = moe.expert_ids
    by_expert = sorted(zip(ids, kept[: len(ids)], strict=True))
    return LayerPlan(
        novices=tuple(e for e, neurons in by_expert if not neurons),
        neurons={e: neurons for e, neurons in by_expert if neurons},
        own_widths=True,
        constants=constants,
        shared_neurons=kept[-1] if len(kept) > len(ids) else None,
    )
