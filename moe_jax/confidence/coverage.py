"""How many tokens each expert was measured on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_jax.statistics import Stats

# Of n independent tokens, the standard error of a standard deviation is 1 / sqrt(2 (n - 1)) of it,
# and that of a mean 1 / sqrt(n) standard deviations: 7% and a tenth here.
FLOOR = 100
_BINS_PER_DECADE = 12


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
