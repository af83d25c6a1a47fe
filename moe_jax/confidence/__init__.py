"""How much calibration text decides: coverage of experts, convergence and intervals of scores."""

from moe_jax.confidence.convergence import Convergence, convergence, verdict
from moe_jax.confidence.coverage import FLOOR, Coverage, coverage
from moe_jax.confidence.describe import (
    FEWEST_DEGREES,
    UNSURE,
    coverage_sentence,
    describe_confidence,
    unsure_sentence,
)
from moe_jax.confidence.intervals import Intervals, score_intervals
from moe_jax.confidence.slices import Ranking, converges

__all__ = [
    "FEWEST_DEGREES",
    "FLOOR",
    "UNSURE",
    "Convergence",
    "Coverage",
    "Intervals",
    "Ranking",
    "convergence",
    "converges",
    "coverage",
    "coverage_sentence",
    "describe_confidence",
    "score_intervals",
    "unsure_sentence",
    "verdict",
]
