"""Experts whose rare, huge outputs a model cannot do without ("super experts", arXiv 2507.23279).

They create the massive activations that attention leans on; without the three of Qwen3-30B's 6,144
that are known, the model collapses. Few tokens use them, so that a criterion which takes means may
remove them: what tells them is a maximum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from moe_jax.statistics import Stats

# The paper's: above this percentile of all experts' largest outputs, and this share of the largest.
_PERCENTILE, _OF_LARGEST = 99.5, 0.1
# Ours: and so many times the median, since some expert is above any percentile of any model.
_TIMES_MEDIAN = 10.0


def super_experts(stats: Stats) -> dict[int, tuple[int, ...]]:
    """Their ids by layer, of layers that have any; none where the statistics have no maxima."""
    peaks = {
        i: layer["output_peak"].astype(np.float64)
        for i, layer in stats.layers.items()
        if "output_peak" in layer
    }
    reached = np.concatenate([values[values > 0] for values in peaks.values()] or [np.zeros(0)])
    if not reached.size:
        return {}
    bound = max(
        np.percentile(reached, _PERCENTILE),
        _OF_LARGEST * reached.max(),
        _TIMES_MEDIAN * np.median(reached),
    )
    found = {i: tuple(np.flatnonzero(values >= bound).tolist()) for i, values in peaks.items()}
    return {i: ids for i, ids in found.items() if ids}


def with_floor(
    scores: Mapping[int, np.ndarray], stats: Stats, share: float
) -> Mapping[int, np.ndarray]:
    """Scores by which super experts stay, or ``share`` of their neurons, the best of each.

    These are raised above the sum of all others', so that whatever ranks them, one by one, in an
    expert, a layer or the model, removes all else first.

    Args:
        scores: by layer, of experts [E] or neurons [E, F].
        share: 0 changes nothing.
    """
    found = super_experts(stats) if share else {}
    if not found:
        return scores
    total = sum(np.abs(values).sum() for values in scores.values()) or 1.0
    raised = dict(scores)
    for i, ids in found.items():
        values = np.array(scores[i], np.float64)
        for e in ids:
            if values.ndim == 1:
                values[e] += total
            else:
                count = math.ceil(share * (values[e] > values[e].min()).sum())
                values[e, np.argsort(-values[e], kind="stable")[:count]] += total
        raised[i] = values
    return raised
