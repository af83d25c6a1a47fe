"""Several compression methods against each other: sizes, ranks, and what calibration does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moe_jax.compare.grid import Calibration, Grid
from moe_jax.compare.results import Row, original, select, spread, values_of
from moe_jax.compare.subjects import Subject
from moe_jax.compare.tables import complete, main_rows, percent_kept, varied_values
from moe_jax.report.facts import Layer, gone_ids
from moe_jax.report.figures import theme as shared
from moe_jax.report.figures.experts import BRIGHT_PERCENTILE, has_values, name_layers, stacked
from moe_jax.report.figures.quality import line_handle, log_scale
from moe_jax.report.figures.theme import (
    DASHES,
    Theme,
    color_bar,
    draw_map,
    label_text,
    legend_above,
    new_figure,
    themed,
)
from moe_jax.scoring import output_deviation
from moe_jax.statistics import Stats

_MARKERS = "osD^vPX"
_LEGEND_COLUMNS = 4
_ACCESS = {"count": "access frequency", "variance": "output deviation"}
# The mark of each method of an access map, and where it stands in its row.
_METHOD_MARKS = {"o": -0.2, "x": 0.22}


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
    """One panel of a figure: bits per byte by method, and of the original with its parameters."""

    title: str
    methods: Mapping[str, Sequence[Measured]]
    original: float
    size: int = 0


def method_styles(names: Sequence[str], focus: str, theme: Theme) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each method, no two alike up to 35; ``focus`` stands out."""
    series, thin = theme.series[1:], {"linewidth": 1.2, "markersize": 5, "zorder": 3}
    styles = {
        name: thin | {"color": series[n % len(series)], "marker": _MARKERS[n % len(_MARKERS)]}
        for n, name in enumerate(name for name in names if name != focus)
    }
    bold = {"color": theme.removed, "marker": "o", "linewidth": 2.4, "markersize": 6.5}
    return styles | {focus: bold | {"zorder": 5}}


@themed
def plot_methods_by_size(theme: Theme, panels: Sequence[Panel], focus: str = "") -> Figure:
    """Bits per byte over the original's against parameters: a panel per model, a line per method.

    On a logarithmic scale, unless a method is not above the original. ``focus`` names the method
    that stands out.

    Raises:
        ValueError: no panel.
    """
    figure, places = _places(panels, 4.6)
    styles = _named_styles(figure, panels, focus, theme)
    for axes, panel in zip(places, panels, strict=True):
        above = {
            name: [
                Measured(point.x / 1e6, point.mean - panel.original, point.deviation)
                for point in sorted(points, key=lambda point: -point.x)
            ]
            for name, points in panel.methods.items()
        }
        for name, points in above.items():
            _line(axes, [point.x for point in points], points, styles[name])
        values = [point.mean for points in above.values() for point in points]
        if min(values, default=0) > 0:
            log_scale(axes, "+{:g}")
            axes.set_ylim(0.7 * min(values), 1.4 * max(values))
        facts = f"{panel.size / 1e6:.2f}M parameters, {panel.original:.4f} bits per byte"
        axes.set_title(f"{label_text(panel.title)}: {facts}")
        axes.invert_xaxis()
        axes.set_xlabel("parameters, millions")
    figure.supylabel("bits per byte more than the original")
    return figure


@themed
def plot_ranks(theme: Theme, panels: Sequence[Panel], focus: str = "") -> Figure:
    """Methods in the order of their bits per byte, with the spread over seeds; a panel per ratio.

    Each method's first value counts.

    Raises:
        ValueError: no panel.
    """
    rows = max((len(panel.methods) for panel in panels), default=0)
    figure, places = _places(panels, 0.9 + 0.23 * rows)
    for axes, panel in zip(places, panels, strict=True):
        ordered = sorted(panel.methods.items(), key=lambda item: item[1][0].mean)
        for y, (name, (point, *_)) in enumerate(ordered):
            color = theme.removed if name == focus else theme.after
            axes.plot([panel.original, point.mean], [y, y], color=theme.grid, linewidth=2)
            style: dict[str, Any] = {"fmt": "o", "markersize": 5.5, "capsize": 3, "color": color}
            axes.errorbar(point.mean, y, xerr=point.deviation, **style)
        axes.axvline(panel.original, color=theme.before, linewidth=1.2, linestyle=DASHES)
        axes.set_yticks(range(len(ordered)), [label_text(name) for name, _ in ordered])
        axes.tick_params(axis="y", labelcolor=theme.ink)
        axes.set_ylim(len(ordered) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
    figure.supxlabel("bits per byte (dashed: the original)")
    return figure


@themed
def plot_robustness(theme: Theme, panels: Sequence[Panel], focus: str = "") -> Figure:
    """Bits per byte against calibration texts or their size: a panel each, a line per method.

    Numbers along the axis are sizes, on a logarithmic scale; names are texts.

    Raises:
        ValueError: no panel.
    """
    figure, places = _places(panels, 3.0)
    styles = _named_styles(figure, panels, focus, theme)
    for axes, panel in zip(places, panels, strict=True):
        values = list(dict.fromkeys(p.x for points in panel.methods.values() for p in points))
        sizes = all(isinstance(value, int) for value in values)
        places_of = {v: math.log2(v) if sizes else n for n, v in enumerate(values)}
        for name, points in panel.methods.items():
            _line(axes, [places_of[point.x] for point in points], points, styles[name])
        labels = [f"{value:,}" if sizes else label_text(value) for value in values]
        axes.set_xticks(list(places_of.values()), labels)
        axes.set_xlabel("calibration sequences" if sizes else "calibration text")
        axes.margins(x=0.08)
    figure.supylabel("bits per byte of held-out text")
    return figure


def _places(panels: Sequence[Panel], height: float) -> tuple[Figure, list[Axes]]:
    figure, places = shared.panels([panel.title for panel in panels], height, columns=2)
    legend_lines = -(-len(_methods(panels)) // _LEGEND_COLUMNS)
    figure.set_figheight(figure.get_figheight() + 0.22 * legend_lines)
    for axes in places:
        axes.grid(axis="x")
    return figure, places


def _methods(panels: Sequence[Panel]) -> list[str]:
    return list(dict.fromkeys(name for panel in panels for name in panel.methods))


def _named_styles(
    figure: Figure, panels: Sequence[Panel], focus: str, theme: Theme
) -> dict[str, dict[str, Any]]:
    """The style of each method, named in a legend above."""
    names = _methods(panels)
    styles = method_styles(names, focus, theme)
    handles = [line_handle(name, **styles[name]) for name in names]
    legend_above(figure, handles, _LEGEND_COLUMNS)
    return styles


def _line(axes: Axes, x: Sequence[float], points: Sequence[Measured], style: dict) -> None:
    """Means over seeds, with their deviations."""
    means, deviations = ([p.mean for p in points], [p.deviation or 0.0 for p in points])
    axes.plot(x, means, **style)
    bars = {"fmt": "none", "color": style["color"], "linewidth": 1}
    axes.errorbar(x, means, yerr=deviations, **bars)


@themed
def plot_access(
    theme: Theme,
    layers: Sequence[Layer],
    gone: Mapping[str, Mapping[int, Mapping[str, Any]]],
) -> Figure:
    """Two maps with a row per layer and a column per expert, marked where experts went.

    Selections are relative to uniform use, deviations (roots of the variance) to the mean of the
    layer: MoNE removes experts in which the product of both is small.

    Args:
        layers: with ``count`` and ``variance``.
        gone: by method, at most two, and layer: ``removed``, ``novices`` and ``merged``.

    Raises:
        ValueError: no layer has these data, or more than two methods.
    """
    shown = [layer for layer in layers if all(has_values(layer, name) for name in _ACCESS)]
    if not shown:
        raise ValueError("layers must hold count and variance in at least one layer, got none")
    if len(gone) > len(_METHOD_MARKS):
        raise ValueError(f"gone must hold at most {len(_METHOD_MARKS)} methods, got {list(gone)}")
    figure = new_figure(1.3 + 2 * (0.45 + 0.34 * len(shown)))
    handles: list[Line2D] = []
    for n, (name, title) in enumerate(_ACCESS.items()):
        axes = figure.add_subplot(2, 1, n + 1, title=title)
        values = stacked([layer[name] for layer in shown])  # type: ignore[literal-required]
        values = np.sqrt(values) if name == "variance" else values
        values /= np.maximum(np.nanmean(values, axis=1, keepdims=True), 1e-30)
        image = draw_map(axes, values, float(np.nanpercentile(values, BRIGHT_PERCENTILE)), theme)
        size = float(np.clip(290 / values.shape[1], 3, 7))
        style: dict[str, Any] = {"linestyle": "", "markerfacecolor": "none"}
        style |= {"color": theme.removed, "markersize": size, "markeredgewidth": 1.3}
        marks = zip(gone.items(), _METHOD_MARKS.items(), strict=False)
        handles = []
        for (method, by_layer), (mark, height) in marks:
            for row, layer in enumerate(shown):
                experts = gone_ids(by_layer.get(layer["layer"], {}))
                axes.plot(experts, [row + height] * len(experts), marker=mark, **style)
            label = f"removed by {label_text(method)}"
            handles.append(Line2D([], [], marker=mark, label=label, **style))
        name_layers(axes, shown)
        color_bar(figure, axes, image, "1 = mean\nof layer")
    legend_above(figure, handles)
    return figure


def size_panels(rows: Sequence[Row], grid: Grid) -> list[Panel]:
    """By model, what methods need for their parameters at the grid's own calibration."""
    return [
        _panel(
            rows,
            model,
            model,
            {
                method: [
                    _measured(statistics.fmean(r["parameters"] for r in group), group)
                    for group in _split(select(chosen, method=method), "ratio")
                ]
                for method in values_of(chosen, "method")
            },
        )
        for model in values_of(rows, "model")
        if (chosen := main_rows(rows, grid, model))
    ]


def rank_panels(rows: Sequence[Row], grid: Grid) -> list[Panel]:
    """By model and ratio, each method's one value."""
    return [
        _panel(
            rows,
            model,
            f"{model}, {percent_kept(ratio)}",
            {m: [_measured(m, select(chosen, method=m))] for m in values_of(chosen, "method")},
        )
        for model in values_of(rows, "model")
        for ratio in values_of(main_rows(rows, grid, model), "ratio")
        if (chosen := select(main_rows(rows, grid, model), ratio=ratio))
    ]


def robustness_panels(rows: Sequence[Row], grid: Grid) -> list[Panel]:
    """By model and ratio, methods over calibration texts and over their sizes."""
    fixed: dict[str, dict[str, Any]] = {
        "source": {"count": grid.count},
        "count": {"source": grid.source},
    }
    panels = []
    for model in values_of(rows, "model"):
        for ratio in values_of(select(rows, model=model), "ratio"):
            for name, others in fixed.items():
                chosen = complete(select(rows, model=model, ratio=ratio, **others), name)
                values = varied_values(chosen, name)
                if len(values) > 1:
                    methods = {
                        method: [
                            _measured(v, select(chosen, method=method, **{name: v})) for v in values
                        ]
                        for method in values_of(chosen, "method")
                    }
                    title = f"{model}, {percent_kept(ratio)}"
                    panels.append(_panel(rows, model, title, methods))
    return panels


def access_maps(
    rows: Sequence[Row], grid: Grid, subjects: Sequence[Subject]
) -> dict[str, tuple[list[dict[str, Any]], dict[str, Mapping[int, Any]]]]:
    """By model and ratio, what ``plot_access`` takes: of the first seed, for focus and rival.

    A model whose statistics are gone is left out.
    """
    maps: dict[str, tuple[list[dict[str, Any]], dict[str, Mapping[int, Any]]]] = {}
    names = [name for name in (grid.focus, grid.rival) if name]
    for subject in subjects:
        chosen = main_rows(rows, grid, subject.label)
        for ratio in values_of(chosen, "ratio"):
            found = {n: r for n in names if (r := select(chosen, ratio=ratio, method=n))}
            if not found:
                continue
            seed = next(iter(found.values()))[0]["seed"]
            sample = Calibration(subject.name, grid.source, grid.count, seed)
            path, key = subject.statistics_path(sample), subject.statistics_key(sample)
            stats = Stats.load_if_same(path, key)
            if stats is None:
                continue
            gone: dict[str, Mapping[int, Any]] = {
                name: {int(i): fates for i, fates in group[0]["layers"].items()}
                for name, group in found.items()
            }
            maps[f"{subject.label}, {percent_kept(ratio)}"] = (_layers(stats), gone)
    return maps


def _layers(stats: Stats) -> list[dict[str, Any]]:
    return [
        {
            "layer": i,
            "count": arrays["count"].tolist(),
            "variance": (output_deviation(arrays) ** 2).tolist(),
        }
        for i, arrays in sorted(stats.layers.items())
    ]


def _panel(
    rows: Sequence[Row], model: str, title: str, methods: Mapping[str, Sequence[Measured]]
) -> Panel:
    before = original(rows, model)
    return Panel(title, methods, before["bits_per_byte"], before["parameters"])


def _measured(x: Any, rows: Sequence[Row]) -> Measured:
    found = spread(rows)
    return Measured(x, found.mean, found.deviation)


def _split(rows: Sequence[Row], name: str) -> list[list[Row]]:
    return [select(rows, **{name: value}) for value in values_of(rows, name)]
