"""The numbers of a run as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_jax.report.stages import confidence_rows, point_rows, stage_points
from moe_jax.report.tables import (
    DOMAIN_HEADER,
    Row,
    domain_rows,
    headline_rows,
    run_rows,
)
from moe_jax.text import aligned


def summary_table(report: Mapping[str, Any]) -> str:
    """The numbers of a run as text for a terminal; sections without data are left out.

    Sizes, quality and speed before and after; means over domains from stage to stage; each
    domain's perplexity and bits per byte, and its KL divergence (nats per token) and top-1
    agreement with the original; memory and time; how much of the kept set half of the calibration
    text would have kept.
    """
    parts = []
    headline = headline_rows(report)
    if headline:
        header = Row("", "before", "after", "change")
        parts.append(aligned([header, *headline]))
    points = point_rows(stage_points(report))
    if points:
        parts.append(aligned(points))
    domains = domain_rows(report)
    if domains:
        parts.append(aligned([DOMAIN_HEADER, *domains]))
    run = [*run_rows(report), *confidence_rows(report)]
    if run:
        parts.append(aligned(run))
    parts += [f"warning: {warning}" for warning in report.get("warnings") or ()]
    return "\n\n".join(parts)
