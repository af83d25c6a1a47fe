"""Figures of a comparison: sizes, ranks, calibrations, trainings, and who is removed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moe_jax.compare.grid import Calibration, Grid
from moe_jax.compare.results import (
    Row,
    by_mark,
    complete,
    courses,
    main_rows,
    original,
    outside_studies,
    percent_kept,
    ranking,
    select,
    spread,
    study_rows,
    values_of,
)
from moe_jax.compare.subjects import Subject
from moe_jax.compare.tables import varied_values
from moe_jax.report.facts import Layer, gone_ids
from moe_jax.report.figures import theme as shared
from moe_jax.report.figures.experts import BRIGHT_PERCENTILE, has_values, name_layers, stacked
from moe_jax.report.figures.quality import line_handle, log_scale, running_mean
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
from moe_jax.run.describe import measured_layer
from moe_jax.statistics import Stats

_MARKERS = "osD^vPX"
_LEGEND_COLUMNS = 4
_ACCESS = {"count": "access frequency", "variance": "output deviation"}
# The mark of each method of an access map, and where it stands in its row.
_METHOD_MARKS = {"o": -0.2, "x": 0.22}


class Point(NamedTuple):
    """One method at one place of a figure; no deviation of one seed."""

    x: float
    mean: float
    deviation: float | None = None


class Panel(NamedTuple):
    """One panel of a figure.

    Attributes:
        title: above it.
        lines: by method.
        xlabel: below it.
        ticks: names of places along the axis, where numbers are not enough.
        original: what the model as it is has.
        above: whether lines tell how much more than that methods have; on a logarithmic scale
            unless one of them does not.
    """

    title: str
    lines: Mapping[str, Sequence[Point]]
    xlabel: str = ""
    ticks: Mapping[float, str] = {}
    original: float = 0.0
    above: bool = False


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
def plot_lines(
    theme: Theme,
    panels: Sequence[Panel],
    ylabel: str,
    focus: str = "",
    *,
    falling: bool = False,
    level: bool = False,
) -> Figure:
    """A line per method in each panel, with the deviations over seeds.

    Args:
        panels: what to draw.
        ylabel: of all panels.
        focus: the method that stands out; with ``level``, the last one if none is given.
        falling: from large to small.
        level: go on dotted from where ``focus`` starts, to meet the others where they get there.

    Raises:
        ValueError: no panel.
    """
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    figure, places = shared.panels([panel.title for panel in panels], 3.8, columns=2)
    figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(names) // _LEGEND_COLUMNS))
    if level and names:
        focus = focus or names[-1]
    styles = method_styles(names, focus, theme)
    for axes, panel in zip(places, panels, strict=True):
        axes.grid(axis="x")
        for name, points in panel.lines.items():
            x, means, deviations = zip(
                *((p.x, p.mean, p.deviation or 0) for p in points), strict=True
            )
            axes.plot(x, means, **styles[name])
            bars = {"fmt": "none", "color": styles[name]["color"], "linewidth": 1}
            axes.errorbar(x, means, yerr=deviations, **bars)
        if level and focus in panel.lines:
            dots = {"color": styles[focus]["color"], "linestyle": ":", "linewidth": 1.4}
            axes.axhline(panel.lines[focus][0].mean, **dots)
        values = [point.mean for points in panel.lines.values() for point in points]
        if panel.above and min(values, default=0) > 0:
            log_scale(axes, "+{:g}")
            axes.set_ylim(0.7 * min(values), 1.4 * max(values))
        if panel.ticks:
            axes.set_xticks(list(panel.ticks), list(map(label_text, panel.ticks.values())))
            axes.margins(x=0.08)
        if falling:
            axes.invert_xaxis()
        axes.set_xlabel(panel.xlabel)
    figure.supylabel(ylabel)
    handles = [line_handle(name, **styles[name]) for name in names]
    legend_above(figure, handles, _LEGEND_COLUMNS)
    return figure


@themed
def plot_ranks(theme: Theme, panels: Sequence[Panel], focus: str = "") -> Figure:
    """Methods from top to bottom with the spread over seeds, and the original.

    Each method's first value counts.

    Raises:
        ValueError: no panel.
    """
    rows = max((len(panel.lines) for panel in panels), default=0)
    figure, places = shared.panels([p.title for p in panels], 0.9 + 0.23 * rows, columns=2)
    for axes, panel in zip(places, panels, strict=True):
        for y, (name, (point, *_)) in enumerate(panel.lines.items()):
            color = theme.removed if name == focus else theme.after
            axes.plot([panel.original, point.mean], [y, y], color=theme.grid, linewidth=2)
            style: dict[str, Any] = {"fmt": "o", "markersize": 5.5, "capsize": 3, "color": color}
            axes.errorbar(point.mean, y, xerr=point.deviation, **style)
        axes.axvline(panel.original, color=theme.before, linewidth=1.2, linestyle=DASHES)
        axes.set_yticks(range(len(panel.lines)), list(map(label_text, panel.lines)))
        axes.tick_params(axis="y", labelcolor=theme.ink)
        axes.set_ylim(len(panel.lines) - 0.4, -0.6)
        axes.grid(axis="both", visible=False)
        axes.grid(axis="x")
    figure.supxlabel("bits per byte (dashed: the original)")
    return figure


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
    panels = []
    for model in values_of(rows, "model"):
        chosen, before = main_rows(outside_studies(rows), grid, model), original(rows, model)
        bits = before["bits_per_byte"]
        lines = {
            method: sorted(
                (
                    _point(statistics.fmean(r["parameters"] for r in group) / 1e6, group, bits)
                    for ratio in values_of(chosen, "ratio")
                    if (group := select(chosen, method=method, ratio=ratio))
                ),
                reverse=True,
            )
            for method in values_of(chosen, "method")
        }
        if chosen:
            facts = f"{before['parameters'] / 1e6:.2f}M parameters, {bits:.4f} bits per byte"
            title = f"{model}: {facts}"
            panels.append(Panel(title, lines, "parameters, millions", above=True))
    return panels


def rank_panels(rows: Sequence[Row], grid: Grid) -> list[Panel]:
    """By model and ratio, the lowest on top."""
    return [
        _rank_panel(
            f"{model}, {percent_kept(ratio)}",
            {rank.method: rank.rows for rank in ranking(select(chosen, ratio=ratio))},
            original(rows, model),
        )
        for model in values_of(rows, "model")
        for chosen in [main_rows(outside_studies(rows), grid, model)]
        for ratio in values_of(chosen, "ratio")
    ]


def study_panels(rows: Sequence[Row], grid: Grid) -> list[Panel]:
    """By study and model, methods in the order in which they were given."""
    panels = []
    for title in grid.studies:
        for model in values_of(study_rows(rows, title), "model"):
            chosen = select(study_rows(rows, title), model=model)
            groups = {m: select(chosen, method=m) for m in values_of(chosen, "method")}
            panels.append(_rank_panel(title, groups, original(rows, model)))
    return panels


def _rank_panel(title: str, groups: Mapping[str, Sequence[Row]], before: Row) -> Panel:
    lines = {method: [_point(0, group)] for method, group in groups.items()}
    return Panel(title, lines, original=before["bits_per_byte"])


def robustness_panels(rows: Sequence[Row], grid: Grid) -> list[Panel]:
    """By model and ratio, methods over calibration texts and over their sizes (logarithmic)."""
    fixed: dict[str, dict[str, Any]] = {
        "source": {"count": grid.count},
        "count": {"source": grid.source},
    }
    panels = []
    apart = outside_studies(rows)
    for model in values_of(rows, "model"):
        for ratio in values_of(select(apart, model=model), "ratio"):
            for name, others in fixed.items():
                chosen = complete(select(apart, model=model, ratio=ratio, **others), name)
                values = varied_values(chosen, name)
                if len(values) < 2:
                    continue
                counts = name == "count"
                places = {v: math.log2(v) if counts else float(n) for n, v in enumerate(values)}
                lines = {
                    method: [
                        _point(places[v], select(chosen, method=method, **{name: v}))
                        for v in values
                    ]
                    for method in values_of(chosen, "method")
                }
                title = f"{model}, {percent_kept(ratio)}"
                xlabel = "calibration sequences" if counts else "calibration text"
                ticks = {x: f"{v:,}" if counts else v for v, x in places.items()}
                panels.append(Panel(title, lines, xlabel, ticks))
    return panels


def course_panels(rows: Sequence[Row]) -> list[Panel]:
    """By study, what trainings of several lengths leave above the original."""
    panels = []
    for title, methods in courses(rows).items():
        model = next(iter(methods.values()))[0]["model"]
        bits = original(rows, model)["bits_per_byte"]
        lines = {
            method: [_point(p[0]["tokens"] / 1e3, p, bits) for p in by_mark(group)]
            for method, group in methods.items()
        }
        panels.append(Panel(title, lines, "thousand tokens of training", above=True))
    return panels


def curve_panels(rows: Sequence[Row], grid: Grid) -> list[Panel]:
    """By study, the cross-entropy of the text while methods train, means over seeds, smoothed.

    The text is new at each step and the same for all: curves rise and fall together with it.
    """
    panels = []
    for title in grid.studies:
        lines = {}
        for method in values_of(study_rows(rows, title), "method"):
            group = select(study_rows(rows, title), method=method)
            steps = list(zip(*(row["curve"] for row in group), strict=False))
            means = np.array([statistics.fmean(record["lm"] for record in s) for s in steps])
            if len(steps) > 1:
                x = [s[0]["tokens"] / 1e3 for s in steps]
                lines[method] = list(map(Point, x, running_mean(means, 7)))
        if lines:
            panels.append(Panel(title, lines, "thousand training tokens"))
    return panels


def access_maps(
    rows: Sequence[Row], grid: Grid, subjects: Sequence[Subject]
) -> dict[str, tuple[list[Layer], dict[str, Mapping[int, Any]]]]:
    """By model and ratio, what ``plot_access`` takes: of the first seed, for focus and rival.

    A model whose statistics are gone is left out.
    """
    maps: dict[str, tuple[list[Layer], dict[str, Mapping[int, Any]]]] = {}
    names = [name for name in (grid.focus, grid.rival) if name]
    for subject in subjects:
        chosen = main_rows(outside_studies(rows), grid, subject.label)
        for ratio in values_of(chosen, "ratio"):
            found = {n: r for n in names if (r := select(chosen, ratio=ratio, method=n))}
            if not found:
                continue
            seed = next(iter(found.values()))[0]["seed"]
            sample = Calibration(subject.name, grid.source, grid.count, seed)
            path, key = subject.statistics_path(sample), subject.statistics_key(sample)
            stats = Stats.load_if_same(path, key)
            if stats is not None:
                gone: dict[str, Mapping[int, Any]] = {
                    name: {int(i): fates for i, fates in group[0]["layers"].items()}
                    for name, group in found.items()
                }
                layers = [measured_layer(stats, i) for i in sorted(stats.layers)]
                maps[f"{subject.label}, {percent_kept(ratio)}"] = (layers, gone)
    return maps


def _point(x: float, rows: Sequence[Row], above: float = 0.0) -> Point:
    found = spread(rows)
    return Point(x, found.mean - above, found.deviation)
