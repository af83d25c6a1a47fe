"""How far scores and kept experts depend on the text: parts of it, and other text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from moe_jax.confidence.slices import Ranking, Slices
from moe_jax.plan.scores import highest
from moe_jax.statistics import Stats

# Text is enough if the second half of it left this share of the kept experts as they were.
ENOUGH = 0.95
_SHARES = (1 / 8, 1 / 4, 1 / 2)
# Ways to choose a share of the text that its numbers are means over.
_DRAWS = 16


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
