"""A report as text for a terminal."""

from __future__ import annotations

from moe_jax.report.elements import TERMINAL, Facts, Table
from moe_jax.report.facts import Report
from moe_jax.report.sections import document
from moe_jax.text import aligned


def summary_table(report: Report) -> str:
    """The numbers of a run; sections without data are left out.

    Sizes, quality and speed before and after; means over domains from stage to stage; each domain's
    perplexity and bits per byte, and its KL divergence (nats per token) and top-1 agreement with
    the original; how much of the kept set half of the calibration text would have kept; memory and
    time; warnings.
    """
    told = document(report)
    parts = []
    for element in (e for section in told.sections for e in section.shown(TERMINAL)):
        if isinstance(element, Table):
            parts.append(aligned(element.rows))
        elif isinstance(element, Facts):
            parts.append(aligned(list(element.facts.items())))
    return "\n\n".join([*parts, *(f"warning: {warning}" for warning in told.warnings)])
