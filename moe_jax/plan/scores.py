"""Scores by layer: checks, and the highest of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Scores = Mapping[int, np.ndarray]


def check_scores(name: str, scores: Scores, what: str, layers: tuple[int, ...]) -> None:
    """Raises ValueError for scores that miss one of ``layers`` or are not finite."""
    if set(scores) != set(layers):
        raise ValueError(f"{name} must cover the {what} {layers}, got {sorted(scores)}")
    for i, values in scores.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{name} of layer {i} hold a NaN or infinity")


def check_shape(name: str, layer: int, values: np.ndarray, expected: tuple[int, ...]) -> None:
    """Raises ValueError for scores of another shape."""
    if values.shape != expected:
        raise ValueError(f"{name} of layer {layer} must be {list(expected)}, got {values.shape}")


def highest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` highest values, ascending; ties go to the lower index."""
    return np.sort(np.argsort(-values, kind="stable")[:count])
