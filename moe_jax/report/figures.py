"""Figures of a report. Each takes plain data and gives a matplotlib ``Figure``.

``layers`` is always the ``layers`` list of one stage (or ``routing_by_domain``) as described in
``moe_jax.report``; a layer that lacks what a figure shows is left out. ``dark=True`` draws for a
dark page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moe_jax.report.tables import relative_change
from moe_jax.report.theme import Theme, legend, new_figure, style_axes, theme

Layers = Sequence[Mapping[str, Any]]

_COLUMNS = 4
# Above this share of a map's brightest cells the colour scale is cut, so that one expert that
# takes everything does not hide all differences between the others.
_BRIGHT_PERCENTILE = 99
_CURVE_POINTS = 101
# Width of a full map without its labels, in points (1/72 inch).
_MAP_POINTS = 490


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
            label=_label(label),
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
    axes.set_yticks(range(len(domains)), [_label(domain) for domain in domains])
    axes.tick_params(axis="y", labelcolor=colors.ink, labelsize=9)
    axes.set_ylim(len(domains) - 0.5, -0.5)


def _label(name: str) -> str:
    """One line, and no formula where a name has dollar signs."""
    return " ".join(str(name).replace("_", " ").split()).replace("$", r"\$")


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
    number = "%.3f" if max(values) >= 0.05 else "%.2g"
    axes.bar_label(bars, fmt=number, padding=4, color=colors.muted, size=8.5)
    _domain_axis(axes, list(divergence), colors)
    axes.set_xlim(0, 1.1 * max(*values, 1e-9))
    axes.set_xlabel("KL divergence from the original model, nats per token")
    return figure


def plot_experts(layers: Layers, *, dark: bool = False) -> Figure:
    """Each layer's experts: how much is routed to them against how much their output varies.

    Uses ``routing_mass`` (else ``count``) and ``variance``, whose root is the output deviation,
    and marks ``removed`` and ``novices``.

    Raises:
        ValueError: no layer has these data.
    """
    shown = layers_with_experts(layers)
    by_mass = all(_has(layer, "routing_mass") for layer in shown)
    colors = theme(dark)
    figure, panels = _small_multiples(shown, 1.9, colors)
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
        if _has(layer, "variance") and (_has(layer, "routing_mass") or _has(layer, "count"))
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
    return {"kept": kept, "removed": cross, "replaced by a constant": novice}


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
    shown = [layer for layer in layers if _has(layer, "score")]
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
    image = axes.imshow(scores, cmap=colors.colormap, vmin=0, vmax=1, aspect="auto")
    size = min(5.5, 0.6 * _MAP_POINTS / widest)
    for row, layer in enumerate(shown):
        fates = _fates(layer, len(layer["score"]))
        for fate, style in _fate_styles(colors).items():
            experts = np.flatnonzero(fates == fate)
            if fate != "kept" and len(experts):
                axes.plot(
                    experts, [row] * len(experts), linestyle="", **style | {"markersize": size}
                )
    _map_axis(axes, widest, colors)
    axes.set_yticks(range(len(shown)), [f"layer {layer['layer']}" for layer in shown])
    axes.set_xlabel("expert")
    _color_bar(figure, axes, image, "score, share of\nthe layer's largest", colors)
    _legend_of_fates(figure, shown, colors, kept=False)
    return figure


def plot_routing_by_domain(layers: Layers, *, dark: bool = False) -> Figure:
    """Which experts each domain uses: one map per layer, a row per domain.

    Uses ``frequency`` (domain -> [E], any scale) and marks ``removed`` and ``novices`` below
    their columns. Experts are ordered by the domain that uses them most, so that specialised
    experts line up along a diagonal and generalists show as pale columns.

    Raises:
        ValueError: no layer has frequencies.
    """
    shown = [layer for layer in layers if layer.get("frequency")]
    colors = theme(dark)
    figure, panels = _small_multiples(shown, 0.75 + 0.17 * _num_domains(shown), colors, columns=2)
    maps = [_relative_frequency(layer["frequency"]) for layer in shown]
    brightest = max(np.percentile(m, _BRIGHT_PERCENTILE) for m in maps)
    image = None
    for n, (axes, layer, relative) in enumerate(zip(panels, shown, maps, strict=True)):
        order = np.lexsort((-relative.max(0), relative.argmax(0)))
        image = axes.imshow(
            relative[:, order], cmap=colors.colormap, vmin=0, vmax=brightest, aspect="auto"
        )
        _map_axis(axes, len(order), colors)
        axes.set_xticks([])
        domains = [_label(domain) for domain in layer["frequency"]]
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
    _color_bar(figure, panels[:2], image, "selections,\n1 = uniform", colors)
    return figure


def gone_ids(layer: Mapping[str, Any]) -> list[int]:
    """Ids of a layer's experts that were removed or became constants, sorted."""
    return sorted({*(layer.get("removed") or ()), *(layer.get("novices") or ())})


def _num_domains(layers: Layers) -> int:
    return max((len(layer["frequency"]) for layer in layers), default=0)


def _relative_frequency(frequency: Mapping[str, Any]) -> np.ndarray:
    """[domains, E], 1 where a domain uses an expert as often as the average expert."""
    table = np.asarray(list(frequency.values()), float)
    return table * table.shape[1] / np.maximum(table.sum(1, keepdims=True), 1e-30)


def importance_curve(importance: Any, kept_width: int) -> dict[str, Any]:
    """Neuron importance of one layer, small enough for a report.

    Args:
        importance: [E, F], not negative.
        kept_width: neurons kept per expert, the most important first.

    Returns:
        ``rank`` (percent of F) and, of the sorted importance relative to each expert's mean, its
        ``low``, ``median`` and ``high`` (10th, 50th, 90th percentile over experts) there; ``cut``
        (percent of F kept); ``kept_share`` [E], the share of importance that the kept hold.

    Raises:
        ValueError: not a matrix, a negative entry, or ``kept_width`` outside [1, F].
    """
    values = np.asarray(importance, np.float64)
    if values.ndim != 2 or values.size == 0 or not (values >= 0).all():
        raise ValueError(f"importance must be [E, F] and not negative, got shape {values.shape}")
    width = values.shape[1]
    if not 1 <= kept_width <= width:
        raise ValueError(f"kept_width must be in [1, F = {width}], got {kept_width}")
    ranked = -np.sort(-values, axis=1)
    ranked /= np.maximum(ranked.mean(1, keepdims=True), 1e-300)
    picks = np.unique(np.linspace(0, width - 1, min(width, _CURVE_POINTS)).round().astype(int))
    low, median, high = np.percentile(ranked[:, picks], (10, 50, 90), axis=0)
    return {
        "rank": (100 * (picks + 1) / width).tolist(),
        "low": low.tolist(),
        "median": median.tolist(),
        "high": high.tolist(),
        "cut": 100 * kept_width / width,
        "kept_share": (ranked[:, :kept_width].sum(1) / width).tolist(),
    }


def plot_neuron_importance(layers: Layers, *, dark: bool = False) -> Figure:
    """Sorted neuron importance of every layer's experts, and where the cut falls.

    Uses ``importance`` (what ``importance_curve`` returns).

    Raises:
        ValueError: no layer has it.
    """
    shown = [layer for layer in layers if layer.get("importance")]
    colors = theme(dark)
    figure, panels = _small_multiples(shown, 1.8, colors)
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


def _has(layer: Mapping[str, Any], key: str) -> bool:
    return layer.get(key) is not None and len(layer[key]) > 0


def _num_experts(layer: Mapping[str, Any]) -> int:
    for key in ("score", "variance", "count", "routing_mass"):
        if _has(layer, key):
            return len(layer[key])
    return 0


def _small_multiples(
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


def _map_axis(axes: Axes, num_experts: int, colors: Theme) -> None:
    style_axes(axes, colors, grid=None)
    for spine in axes.spines.values():
        spine.set_visible(False)
    step = max(1, -(-num_experts // 16))
    axes.set_xticks(range(0, num_experts, step))
    axes.tick_params(axis="y", labelcolor=colors.ink)


def _color_bar(figure: Figure, axes: Any, image: Any, label: str, colors: Theme) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, aspect=18)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(colors=colors.muted, labelcolor=colors.muted, labelsize=8, length=0)
    bar.set_label(label, color=colors.ink, size=8.5)
