"""How much calibration text decides: coverage of experts, convergence and intervals of scores.

Statistics keep the sums of disjoint slices of their text (``Stats.slices``). Any weighting of them
gives the statistics of another text of the same kind, so that no further pass over text is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import rankdata

from moe_jax.plan.scores import highest
from moe_jax.scoring import EXPERT_CRITERIA, Beside, score, with_lowest
from moe_jax.statistics import Stats
from moe_jax.statistics_table import per_token, sliced, statistic
from moe_jax.text import counted

# Of n independent tokens, the standard error of a standard deviation is 1 / sqrt(2 (n - 1)) of it,
# and that of a mean 1 / sqrt(n) standard deviations: 7% and a tenth here.
FLOOR = 100
# Text is enough if the second half of it left this share of the kept experts as they were.
ENOUGH = 0.95
# Experts that would be on the other side with this probability are named.
UNSURE = 0.1
# Below so many degrees of freedom, such probabilities are noise themselves.
FEWEST_DEGREES = 3
_BINS_PER_DECADE = 12
_SHARES = (1 / 8, 1 / 4, 1 / 2)
# Ways to choose a share of the text that its numbers are means over.
_DRAWS = 16
_RESAMPLES, _LEVEL = 200, 0.9
_MOST_FEW, _MOST_UNSURE = 100, 20
# Experts that a sentence names.
_SHOWN = 12
Layer = dict[str, np.ndarray]
Keep = float | Mapping[int, int]
# No criterion that text decides draws from it.
_NO_CHANCE = np.random.default_rng(0)


# Any weighting of the slices of a text.


@dataclass(frozen=True)
class Ranking:
    """A ranking of experts, of which is told how much the text decides it.

    Attributes:
        method: a name in ``EXPERT_CRITERIA`` whose scores text decides.
        keep: experts that each layer keeps, or one share of them, in (0, 1].
        among: ids of the experts that compete, by layer; None: all of them.
        options: of the criterion, see ``scoring.score``.
        seed: of the choices of slices.
    """

    method: str
    keep: Keep = 1.0
    among: Mapping[int, Sequence[int]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def competing(self, stats: Stats) -> tuple[dict[int, np.ndarray], dict[int, int]]:
        """By layer, the ids that compete and how many of them stay."""
        ids, kept = {}, {}
        for i, layer in sorted(stats.layers.items()):
            total = len(layer["count"])
            ids[i] = np.arange(total) if self.among is None else np.array(self.among[i], int)
            kept[i] = self.keep[i] if isinstance(self.keep, Mapping) else round(self.keep * total)
            if not 0 < kept[i] <= len(ids[i]):
                raise ValueError(
                    f"layer {i}: keep must leave between 1 and {len(ids[i])} experts, got "
                    f"{self.keep}"
                )
        return ids, kept


def converges(method: str) -> bool:
    """Whether ``convergence`` and ``score_intervals`` know it: it ranks experts by sums of text."""
    criterion = EXPERT_CRITERIA.get(method)
    return criterion is not None and criterion.by_text and not any(map(per_token, criterion.sums))


class Slices:
    """Sums of all slices side by side, [S, ...], and what scores they give together."""

    def __init__(self, stats: Stats, ranking: Ranking) -> None:
        method = ranking.method
        if not converges(method):
            known = sorted(filter(converges, EXPERT_CRITERIA))
            raise ValueError(f"method must rank experts by text, one of {known}, got {method!r}")
        self.criterion = EXPERT_CRITERIA[method]
        self.options = self.criterion.filled(method, ranking.options)
        score(stats, method, **ranking.options)  # refuses statistics that lack its sums
        slices = stats.slices or {(0, 0): stats}
        self.strata = [stratum for stratum, _ in slices]
        self.layers = {
            i: self._stacked([part.layers[i] for part in slices.values()])
            for i in sorted(stats.layers)
        }

    def _stacked(self, layers: Sequence[Layer]) -> Layer:
        """[S, ...] in float64 of what the criterion reads, and of what joins it."""
        reads = {"count", *self.criterion.reads(self.options)}
        if "output_m2" in reads:
            reads.add("output_mean")
        names = [name for name in sliced(layers[0]) if name in reads]
        layer = {
            name: np.stack([np.asarray(x[name], np.float64) for x in layers]) for name in names
        }
        return layer if self.criterion.by_feature else _compact(layer)

    def most_shares(self) -> int:
        return max(self.strata.count(stratum) for stratum in self.strata)

    def places(self) -> Iterator[np.ndarray]:
        """Indices of the slices of each stratum."""
        for stratum in dict.fromkeys(self.strata):
            yield np.flatnonzero(np.equal(self.strata, stratum))

    def choose(self, share: float, rng: np.random.Generator) -> np.ndarray:
        """Weights [S]: 1 for ``share`` of every stratum, at least one slice of it."""
        weights = np.zeros(len(self.strata))
        for places in self.places():
            weights[rng.permutation(places)[: max(1, round(share * len(places)))]] = 1
        return weights

    def resample(self, resamples: int, rng: np.random.Generator) -> np.ndarray:
        """Weights [resamples, S] of the bootstrap."""
        weights = np.ones((resamples, len(self.strata)))
        for places in self.places():
            n = len(places)
            if n > 1:
                weights[:, places] = rng.multinomial(n - 1, [1 / n] * n, resamples) * n / (n - 1)
        return weights

    def scores(self, weights: np.ndarray) -> dict[int, np.ndarray]:
        """By layer, [E], of the text in which slices come so often.

        Layers of zeros, which ``scoring.score`` refuses, may come of a small share of the text.
        """
        scores = {}
        for i, layer in self.layers.items():
            joined = _joined(layer, weights)
            values = self.criterion.function(joined, Beside(_NO_CHANCE), **self.options)
            scores[i] = with_lowest(np.asarray(values, np.float64), joined["count"])
        return scores


def _compact(layer: Layer) -> Layer:
    """Moments of outputs in S coordinates instead of D: the same distances and total variance.

    The means of S slices span no more than S directions. All but the total of the squared
    deviations within slices is lost, which is all that most criteria ask for.
    """
    if "output_mean" not in layer:
        return layer
    mean, squares = layer["output_mean"], layer["output_m2"].sum(-1)
    if mean.shape[-1] <= mean.shape[0]:
        return layer
    deviations = np.moveaxis(mean - mean.mean(0), 0, -1)  # [E, D, S]
    mean = np.moveaxis(np.asarray(np.linalg.qr(deviations, "r")), -1, 0)
    m2 = np.zeros_like(mean)
    m2[..., 0] = squares
    return layer | {"output_mean": mean, "output_m2": m2}


def _joined(layer: Layer, weights: np.ndarray) -> Layer:
    """Sums of the slices, each so many times; moments by Chan's formula for many parts."""
    joined = {}
    for name, sums in layer.items():
        rule = statistic(name).merge
        if rule == "maximum":
            joined[name] = sums[weights > 0].max(0)
        elif rule != "mean":
            joined[name] = np.tensordot(weights, sums, 1)
    for name in layer.keys() - joined.keys():
        counts = (weights[:, None] * layer["count"])[..., None]
        mean = (counts * layer[name]).sum(0) / np.maximum(counts.sum(0), 1e-30)
        joined[name] = mean
        joined[name.removesuffix("mean") + "m2"] += (counts * (layer[name] - mean) ** 2).sum(0)
    return joined


# How many tokens each expert was measured on.


@dataclass(frozen=True)
class Coverage:
    """How many tokens each expert was measured on.

    Attributes:
        floor: what counts as few.
        tokens, experts: of the text, and of all layers.
        few: ``(layer, expert, tokens)`` of the experts below the floor.
        edges, histogram: numbers of experts by tokens, ``edges[n] <= tokens < edges[n + 1]``;
            those that no token reached are in no bin.
        busiest: ``(layer, expert, share)`` of the expert that most of all tokens chose, and of
            how many.
        uniform: the share if all experts of that layer were chosen equally often.
    """

    floor: int
    tokens: int
    experts: int
    few: tuple[tuple[int, int, int], ...]
    edges: tuple[float, ...]
    histogram: tuple[int, ...]
    busiest: tuple[int, int, float]
    uniform: float


def coverage(stats: Stats, floor: int = FLOOR) -> Coverage:
    """Tokens per expert; needs no slices, and holds for every criterion.

    Raises:
        ValueError: a negative floor, or statistics in which no expert was reached.
    """
    if floor < 0:
        raise ValueError(f"floor must not be negative, got {floor}")
    counts = {i: layer["count"] for i, layer in sorted(stats.layers.items())}
    every = np.concatenate([np.zeros(0, int), *counts.values()])
    reached = every[every > 0]
    if not len(reached):
        raise ValueError("these statistics cover no experts; calibrate again")
    middle = max(floor, 1)  # an edge, so that a bin is either below the floor or not
    ends = np.floor(_BINS_PER_DECADE * np.log10([reached.min() / middle, reached.max() / middle]))
    edges = middle * 10 ** (np.arange(ends[0], ends[1] + 2) / _BINS_PER_DECADE)
    busy = max(counts, key=lambda i: counts[i].max())
    return Coverage(
        floor,
        stats.tokens,
        every.size,
        tuple(
            (i, int(e), int(count[e]))
            for i, count in counts.items()
            for e in np.flatnonzero(count < floor)
        ),
        tuple(float(edge) for edge in edges),
        tuple(np.histogram(reached, edges)[0].tolist()),
        (busy, int(counts[busy].argmax()), float(counts[busy].max() / stats.tokens)),
        float(counts[busy].mean() / stats.tokens),
    )


# The kept set of a part of the text against that of all of it.


@dataclass(frozen=True)
class Convergence:
    """How the kept experts of a share of the text compare with those of all of it.

    Attributes:
        shares: of the text, ascending; the last one is 1. It alone is there if the text was not
            shared out.
        layers, kept: indices, and experts that each keeps.
        common: [shares, layers], part of the kept experts that both keep.
        rank_correlation: [shares, layers], Spearman's, of the scores.
    """

    shares: tuple[float, ...]
    layers: tuple[int, ...]
    kept: tuple[int, ...]
    common: np.ndarray
    rank_correlation: np.ndarray

    def changed(self) -> float:
        """Kept experts of all layers that were not yet kept by half of the text."""
        return float(((1 - self.common[-2]) * self.kept).sum()) if len(self.shares) > 1 else 0.0


def convergence(stats: Stats, ranking: Ranking) -> Convergence:
    """The kept set after 1/8, 1/4 and 1/2 of the text against that of all of it.

    As many of these as the slices allow, each the mean over several choices of slices. Half of the
    text is part of all of it: between two texts of this size, the set differs more, by about the
    square root of 2.

    Args:
        stats: with slices, from ``calibrate_domains``.
        ranking: what is judged.

    Raises:
        ValueError: another kind of criterion, ``keep`` out of bounds, or see ``scoring.score``.
    """
    slices = Slices(stats, ranking)
    ids, kept = ranking.competing(stats)
    rng = np.random.default_rng(ranking.seed)
    shares = [share for share in _SHARES if share * slices.most_shares() >= 1]
    everything = slices.scores(np.ones(len(slices.strata)))
    best = {i: highest(everything[i][ids[i]], kept[i]) for i in ids}
    found = np.ones((2, len(shares) + 1, len(ids)))
    for n, share in enumerate(shares):
        draws = [slices.scores(slices.choose(share, rng)) for _ in range(_DRAWS)]
        for column, i in enumerate(ids):
            pairs = [(drawn[i][ids[i]], everything[i][ids[i]], best[i]) for drawn in draws]
            found[:, n, column] = np.mean([_compare(*pair) for pair in pairs], axis=0)
    return Convergence((*shares, 1.0), tuple(ids), tuple(kept.values()), *found)


def verdict(found: Convergence) -> str:
    """One sentence: whether to calibrate on more text, and by what."""
    if len(found.shares) < 2:
        return "The text was not shared out (one batch), so nothing can be said of convergence."
    total, changed = sum(found.kept), found.changed()
    common = 1 - changed / max(total, 1)
    told = (
        f"The kept set changed by {changed:.1f} of {total} experts between half and all of the "
        f"text ({common:.1%} stayed)"
    )
    if common >= ENOUGH:
        return f"{told}: enough."
    # Errors shrink with the root of the text: from one to two of it, 1 / sqrt(2) of the last step.
    return (
        f"{told}, less than {ENOUGH:.0%}: calibrate longer; twice the text would change about "
        f"{changed / np.sqrt(2):.0f} more."
    )


def _compare(part: np.ndarray, whole: np.ndarray, best: np.ndarray) -> tuple[float, float]:
    """Common part of the kept sets, and rank correlation of the scores."""
    both = len(np.intersect1d(highest(part, len(best)), best))
    ranks = rankdata([part, whole], axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    lengths = np.linalg.norm(ranks, axis=1).prod()
    # Where all scores are equal, no order can be compared.
    correlation = ranks[0] @ ranks[1] / lengths if lengths else 0.0
    return both / len(best), correlation


# What other text of the same kind and size might have given.


@dataclass(frozen=True)
class Intervals:
    """What other text of the same kind and size might have given, by layer.

    Attributes:
        score, low, high: [E], all of the text, and the ends of the interval; NaN if the text was
            not shared out.
        kept: Bool[E], by all of the text.
        other_side: [E], probability that a kept expert is removed, or a removed one kept.
        degrees: of freedom, slices without one per stratum: how far these numbers can be trusted.
    """

    score: dict[int, np.ndarray]
    low: dict[int, np.ndarray]
    high: dict[int, np.ndarray]
    kept: dict[int, np.ndarray]
    other_side: dict[int, np.ndarray]
    degrees: int


def score_intervals(
    stats: Stats, ranking: Ranking, resamples: int = 200, level: float = 0.9
) -> Intervals:
    """Bootstrap over slices: intervals of scores, and who might have been on the other side.

    Slices are resampled within their strata. Of the N shares of a stratum, N - 1 are drawn and
    weighted with N / (N - 1), so that the variance of sums is right even for two (Rao and Wu 1988,
    "Resampling inference with complex survey data").

    Args:
        stats, ranking: see ``convergence``; its seed is that of the resamples, too.
        resamples: at least 1.
        level: probability that an interval should hold, in (0, 1). With few slices it holds
            somewhat less.

    Raises:
        ValueError: see ``convergence``; an argument out of its bounds.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    slices = Slices(stats, ranking)
    ids, kept = ranking.competing(stats)
    everything = slices.scores(np.ones(len(slices.strata)))
    degrees = len(slices.strata) - len(set(slices.strata))
    weights = slices.resample(resamples, np.random.default_rng(ranking.seed))
    drawn = [slices.scores(row) for row in weights] if degrees else []
    low, high, stays, other_side = {}, {}, {}, {}
    for i in ids:
        rows = np.stack([scores[i] for scores in drawn]) if drawn else np.full((1, 1), np.nan)
        tails = np.quantile(rows, [(1 - level) / 2, (1 + level) / 2], axis=0)
        low[i], high[i] = np.broadcast_to(tails, (2, len(everything[i])))
        stays[i] = _is_kept(everything[i], ids[i], kept[i])
        flips = [_is_kept(scores[i], ids[i], kept[i]) != stays[i] for scores in drawn]
        other_side[i] = np.mean(flips, axis=0) if drawn else np.full(len(stays[i]), np.nan)
    return Intervals(everything, low, high, stays, other_side, degrees)


def _is_kept(scores: np.ndarray, ids: np.ndarray, count: int) -> np.ndarray:
    kept = np.zeros(len(scores), bool)
    kept[ids[highest(scores[ids], count)]] = True
    return kept


# The above as plain data for a report, and as sentences.


def describe_confidence(
    stats: Stats,
    method: str,
    keep: Keep | None,
    *,
    among: Mapping[int, Sequence[int]] | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What there is to say of a ranking; of some, coverage alone.

    Args:
        stats: of calibration; empty is what comes of statistics in which no expert was reached.
        method: what ranked: a criterion, or the name of another way to cut.
        keep: see ``Ranking``; None if the kept set is not the top of a ranking of experts.
        among, seed, options: see ``Ranking``.
    """
    if not any(layer["count"].any() for layer in stats.layers.values()):
        return {}
    told: dict[str, Any] = {"coverage": _coverage(coverage(stats))}
    if keep is None or not converges(method):
        why = "is no ranking of experts by their text"
        return {"verdict": f"{method} {why}: coverage alone is told."} | told
    ranking = Ranking(method, keep, among, options or {}, seed)
    found = convergence(stats, ranking)
    told["convergence"] = {
        "shares": list(found.shares),
        "layers": list(found.layers),
        "kept": list(found.kept),
        "common": found.common.round(6).tolist(),
        "rank_correlation": found.rank_correlation.round(6).tolist(),
    }
    intervals = score_intervals(stats, ranking, _RESAMPLES, _LEVEL)
    if intervals.degrees >= FEWEST_DEGREES:
        told["unsure"] = _unsure(intervals)
    return {"verdict": verdict(found)} | told


def _coverage(found: Coverage) -> dict[str, Any]:
    return {
        **vars(found),
        "num_few": len(found.few),
        "few": [list(expert) for expert in found.few[:_MOST_FEW]],
        "edges": [float(f"{edge:.5g}") for edge in found.edges],
    }


def _unsure(intervals: Intervals) -> dict[str, Any]:
    experts = [
        (i, int(e), bool(intervals.kept[i][e]), round(float(values[e]), 3))
        for i, values in intervals.other_side.items()
        for e in np.flatnonzero(values >= UNSURE)
    ]
    likeliest = sorted(experts, key=lambda expert: (-expert[-1], expert))
    return {
        "probability": UNSURE,
        "resamples": _RESAMPLES,
        "degrees": intervals.degrees,
        "number": len(experts),
        "experts": [list(expert) for expert in likeliest[:_MOST_UNSURE]],
    }


def coverage_sentence(coverage: Mapping[str, Any]) -> str:
    """Such as ``3 of 256 experts were chosen by fewer than 100 tokens: layer 0: 5 (12 tokens)...``.

    ``coverage`` is that of ``describe_confidence``.
    """
    layer, expert, share = coverage["busiest"]
    most = (
        f"The busiest, expert {expert} of layer {layer}, was chosen by {share:.1%} of the tokens "
        f"({share / coverage['uniform']:.1f} times its even share)."
    )
    number, floor = coverage["num_few"], coverage["floor"]
    if not number:
        return f"Every expert was chosen by at least {floor} tokens. {most}"
    by_layer: dict[int, list[str]] = {}
    for i, e, tokens in coverage["few"][:_SHOWN]:
        by_layer.setdefault(i, []).append(f"{e} ({tokens})")
    named = "; ".join(f"layer {i}: {', '.join(names)}" for i, names in by_layer.items())
    more = number - min(len(coverage["few"]), _SHOWN)
    return (
        f"{number} of {coverage['experts']} experts were chosen by fewer than {floor} tokens: "
        f"{named}{f' and {more} more' if more else ''}. {most}"
    )


def unsure_sentence(unsure: Mapping[str, Any]) -> str:
    """Which experts other text of equal size might well have decided otherwise (bootstrap).

    ``unsure`` is that of ``describe_confidence``.
    """
    number, experts = unsure["number"], unsure["experts"][:_SHOWN]
    told = (
        f"With other text of this size, {counted(number, 'expert') if number else 'no experts'} "
        f"would be on the other side with a probability of at least {unsure['probability']:.0%}"
    )
    named = ", ".join(
        f"layer {i} expert {e} ({'kept' if kept else 'removed'}, {probability:.0%})"
        for i, e, kept, probability in experts
    )
    more = f" and {number - len(experts)} more" if number > len(experts) else ""
    return f"{told}: {named}{more}." if named else f"{told}."
