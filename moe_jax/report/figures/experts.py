"""What was measured of experts and their neurons, and which of them went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moe_jax.report.facts import Layer, gone_ids, merged_ids
from moe_jax.report.figures.theme import (
    Theme,
    color_bar,
    draw_map,
    label_text,
    legend_above,
    new_figure,
    panels,
    themed,
)

# Above this share of a map's cells the colour scale is cut, so that one expert that takes
# everything does not hide all differences between the others.
BRIGHT_PERCENTILE = 98


def with_experts(layers: Sequence[Layer]) -> list[Layer]:
    """The layers that have what ``plot_experts`` shows."""
    return [
        layer
        for layer in layers
        if has_values(layer, "variance")
        and (has_values(layer, "routing_mass") or has_values(layer, "count"))
    ]


def has_values(layer: Mapping[str, Any], key: str) -> bool:
    return layer.get(key) is not None and len(layer[key]) > 0


@themed
def plot_experts(theme: Theme, layers: Sequence[Layer]) -> Figure:
    """Each layer's experts: how much is routed to them against how much their output varies.

    Uses ``routing_mass`` (else ``count``) and ``variance``, whose root is the output deviation, and
    marks those that did not stay.

    Raises:
        ValueError: no layer has these data.
    """
    shown = with_experts(layers)
    by_mass = all(has_values(layer, "routing_mass") for layer in shown)
    figure, places = panels([f"layer {layer['layer']}" for layer in shown], 1.9)
    for axes, layer in zip(places, shown, strict=True):
        routed = np.asarray(layer["routing_mass"] if by_mass else layer["count"], float)
        share = 100 * routed / max(routed.sum(), 1e-30)
        deviation = np.sqrt(np.asarray(layer["variance"], float))
        for fate, experts in _fates(layer, len(share)).items():
            axes.plot(share[experts], deviation[experts], **_marks(theme)[fate])
        axes.grid(axis="x")
        for set_limits, values in ((axes.set_xlim, share), (axes.set_ylim, deviation)):
            set_limits(*np.array([-0.04, 1.08]) * (values.max() or 1))
    unit = "routing weight" if by_mass else "selections"
    figure.supxlabel(f"share of the layer's {unit}, %")
    figure.supylabel("output deviation")
    _name_fates(figure, shown, theme)
    return figure


def _fates(layer: Layer, num_experts: int) -> dict[str, list[int]]:
    """What became of experts -> their ids, of those fates that occur."""
    gone = {
        "removed": list(layer.get("removed") or ()),
        "replaced by a constant": list(layer.get("novices") or ()),
        "merged into another": merged_ids(layer),
    }
    kept = sorted({*range(num_experts)}.difference(*gone.values()))
    return {fate: experts for fate, experts in {"kept": kept, **gone}.items() if experts}


def _marks(theme: Theme) -> dict[str, dict[str, Any]]:
    cross = {"linestyle": "", "color": theme.removed, "marker": "x", "markersize": 5.5}
    cross["markeredgewidth"] = 1.5
    kept = {"linestyle": "", "color": theme.after, "marker": "o", "markersize": 5}
    return {
        "kept": kept | {"markeredgewidth": 0},
        "removed": cross,
        "replaced by a constant": cross | {"marker": "o", "markerfacecolor": "none"},
        "merged into another": cross | {"marker": "+", "markersize": 7},
    }


def _name_fates(
    figure: Figure, layers: Sequence[Layer], theme: Theme, with_kept: bool = True
) -> None:
    """A legend of the marks in use, unless all experts stayed."""
    found = {fate for layer in layers for fate in _fates(layer, 0)}
    if found and with_kept:
        found.add("kept")
    marks = {fate: style for fate, style in _marks(theme).items() if fate in found}
    legend_above(figure, [Line2D([], [], label=fate, **style) for fate, style in marks.items()])


@themed
def plot_scores(theme: Theme, layers: Sequence[Layer]) -> Figure:
    """Map of every expert's score, one row per layer, with those that did not stay marked.

    Uses ``score``, divided by each layer's largest, since experts compete within their layer.

    Raises:
        ValueError: no layer has a score.
    """
    shown = [layer for layer in layers if has_values(layer, "score")]
    if not shown:
        raise ValueError("layers must hold a score in at least one layer, got none")
    scores = stacked([layer["score"] for layer in shown])
    scores /= np.maximum(np.nanmax(scores, axis=1, keepdims=True), 1e-30)
    figure = new_figure(1.25 + 0.3 * len(shown))
    axes = figure.add_subplot()
    image = draw_map(axes, scores, 1.0, theme)
    size = {"markersize": min(5.5, 290 / scores.shape[1])}
    for row, layer in enumerate(shown):
        for fate, experts in _fates(layer, 0).items():
            axes.plot(experts, [row] * len(experts), **_marks(theme)[fate] | size)
    name_layers(axes, shown)
    color_bar(figure, axes, image, "score, share of\nthe layer's largest")
    _name_fates(figure, shown, theme, with_kept=False)
    return figure


def stacked(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """[layers, most experts], NaN where a layer has fewer."""
    stacked = np.full((len(rows), max(map(len, rows))), np.nan)
    for line, row in zip(stacked, rows, strict=True):
        line[: len(row)] = row
    return stacked


def name_layers(axes: Axes, layers: Sequence[Mapping[str, Any]]) -> None:
    axes.set_yticks(range(len(layers)), [f"layer {layer['layer']}" for layer in layers])
    axes.set_xlabel("expert")


@themed
def plot_routing_by_domain(theme: Theme, layers: Sequence[Layer]) -> Figure:
    """Which experts each domain uses: one map per layer, a row per domain.

    Uses ``frequency`` (domain -> [E], any scale) and marks experts that did not stay below their
    columns. Experts are ordered by the domain that uses them most, so that specialised experts line
    up along a diagonal and generalists show as pale columns.

    Raises:
        ValueError: no layer has frequencies.
    """
    shown = [layer for layer in layers if layer.get("frequency")]
    num_domains = max((len(layer["frequency"]) for layer in shown), default=0)
    titles = [f"layer {layer['layer']}" for layer in shown]
    figure, places = panels(titles, 0.75 + 0.17 * num_domains, columns=2)
    maps = [_relative_frequency(layer["frequency"]) for layer in shown]
    brightest = max(np.percentile(values, BRIGHT_PERCENTILE) for values in maps)
    image = None
    for n, (axes, layer, values) in enumerate(zip(places, shown, maps, strict=True)):
        order = np.lexsort((-values.max(0), values.argmax(0)))
        image = draw_map(axes, values[:, order], brightest, theme)
        axes.set_xticks([])
        domains = [label_text(domain) for domain in layer["frequency"]]
        axes.set_yticks(range(len(domains)), domains if n % 2 == 0 else [""] * len(domains))
        columns = np.flatnonzero(np.isin(order, gone_ids(layer)))
        # An empty line that is not clipped would have no extent and break the layout.
        if len(columns):
            place = [len(domains) - 0.2] * len(columns)
            style: dict[str, Any] = {"linestyle": "", "marker": "^", "clip_on": False}
            axes.plot(columns, place, markersize=4, color=theme.removed, **style)
    marked = "; ▲ did not stay" if any(gone_ids(layer) for layer in shown) else ""
    figure.supxlabel(f"experts, ordered by the domain that uses them most{marked}")
    # Beside the first row only: a bar as tall as many rows leaves no width for them.
    color_bar(figure, places[:2], image, "selections,\n1 = uniform")
    return figure


def _relative_frequency(frequency: Mapping[str, Any]) -> np.ndarray:
    """[domains, E], 1 where a domain uses an expert as often as the average expert."""
    table = np.asarray(list(frequency.values()), float)
    return table * table.shape[1] / np.maximum(table.sum(1, keepdims=True), 1e-30)


@themed
def plot_neuron_importance(theme: Theme, layers: Sequence[Layer]) -> Figure:
    """Sorted neuron importance of every layer's experts, and where the cut falls.

    Uses ``importance`` (what ``importance_curve`` returns).

    Raises:
        ValueError: no layer has it.
    """
    shown = [layer for layer in layers if layer.get("importance")]
    figure, places = panels([f"layer {layer['layer']}" for layer in shown], 1.8)
    for axes, layer in zip(places, shown, strict=True):
        curve = layer["importance"]
        rank, cut = curve["rank"], curve["cut"]
        axes.fill_between(rank, curve["low"], curve["high"], color=theme.after, alpha=0.22, lw=0)
        axes.plot(rank, curve["median"], color=theme.after)
        axes.axvline(cut, color=theme.removed, linewidth=1.3)
        axes.axvspan(cut, 100, color=theme.removed, alpha=0.07, linewidth=0)
        held = f"{cut:.0f}% kept hold {np.mean(curve['kept_share']):.0%}"
        axes.set_title(held, loc="right", color=theme.muted, size=8)
        axes.set_xlim(0, 100)
        axes.set_ylim(bottom=0)
    figure.supxlabel("neurons of an expert by rank, %")
    figure.supylabel("importance (mean neuron = 1)")
    return figure
