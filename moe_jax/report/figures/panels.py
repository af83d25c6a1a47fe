"""What figures share: one panel per layer, maps over experts, labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from moe_jax.report.theme import Theme, new_figure, style_axes

Layers = Sequence[Mapping[str, Any]]

_COLUMNS = 4


def small_multiples(
    layers: Layers, height: float, colors: Theme, columns: int = _COLUMNS
) -> tuple[Figure, list[Axes]]:
    """One titled panel per layer."""
    if not layers:
        raise ValueError("layers must hold the figure's data in at least one layer, got none")
    columns = min(columns, len(layers))
    rows = -(-len(layers) // columns)
    figure = new_figure(0.7 + height * rows, colors)
    panels = [figure.add_subplot(rows, columns, n + 1) for n in range(len(layers))]
    for axes, layer in zip(panels, layers, strict=True):
        axes.set_title(f"layer {layer['layer']}", loc="left", color=colors.ink, size=9.5)
    return figure, panels


def draw_map(axes: Axes, values: np.ndarray, brightest: float, colors: Theme) -> AxesImage:
    """A map [rows, E] with a column per expert, from 0 to ``brightest``; NaN stays empty."""
    # Without interpolation a file holds one pixel per cell, whatever the map's size.
    image = axes.imshow(
        values,
        cmap=colors.colormap,
        vmin=0,
        vmax=brightest,
        aspect="auto",
        interpolation="none",
    )
    num_experts = values.shape[1]
    style_axes(axes, colors, grid=None)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks(range(0, num_experts, max(1, -(-num_experts // 16))))
    axes.tick_params(axis="y", labelcolor=colors.ink)
    return image


def color_bar(figure: Figure, axes: Any, image: Any, label: str, colors: Theme) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, aspect=18)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(colors=colors.muted, labelcolor=colors.muted, labelsize=8, length=0)
    bar.set_label(label, color=colors.ink, size=8.5)


def label_text(name: str) -> str:
    """One line of what can be printed, and no formula where a name has dollar signs."""
    line = " ".join(str(name).replace("_", " ").split()).replace("$", r"\$")
    return "".join(character for character in line if character.isprintable())


def has_values(layer: Mapping[str, Any], key: str) -> bool:
    return layer.get(key) is not None and len(layer[key]) > 0
