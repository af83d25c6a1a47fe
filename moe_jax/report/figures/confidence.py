"""How much text a stage's ranking rests on, and what less of it would have kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_jax.report.facts import Confidence
from moe_jax.report.figures.theme import Theme, new_figure, themed
from moe_jax.text import short_count


@themed
def plot_confidence(theme: Theme, confidence: Confidence) -> Figure:
    """Histogram of tokens per expert, and the kept set against the share of the text.

    Raises:
        ValueError: ``confidence`` has no coverage.
    """
    coverage = confidence.get("coverage")
    if not coverage:
        raise ValueError("confidence must hold coverage, got none")
    figure = new_figure(2.6)
    converges = shows_convergence(confidence)
    _draw_coverage(figure.add_subplot(1, 1 + converges, 1), coverage, theme)
    if converges:
        _draw_convergence(figure.add_subplot(1, 2, 2), confidence["convergence"], theme)
    return figure


def shows_convergence(confidence: Confidence) -> bool:
    """Whether there is a share of the text to compare with all of it."""
    return len((confidence.get("convergence") or {}).get("shares") or ()) > 1


def _draw_coverage(axes: Axes, coverage: Mapping[str, Any], theme: Theme) -> None:
    edges, floor = np.asarray(coverage["edges"], float), coverage["floor"]
    bars = axes.bar(edges[:-1], coverage["histogram"], width=np.diff(edges), align="edge")
    for bar, high in zip(bars, edges[1:], strict=True):
        bar.set(color=theme.removed if high <= floor else theme.after, linewidth=0.6)
        bar.set_edgecolor(theme.paper)
    axes.set_xscale("log")
    axes.axvline(floor, color=theme.removed, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xlim(min(edges[0], 0.8 * floor), max(edges[-1], 1.25 * floor))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
    axes.minorticks_off()
    axes.set_xlabel("calibration tokens of an expert")
    axes.set_title("experts")


def _draw_convergence(axes: Axes, convergence: Mapping[str, Any], theme: Theme) -> None:
    shares = 100 * np.asarray(convergence["shares"], float)
    common = 100 * np.asarray(convergence["common"], float)
    means = np.average(common, axis=1, weights=convergence["kept"])
    if common.shape[1] > 1:
        low, high = common.min(1), common.max(1)
        axes.fill_between(shares, low, high, color=theme.after, alpha=0.18, linewidth=0)
    axes.plot(shares, means, "o-", color=theme.after, markersize=5)
    for x, y in zip(shares[:-1], means[:-1], strict=True):
        at = {"xytext": (6, -3), "textcoords": "offset points", "va": "top"}
        axes.annotate(f"{y:.1f}%", (x, y), size=8.5, **at)  # type: ignore[arg-type]
    axes.set_xscale("log", base=2)
    axes.set_xticks(shares, [f"{share:g}%" for share in shares])
    axes.minorticks_off()
    axes.margins(y=0.15)
    axes.set_xlabel("share of the calibration text")
    axes.set_title("kept experts that all of the text keeps, too, %")
