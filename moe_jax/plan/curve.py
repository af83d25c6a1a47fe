"""How far a cut can go: what plans of falling size would remove, from one calibration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.params import count_params
from moe_jax.plan.cut import SIZES, Cut
from moe_jax.plan.make import plan_cut
from moe_jax.plan.validate import planned_config
from moe_jax.statistics import Stats
from moe_jax.text import aligned

RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


class Point(NamedTuple):
    """One size.

    Attributes:
        ratio: share of experts or neurons that stays.
        parameters, active: of the model that is left.
        lost: see ``Planned``.
    """

    ratio: float
    parameters: int
    active: int
    lost: float


def removal_curve(
    cut: Cut,
    stats: Stats,
    config: ModelConfig,
    *,
    ratios: Sequence[float] = RATIOS,
    seed: int = 0,
    params: dict[str, Any] | None = None,
) -> list[Point]:
    """Points of falling size; sizes that the model or the cut's limits do not allow are left out.

    Args:
        cut: whose own size does not count.
        stats, config, seed, params: as for ``plan_cut``.

    Raises:
        ValueError: a cut of layers or of key/value groups alone, or no size is allowed.
    """
    if cut.ranks == "layers" or not cut.sized:
        raise ValueError("a curve is of cuts that rank experts or neurons")
    field = "keep_ratio" if cut.ranks == "experts" else "width_ratio"
    none: dict[str, Any] = dict.fromkeys(SIZES[cut.ranks])
    plain = dataclasses.replace(cut, **none)
    points, refused = [], ""
    for ratio in ratios:
        try:
            size: dict[str, Any] = {field: ratio}
            sized = dataclasses.replace(plain, **size)
            planned = plan_cut(sized, stats, config, seed=seed, params=params)
        except ValueError as error:
            refused = str(error)
            continue
        counts = count_params(planned_config(config, planned.plan))
        points.append(Point(ratio, counts.total, counts.active, planned.lost))
    if not points:
        raise ValueError(f"no ratio of {tuple(ratios)} can be planned: {refused}")
    return points


def knee(points: Sequence[Point]) -> Point:
    """Where the curve turns up: farthest below the line from no cut to the last point.

    Both axes are scaled to that line's ends, so that its units do not matter.
    """
    last = points[-1]
    span = 1 - last.ratio or 1.0
    below = [(1 - p.ratio) / span - (p.lost / last.lost if last.lost else 0.0) for p in points]
    return points[int(np.argmax(below))]


def curve_table(points: Sequence[Point]) -> str:
    """The points as text, with the knee marked."""
    turn = knee(points)
    rows = [("kept", "parameters", "active", "scores lost", "")]
    rows += [
        (
            f"{p.ratio:.0%}",
            f"{p.parameters:,}",
            f"{p.active:,}",
            f"{p.lost:.2%}",
            "knee" if p is turn else "",
        )
        for p in points
    ]
    return aligned(rows)
