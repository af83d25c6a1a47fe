"""Access frequency and output variance of every expert, and which of them a method removes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moe_jax.report.figures.panels import Layers, color_bar, draw_map, has_values, label_text
from moe_jax.report.tables import gone_ids
from moe_jax.report.theme import legend, new_figure, theme

# Above this share of a map's brightest cells the colour scale is cut.
_BRIGHT_PERCENTILE = 98
_MAPS = {"count": "access frequency", "variance": "output deviation"}
# The mark of each method, and where it stands in its row.
_MARKS = {"o": -0.2, "x": 0.22}


def plot_access(
    layers: Layers, gone: Mapping[str, Mapping[int, Mapping[str, Any]]], *, dark: bool = False
) -> Figure:
    """Two maps with a row per layer and a column per expert, marked where experts went.

    Selections are relative to uniform use, deviations (roots of the variance) to the mean of the
    layer: MoNE removes experts in which the product of both is small.

    Args:
        layers: LAYERs of ``moe_jax.report`` with ``count`` and ``variance``.
        gone: by method, at most two, and layer: ``removed``, ``novices`` and ``merged`` as in
            LAYER.

    Raises:
        ValueError: no layer has these data, or more than two methods.
    """
    shown = [layer for layer in layers if all(has_values(layer, name) for name in _MAPS)]
    if not shown:
        raise ValueError("layers must hold count and variance in at least one layer, got none")
    if len(gone) > len(_MARKS):
        raise ValueError(f"gone must hold at most {len(_MARKS)} methods, got {list(gone)}")
    colors = theme(dark)
    figure = new_figure(1.3 + 2 * (0.45 + 0.34 * len(shown)), colors)
    widest = max(len(layer["count"]) for layer in shown)
    for n, (name, title) in enumerate(_MAPS.items()):
        axes = figure.add_subplot(2, 1, n + 1)
        values = np.full((len(shown), widest), np.nan)
        for row, layer in enumerate(shown):
            numbers = np.asarray(layer[name], float)
            numbers = np.sqrt(numbers) if name == "variance" else numbers
            values[row, : len(numbers)] = numbers / max(numbers.mean(), 1e-30)
        brightest = float(np.nanpercentile(values, _BRIGHT_PERCENTILE))
        image = draw_map(axes, values, brightest, colors)
        for layers_gone, (mark, height) in zip(gone.values(), _MARKS.items(), strict=False):
            for row, layer in enumerate(shown):
                experts = gone_ids(layers_gone.get(layer["layer"], {}))
                # An empty line would have no extent and break the layout.
                if experts:
                    places = [row + height] * len(experts)
                    axes.plot(experts, places, linestyle="", **_mark(mark, widest, colors))
        axes.set_yticks(range(len(shown)), [f"layer {layer['layer']}" for layer in shown])
        axes.set_title(title, loc="left", color=colors.ink, size=9.5)
        color_bar(figure, axes, image, "1 = mean\nof layer", colors)
    axes.set_xlabel("expert")
    handles = [
        Line2D([], [], linestyle="", label=f"removed by {label_text(name)}", **style)
        for name, style in zip(gone, (_mark(m, widest, colors) for m in _MARKS), strict=False)
    ]
    if handles:
        legend(figure, colors, handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


def _mark(marker: str, columns: int, colors: Any) -> dict[str, Any]:
    size = float(np.clip(290 / columns, 3, 7))
    ring = {"marker": "o", "markersize": size, "markerfacecolor": "none", "markeredgewidth": 1.3}
    cross = {"marker": "x", "markersize": size, "markeredgewidth": 1.3}
    return {"color": colors.removed, **(ring if marker == "o" else cross)}
