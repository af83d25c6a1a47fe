"""How well models do: by domain, and from stage to stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moe_jax.report.figures.panels import label_text
from moe_jax.report.stages import Point
from moe_jax.report.theme import Theme, legend, new_figure, style_axes, theme
from moe_jax.text import relative_change, short_count, two_digits

_DASHES = (0, (4, 2))


def plot_bits_per_byte(series: Mapping[str, Mapping[str, float]], *, dark: bool = False) -> Figure:
    """Bits per byte of each domain, one dot per model.

    Args:
        series: label -> domain -> bits per byte, the original model first. With two models each
            row ends in the second one's change.

    Raises:
        ValueError: no series or no domain.
    """
    colors = theme(dark)
    domains = list(dict.fromkeys(domain for values in series.values() for domain in values))
    if not domains:
        raise ValueError("series must hold at least one model with a domain, got none")
    figure = new_figure(1.1 + 0.34 * len(domains), colors)
    axes = figure.add_subplot()
    for y, domain in enumerate(domains):
        found = [values[domain] for values in series.values() if domain in values]
        axes.plot([min(found), max(found)], [y, y], color=colors.grid, linewidth=3, zorder=1)
    for n, (label, values) in enumerate(series.items()):
        axes.scatter(
            [values[d] for d in domains if d in values],
            [y for y, d in enumerate(domains) if d in values],
            s=52,
            color=colors.series[n % len(colors.series)],
            label=label_text(label),
            zorder=2 + n,
        )
    if len(series) == 2:
        before, after = series.values()
        _write_changes(axes, domains, before, after, colors)
    _domain_axis(axes, domains, colors)
    axes.margins(x=0.06)
    axes.set_xlabel("bits per byte of held-out text (lower is better)")
    legend(figure, colors, loc="outside upper left", ncols=len(series))
    return figure


def _write_changes(
    axes: Axes,
    domains: Sequence[str],
    before: Mapping[str, float],
    after: Mapping[str, float],
    colors: Theme,
) -> None:
    for y, domain in enumerate(domains):
        if domain in before and domain in after:
            axes.annotate(
                relative_change(before[domain], after[domain]) or "",
                (1.01, y),
                xycoords=("axes fraction", "data"),
                va="center",
                color=colors.muted,
                size=8.5,
            )


def _domain_axis(axes: Axes, domains: Sequence[str], colors: Theme) -> None:
    style_axes(axes, colors)
    axes.spines["left"].set_visible(False)
    axes.set_yticks(range(len(domains)), [label_text(domain) for domain in domains])
    axes.tick_params(axis="y", labelcolor=colors.ink, labelsize=9)
    axes.set_ylim(len(domains) - 0.5, -0.5)


def plot_kl(divergence: Mapping[str, float], *, dark: bool = False) -> Figure:
    """KL(original || compressed) of each domain as bars.

    Args:
        divergence: domain -> nats per token.

    Raises:
        ValueError: no domain.
    """
    if not divergence:
        raise ValueError("divergence must hold at least one domain, got none")
    colors = theme(dark)
    figure = new_figure(0.8 + 0.34 * len(divergence), colors)
    axes = figure.add_subplot()
    values = list(divergence.values())
    bars = axes.barh(range(len(values)), values, height=0.5, color=colors.after)
    labels = [two_digits(value) for value in values]
    axes.bar_label(bars, labels, padding=4, color=colors.muted, size=8.5)
    _domain_axis(axes, list(divergence), colors)
    axes.set_xlim(0, 1.1 * max(*values, 1e-9))
    axes.set_xlabel("KL divergence from the original model, nats per token")
    return figure


def plot_stages(points: Sequence[Point], *, dark: bool = False) -> Figure:
    """Collapse and recovery: bits per byte, mean of the domains, against tokens trained so far.

    A cut is a jump at the number of tokens where it was made. Training is a straight line to what
    was measured at its end: nothing was in between.

    Args:
        points: what ``stage_points`` returns; those that were not measured are left out.

    Raises:
        ValueError: fewer than two points are left, or none was trained.
    """
    shown = _measured(points)
    if not shows_stages(points):
        raise ValueError("points must hold two that were measured, and a training, got less")
    colors = theme(dark)
    figure = new_figure(3.2, colors)
    axes = figure.add_subplot()
    for (_, *start), (point, *end) in pairwise(shown):
        color = colors.removed if point.cut else colors.after
        axes.plot(*zip(start, end, strict=True), color=color, linewidth=2, zorder=3)
    for point, tokens, bits in shown:
        color = colors.removed if point.cut else colors.after
        if point.tokens == 0 and not point.cut:
            color = colors.before
            axes.axhline(bits, color=color, linewidth=1.2, linestyle=_DASHES, zorder=2)
        axes.plot(tokens, bits, "o", color=color, markersize=6.5, zorder=4)
        _write_point(axes, point, (tokens, bits), colors)
    style_axes(axes, colors, grid="y")
    most = max(tokens for _, tokens, _ in shown)
    # Room for the labels: of a cut at the last token on its right, of any on the left below.
    axes.set_xlim(-0.04 * most, (1.16 if shown[-1][0].cut else 1.04) * most)
    axes.margins(y=0.17)
    axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
    axes.set_xlabel("tokens trained so far")
    axes.set_ylabel("bits per byte, mean of domains")
    _legend_of_steps(figure, shown, colors)
    return figure


def shows_stages(points: Sequence[Point]) -> bool:
    """Whether ``plot_stages`` has two points to show, and a training."""
    shown = _measured(points)
    return len(shown) > 1 and any(tokens for _, tokens, _ in shown)


def _measured(points: Sequence[Point]) -> list[tuple[Point, int, float]]:
    return [
        (point, point.tokens, bits)
        for point in points
        if (bits := point.mean("bits_per_byte")) is not None and point.tokens is not None
    ]


def _write_point(axes: Axes, point: Point, at: tuple[float, float], colors: Theme) -> None:
    """A cut's name and number to the upper right, where no line is; a training's below."""
    name = f"{label_text(point.cut)}\n" if point.cut else ""
    axes.annotate(
        f"{name}{at[1]:.3f}",
        at,
        xytext=(7, 1) if point.cut else (0, -8),
        textcoords="offset points",
        ha="left" if point.cut else "center",
        va="bottom" if point.cut else "top",
        color=colors.ink,
        size=8.5,
        bbox={"facecolor": colors.paper, "edgecolor": "none", "pad": 0.5},
        zorder=3.5,
    )


def _legend_of_steps(
    figure: Figure, shown: Sequence[tuple[Point, float, float]], colors: Theme
) -> None:
    """Names the lines in use."""
    untouched = any(tokens == 0 and not point.cut for point, tokens, _ in shown)
    styles: dict[str, tuple[bool, dict[str, Any]]] = {
        "original": (untouched, {"color": colors.before, "linestyle": _DASHES}),
        "cut": (any(point.cut for point, *_ in shown), {"color": colors.removed}),
        "training": (True, {"color": colors.after}),
    }
    handles = [
        Line2D([], [], label=label, linewidth=2, **style)
        for label, (used, style) in styles.items()
        if used
    ]
    legend(
        figure,
        colors,
        handles=handles,
        loc="outside upper left",
        ncols=len(handles),
        handlelength=2.2,
    )
