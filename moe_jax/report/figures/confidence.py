"""How much text a stage's ranking rests on, and what less of it would have kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_jax.report.theme import Theme, new_figure, style_axes, theme
from moe_jax.text import short_count


def plot_confidence(confidence: Mapping[str, Any], *, dark: bool = False) -> Figure:
    """Histogram of tokens per expert, and the kept set against the share of the text.

    Args:
        confidence: CONFIDENCE of ``moe_jax.report``.

    Raises:
        ValueError: it has no coverage.
    """
    coverage = confidence.get("coverage")
    if not coverage:
        raise ValueError("confidence must hold coverage, got none")
    colors = theme(dark)
    figure = new_figure(2.6, colors)
    converges = shows_convergence(confidence)
    _draw_coverage(figure.add_subplot(1, 1 + converges, 1), coverage, colors)
    if converges:
        _draw_convergence(figure.add_subplot(1, 2, 2), confidence["convergence"], colors)
    return figure


def shows_convergence(confidence: Mapping[str, Any]) -> bool:
    """Whether there is a share of the text to compare with all of it."""
    return len((confidence.get("convergence") or {}).get("shares") or ()) > 1


def _draw_coverage(axes: Axes, coverage: Mapping[str, Any], colors: Theme) -> None:
    edges, floor = np.asarray(coverage["edges"], float), coverage["floor"]
    few = edges[1:] <= floor
    fill = [colors.removed if below else colors.after for below in few]
    axes.bar(
        edges[:-1],
        coverage["histogram"],
        width=np.diff(edges),
        align="edge",
        color=fill,
        edgecolor=colors.paper,
        linewidth=0.6,
    )
    axes.set_xscale("log")
    axes.axvline(floor, color=colors.removed, linewidth=1.2, linestyle=(0, (4, 3)))
    style_axes(axes, colors, grid="y")
    axes.set_xlim(min(edges[0], 0.8 * floor), max(edges[-1], 1.25 * floor))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
    axes.minorticks_off()
    axes.set_xlabel("calibration tokens of an expert")
    axes.set_title("experts", loc="left", color=colors.ink, size=9.5)


def _draw_convergence(axes: Axes, convergence: Mapping[str, Any], colors: Theme) -> None:
    shares = 100 * np.asarray(convergence["shares"], float)
    common = 100 * np.asarray(convergence["common"], float)
    means = np.average(common, axis=1, weights=convergence["kept"])
    if common.shape[1] > 1:
        low, high = common.min(1), common.max(1)
        axes.fill_between(shares, low, high, color=colors.after, alpha=0.18, linewidth=0)
    axes.plot(shares, means, "o-", color=colors.after, linewidth=1.8, markersize=5)
    for x, y in zip(shares[:-1], means[:-1], strict=True):
        axes.annotate(
            f"{y:.1f}%",
            (x, y),
            xytext=(6, -3),
            textcoords="offset points",
            va="top",
            color=colors.ink,
            size=8.5,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(shares, [f"{share:g}%" for share in shares])
    axes.minorticks_off()
    style_axes(axes, colors, grid="y")
    axes.margins(y=0.15)
    axes.set_xlabel("share of the calibration text")
    title = "kept experts that all of the text keeps, too, %"
    axes.set_title(title, loc="left", color=colors.ink, size=9.5)
