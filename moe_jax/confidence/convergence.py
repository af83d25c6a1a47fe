"""The kept set of a part of calibration text against that of all of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
    ranks = np.stack([_ranks(part), _ranks(whole)])
    ranks -= ranks.mean(1, keepdims=True)
    lengths = np.linalg.norm(ranks, axis=1).prod()
    # Where all scores are equal, no order can be compared.
    correlation = ranks[0] @ ranks[1] / lengths if lengths else 0.0
    return both / len(best), correlation


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties at the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]
