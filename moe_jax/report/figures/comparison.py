"""Several compression methods against each other: sizes, ranks, and what calibration does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from moe_jax.report.figures.panels import label_text
from moe_jax.report.theme import Theme, legend, new_figure, style_axes, theme

_MARKERS = "osD^vPX"
_LEGEND_COLUMNS = 4


class Measured(NamedTuple):
    """Bits per byte of one method at one place of a figure.

    Attributes:
        x: parameters, number of sequences, or a name.
        mean, deviation: over seeds; None for one seed.
    """

    x: Any
    mean: float
    deviation: float | None


class Panel(NamedTuple):
    """One panel of a figure.

    Attributes:
        title: above it.
        methods: by name, what was measured.
        original: bits per byte of the model as it is.
        size: parameters of the model as it is.
    """

    title: str
    methods: Mapping[str, Sequence[Measured]]
    original: float
    size: int = 0


def method_styles(names: Sequence[str], focus: str, colors: Theme) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each method, no two alike up to 35; ``focus`` stands out."""
    styles = {}
    series = colors.series[1:]
    others = [name for name in names if name != focus]
    for n, name in enumerate(others):
        styles[name] = {
            "color": series[n % len(series)],
            "marker": _MARKERS[n % len(_MARKERS)],
            "linewidth": 1.2,
            "markersize": 5,
            "zorder": 3,
        }
    bold = {"color": colors.removed, "marker": "o", "linewidth": 2.4, "markersize": 6.5}
    return styles | {focus: bold | {"zorder": 5}}


def plot_methods_by_size(panels: Sequence[Panel], *, focus: str = "", dark: bool = False) -> Figure:
    """Bits per byte over the original's against parameters: a panel per model, a line per method.

    On a logarithmic scale, unless a method is not above the original. ``focus`` names the method
    that stands out.

    Raises:
        ValueError: no panel.
    """
    colors = theme(dark)
    figure, places = _panels(panels, min(2, len(panels)), 4.6, colors)
    styles = method_styles(_methods(panels), focus, colors)
    for axes, panel in zip(places, panels, strict=True):
        for name, points in panel.methods.items():
            ordered = sorted(points, key=lambda point: -point.x)
            x = [point.x / 1e6 for point in ordered]
            above = [point._replace(mean=point.mean - panel.original) for point in ordered]
            axes.plot(x, [point.mean for point in above], **styles[name])
            _spreads(axes, x, above, styles[name])
        _scale(axes, [p.mean - panel.original for ps in panel.methods.values() for p in ps])
        facts = f"{panel.size / 1e6:.2f}M parameters, {panel.original:.4f} bits per byte"
        title = f"{label_text(panel.title)}: {facts}"
        axes.set_title(title, loc="left", color=colors.ink, size=9.5)
        axes.invert_xaxis()
        axes.set_xlabel("parameters, millions")
    figure.supylabel("bits per byte more than the original", color=colors.ink, size=9)
    _legend(figure, styles, panels, colors)
    return figure


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic if it can be."""
    if min(values, default=0) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"+{value:g}")
        axes.minorticks_off()
        axes.set_ylim(0.7 * min(values), 1.4 * max(values))


def plot_ranks(panels: Sequence[Panel], *, focus: str = "", dark: bool = False) -> Figure:
    """Methods in the order of their bits per byte, with the spread over seeds; a panel per ratio.

    Each method's first value counts.

    Raises:
        ValueError: no panel.
    """
    colors = theme(dark)
    rows = max((len(panel.methods) for panel in panels), default=0)
    figure, places = _panels(panels, min(2, len(panels)), 0.9 + 0.23 * rows, colors)
    for axes, panel in zip(places, panels, strict=True):
        ordered = sorted(panel.methods.items(), key=lambda item: item[1][0].mean)
        for y, (name, (point, *_)) in enumerate(ordered):
            color = colors.removed if name == focus else colors.after
            axes.plot([panel.original, point.mean], [y, y], color=colors.grid, linewidth=2)
            axes.errorbar(
                point.mean, y, xerr=point.deviation, fmt="o", color=color, markersize=5.5, capsize=3
            )
        axes.axvline(panel.original, color=colors.before, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.set_yticks(range(len(ordered)), [label_text(name) for name, _ in ordered])
        axes.tick_params(axis="y", labelcolor=colors.ink)
        axes.set_ylim(len(ordered) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
    figure.supxlabel("bits per byte (dashed: the original)", color=colors.ink, size=9)
    return figure


def plot_robustness(panels: Sequence[Panel], *, focus: str = "", dark: bool = False) -> Figure:
    """Bits per byte against calibration texts or their size: a panel each, a line per method.

    Numbers along the axis are sizes, on a logarithmic scale; names are texts.

    Raises:
        ValueError: no panel.
    """
    colors = theme(dark)
    figure, places = _panels(panels, min(2, len(panels)), 3.0, colors)
    styles = method_styles(_methods(panels), focus, colors)
    for axes, panel in zip(places, panels, strict=True):
        values = list(dict.fromkeys(p.x for points in panel.methods.values() for p in points))
        sizes = all(isinstance(value, int) for value in values)
        places_of = {v: math.log2(v) if sizes else n for n, v in enumerate(values)}
        for name, points in panel.methods.items():
            x = [places_of[point.x] for point in points]
            axes.plot(x, [point.mean for point in points], **styles[name])
            _spreads(axes, x, points, styles[name])
        labels = [f"{value:,}" if sizes else label_text(value) for value in values]
        axes.set_xticks(list(places_of.values()), labels)
        axes.set_xlabel("calibration sequences" if sizes else "calibration text")
        axes.margins(x=0.08)
    figure.supylabel("bits per byte of held-out text", color=colors.ink, size=9)
    _legend(figure, styles, panels, colors)
    return figure


def _panels(
    panels: Sequence[Panel], columns: int, height: float, colors: Theme
) -> tuple[Figure, list[Axes]]:
    if not panels:
        raise ValueError("panels must hold at least one, got none")
    rows = -(-len(panels) // columns)
    legend_lines = -(-len(_methods(panels)) // _LEGEND_COLUMNS)
    figure = new_figure(0.5 + 0.22 * legend_lines + height * rows, colors)
    places = [figure.add_subplot(rows, columns, n + 1) for n in range(len(panels))]
    for axes, panel in zip(places, panels, strict=True):
        style_axes(axes, colors, grid="both")
        axes.set_title(label_text(panel.title), loc="left", color=colors.ink, size=9.5)
    return figure, places


def _methods(panels: Sequence[Panel]) -> list[str]:
    return list(dict.fromkeys(name for panel in panels for name in panel.methods))


def _spreads(axes: Axes, x: Sequence[float], points: Sequence[Measured], style: dict) -> None:
    deviations = [point.deviation or 0.0 for point in points]
    means = [point.mean for point in points]
    axes.errorbar(
        x, means, yerr=deviations, fmt="none", color=style["color"], linewidth=1, capsize=2
    )


def _legend(
    figure: Figure, styles: Mapping[str, dict], panels: Sequence[Panel], colors: Theme
) -> None:
    handles = [Line2D([], [], label=label_text(name), **styles[name]) for name in _methods(panels)]
    legend(figure, colors, handles=handles, loc="outside upper left", ncols=_LEGEND_COLUMNS)
