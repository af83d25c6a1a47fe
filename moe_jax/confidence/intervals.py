"""What other text of the same kind and size might have given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_jax.confidence.slices import Ranking, Slices
from moe_jax.plan.scores import highest
from moe_jax.statistics import Stats


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
