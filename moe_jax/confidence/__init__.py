"""How much calibration text decides: coverage of experts, convergence and intervals of scores.

Statistics keep the sums of disjoint slices of their text (``Stats.slices``). Any weighting of them
gives the statistics of another text of the same kind, so that no further pass over text is needed.
"""

from moe_jax.confidence.coverage import FLOOR, Coverage, coverage
from moe_jax.confidence.describe import (
    FEWEST_DEGREES,
    UNSURE,
    coverage_sentence,
    describe_confidence,
    unsure_sentence,
)
from moe_jax.confidence.resampling import (
    ENOUGH,
    Convergence,
    Intervals,
    convergence,
    score_intervals,
    verdict,
)
from moe_jax.confidence.slices import Ranking, Slices, converges

__all__ = [
    "ENOUGH",
    "FEWEST_DEGREES",
    "FLOOR",
    "UNSURE",
    "Convergence",
    "Coverage",
    "Intervals",
    "Ranking",
    "Slices",
    "convergence",
    "converges",
    "coverage",
    "coverage_sentence",
    "describe_confidence",
    "score_intervals",
    "unsure_sentence",
    "verdict",
]
