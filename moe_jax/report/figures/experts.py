"""What was measured of a stage's experts, and which of them went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moe_jax.report.figures.panels import Layers, color_bar, draw_map, has_values, small_multiples
from moe_jax.report.tables import merged_ids
from moe_jax.report.theme import Theme, legend, new_figure, style_axes, theme

# Width of a full map without its labels, in points (1/72 inch).
_MAP_POINTS = 490


def plot_experts(layers: Layers, *, dark: bool = False) -> Figure:
    """Each layer's experts: how much is routed to them against how much their output varies.

    Uses ``routing_mass`` (else ``count``) and ``variance``, whose root is the output deviation,
    and marks ``removed``, ``novices`` and ``merged``.

    Raises:
        ValueError: no layer has these data.
    """
    shown = layers_with_experts(layers)
    by_mass = all(has_values(layer, "routing_mass") for layer in shown)
    colors = theme(dark)
    figure, panels = small_multiples(shown, 1.9, colors)
    for axes, layer in zip(panels, shown, strict=True):
        routed = np.asarray(layer["routing_mass" if by_mass else "count"], float)
        share = 100 * routed / max(routed.sum(), 1e-30)
        deviation = np.sqrt(np.asarray(layer["variance"], float))
        _scatter_experts(axes, share, deviation, layer, colors)
        style_axes(axes, colors, grid="both")
        axes.set_xlim(left=-0.04 * share.max())
        axes.set_ylim(bottom=-0.04 * deviation.max())
    unit = "routing weight" if by_mass else "selections"
    figure.supxlabel(f"share of the layer's {unit}, %", color=colors.ink, size=9)
    figure.supylabel("output deviation", color=colors.ink, size=9)
    _legend_of_fates(figure, shown, colors, kept=True)
    return figure


def layers_with_experts(layers: Layers) -> list[Mapping[str, Any]]:
    """The layers that have what ``plot_experts`` shows."""
    return [
        layer
        for layer in layers
        if has_values(layer, "variance")
        and (has_values(layer, "routing_mass") or has_values(layer, "count"))
    ]


def _scatter_experts(axes: Axes, x, y, layer: Mapping[str, Any], colors: Theme) -> None:
    fates = _fates(layer, len(x))
    for fate, style in _fate_styles(colors).items():
        chosen = fates == fate
        axes.plot(x[chosen], y[chosen], linestyle="", **style)


def _fates(layer: Mapping[str, Any], num_experts: int) -> np.ndarray:
    fates = np.full(num_experts, "kept", object)
    fates[list(layer.get("removed") or ())] = "removed"
    fates[list(layer.get("novices") or ())] = "replaced by a constant"
    fates[merged_ids(layer)] = "merged into another"
    return fates


def _fate_styles(colors: Theme) -> dict[str, dict[str, Any]]:
    kept = {"marker": "o", "markersize": 5, "color": colors.after, "markeredgewidth": 0}
    cross = {"marker": "x", "markersize": 5.5, "color": colors.removed, "markeredgewidth": 1.5}
    novice = {
        "marker": "o",
        "markersize": 5.5,
        "color": colors.removed,
        "markerfacecolor": "none",
        "markeredgewidth": 1.4,
    }
    plus = cross | {"marker": "+", "markersize": 7}
    return {
        "kept": kept,
        "removed": cross,
        "replaced by a constant": novice,
        "merged into another": plus,
    }


def _legend_of_fates(figure: Figure, layers: Layers, colors: Theme, *, kept: bool) -> None:
    """Names the marks in use, unless all experts stayed."""
    found = {fate for layer in layers for fate in _fates(layer, _num_experts(layer))}
    if found <= {"kept"}:
        return
    found = found if kept else found - {"kept"}
    handles = [
        Line2D([], [], linestyle="", label=fate, **style)
        for fate, style in _fate_styles(colors).items()
        if fate in found
    ]
    legend(figure, colors, handles=handles, loc="outside upper left", ncols=len(handles))


def plot_scores(layers: Layers, *, dark: bool = False) -> Figure:
    """Map of every expert's score, one row per layer, with those that did not stay marked.

    Uses ``score``, divided by each layer's largest, since experts compete within their layer.

    Raises:
        ValueError: no layer has a score.
    """
    shown = [layer for layer in layers if has_values(layer, "score")]
    if not shown:
        raise ValueError("layers must hold a score in at least one layer, got none")
    colors = theme(dark)
    widest = max(len(layer["score"]) for layer in shown)
    scores = np.full((len(shown), widest), np.nan)
    for row, layer in enumerate(shown):
        score = np.asarray(layer["score"], float)
        scores[row, : len(score)] = score / max(np.nanmax(score), 1e-30)
    figure = new_figure(1.25 + 0.3 * len(shown), colors)
    axes = figure.add_subplot()
    image = draw_map(axes, scores, 1.0, colors)
    size = min(5.5, 0.6 * _MAP_POINTS / widest)
    for row, layer in enumerate(shown):
        fates = _fates(layer, len(layer["score"]))
        for fate, style in _fate_styles(colors).items():
            experts = np.flatnonzero(fates == fate)
            if fate != "kept" and len(experts):
                axes.plot(
                    experts, [row] * len(experts), linestyle="", **style | {"markersize": size}
                )
    axes.set_yticks(range(len(shown)), [f"layer {layer['layer']}" for layer in shown])
    axes.set_xlabel("expert")
    color_bar(figure, axes, image, "score, share of\nthe layer's largest", colors)
    _legend_of_fates(figure, shown, colors, kept=False)
    return figure


def _num_experts(layer: Mapping[str, Any]) -> int:
    for key in ("score", "variance", "count", "routing_mass"):
        if has_values(layer, key):
            return len(layer[key])
    return 0
