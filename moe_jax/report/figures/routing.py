"""Which experts each domain uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moe_jax.report.figures.panels import Layers, color_bar, draw_map, label_text, small_multiples
from moe_jax.report.tables import gone_ids
from moe_jax.report.theme import theme

# Above this share of a map's brightest cells the colour scale is cut, so that one expert that
# takes everything does not hide all differences between the others.
_BRIGHT_PERCENTILE = 99


def plot_routing_by_domain(layers: Layers, *, dark: bool = False) -> Figure:
    """Which experts each domain uses: one map per layer, a row per domain.

    Uses ``frequency`` (domain -> [E], any scale) and marks ``removed``, ``novices`` and ``merged``
    below their columns. Experts are ordered by the domain that uses them most, so that specialised
    experts line up along a diagonal and generalists show as pale columns.

    Raises:
        ValueError: no layer has frequencies.
    """
    shown = [layer for layer in layers if layer.get("frequency")]
    colors = theme(dark)
    figure, panels = small_multiples(shown, 0.75 + 0.17 * _num_domains(shown), colors, columns=2)
    maps = [_relative_frequency(layer["frequency"]) for layer in shown]
    brightest = max(np.percentile(m, _BRIGHT_PERCENTILE) for m in maps)
    image = None
    for n, (axes, layer, relative) in enumerate(zip(panels, shown, maps, strict=True)):
        order = np.lexsort((-relative.max(0), relative.argmax(0)))
        image = draw_map(axes, relative[:, order], brightest, colors)
        axes.set_xticks([])
        domains = [label_text(domain) for domain in layer["frequency"]]
        axes.set_yticks(range(len(domains)), domains if n % 2 == 0 else [""] * len(domains))
        columns = np.flatnonzero(np.isin(order, gone_ids(layer)))
        # An empty line that is not clipped would have no extent and break the layout.
        if len(columns):
            axes.plot(
                columns,
                [len(domains) - 0.2] * len(columns),
                linestyle="",
                marker="^",
                markersize=4,
                color=colors.removed,
                clip_on=False,
            )
    figure.supxlabel(
        "experts, ordered by the domain that uses them most"
        + ("; ▲ did not stay" if any(gone_ids(layer) for layer in shown) else ""),
        color=colors.ink,
        size=9,
    )
    # Beside the first row only: a bar as tall as many rows leaves no width for them.
    color_bar(figure, panels[:2], image, "selections,\n1 = uniform", colors)
    return figure


def _num_domains(layers: Layers) -> int:
    return max((len(layer["frequency"]) for layer in layers), default=0)


def _relative_frequency(frequency: Mapping[str, Any]) -> np.ndarray:
    """[domains, E], 1 where a domain uses an expert as often as the average expert."""
    table = np.asarray(list(frequency.values()), float)
    return table * table.shape[1] / np.maximum(table.sum(1, keepdims=True), 1e-30)
