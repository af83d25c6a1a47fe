"""What was measured of the neurons of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moe_jax.report.figures.panels import Layers, small_multiples
from moe_jax.report.theme import style_axes, theme

_CURVE_POINTS = 101


def importance_curve(importance: Any, kept_width: int | Sequence[int]) -> dict[str, Any]:
    """Neuron importance of one layer, small enough for a report.

    Args:
        importance: [E, F], not negative.
        kept_width: neurons kept, the most important first, by every expert or by each.

    Returns:
        ``rank`` (percent of F) and, of the sorted importance relative to each expert's mean, its
        ``low``, ``median`` and ``high`` (10th, 50th, 90th percentile over experts) there; ``cut``
        (percent of F kept on average); ``kept_share`` [E], the share of importance that the kept
        ones hold.

    Raises:
        ValueError: not a matrix, a negative entry, or ``kept_width`` outside [1, F], or [0, F] of
            each expert.
    """
    values = np.asarray(importance, np.float64)
    if values.ndim != 2 or values.size == 0 or not (values >= 0).all():
        raise ValueError(f"importance must be [E, F] and not negative, got shape {values.shape}")
    width = values.shape[1]
    kept = np.broadcast_to(np.asarray(kept_width), len(values))
    least = 1 if np.ndim(kept_width) == 0 else 0
    if not least <= kept.min() <= kept.max() <= width:
        raise ValueError(f"kept_width must be in [{least}, F = {width}], got {kept_width}")
    ranked = -np.sort(-values, axis=1)
    ranked /= np.maximum(ranked.mean(1, keepdims=True), 1e-300)
    picks = np.unique(np.linspace(0, width - 1, min(width, _CURVE_POINTS)).round().astype(int))
    low, median, high = np.percentile(ranked[:, picks], (10, 50, 90), axis=0)
    return {
        "rank": (100 * (picks + 1) / width).tolist(),
        "low": low.tolist(),
        "median": median.tolist(),
        "high": high.tolist(),
        "cut": 100 * float(kept.mean()) / width,
        "kept_share": (
            np.where(np.arange(width) < kept[:, None], ranked, 0).sum(1) / width
        ).tolist(),
    }


def plot_neuron_importance(layers: Layers, *, dark: bool = False) -> Figure:
    """Sorted neuron importance of every layer's experts, and where the cut falls.

    Uses ``importance`` (what ``importance_curve`` returns).

    Raises:
        ValueError: no layer has it.
    """
    shown = [layer for layer in layers if layer.get("importance")]
    colors = theme(dark)
    figure, panels = small_multiples(shown, 1.8, colors)
    for axes, layer in zip(panels, shown, strict=True):
        curve = layer["importance"]
        rank = np.asarray(curve["rank"])
        axes.fill_between(
            rank, curve["low"], curve["high"], color=colors.after, alpha=0.22, linewidth=0
        )
        axes.plot(rank, curve["median"], color=colors.after, linewidth=1.6)
        axes.axvline(curve["cut"], color=colors.removed, linewidth=1.3)
        axes.axvspan(curve["cut"], 100, color=colors.removed, alpha=0.07, linewidth=0)
        kept = np.mean(curve["kept_share"])
        note = f"{curve['cut']:.0f}% kept hold {kept:.0%}"
        axes.set_title(note, loc="right", color=colors.muted, size=8)
        style_axes(axes, colors, grid="y")
        axes.set_xlim(0, 100)
        axes.set_ylim(bottom=0)
    figure.supxlabel("neurons of an expert by rank, %", color=colors.ink, size=9)
    figure.supylabel("importance (mean neuron = 1)", color=colors.ink, size=9)
    return figure
