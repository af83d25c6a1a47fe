"""How well models do: by domain, from stage to stage, while they train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from moe_jax.report.facts import Training
from moe_jax.report.figures.theme import (
    DASHES,
    Theme,
    label_text,
    legend_above,
    new_figure,
    panels,
    themed,
)
from moe_jax.report.points import Point
from moe_jax.text import relative_change, short_count, two_digits

MOST_RECORDS = 300
# The running mean of a curve spans this share of its records.
_SMOOTHED_SHARE = 1 / 20
# Above this ratio of the largest to the smallest loss the axis is logarithmic.
_LOG_RATIO = 10
# Key of a training's record -> title of its panel, in this order.
_LOSSES = {
    "loss": "loss in all",
    "distill": "distillation, nats per token",
    "lm": "the text itself, nats per token",
    "hidden": "hidden states",
    "router": "routers",
    "balance": "load balance",
    "learning_rate": "learning rate",
}


@themed
def plot_bits_per_byte(theme: Theme, series: Mapping[str, Mapping[str, float]]) -> Figure:
    """Bits per byte of each domain, one dot per model.

    Args:
        series: label -> domain -> bits per byte, the original model first. With two models each row
            ends in the second one's change.

    Raises:
        ValueError: no series or no domain.
    """
    domains = list(dict.fromkeys(domain for values in series.values() for domain in values))
    if not domains:
        raise ValueError("series must hold at least one model with a domain, got none")
    figure = new_figure(1.1 + 0.34 * len(domains))
    axes = figure.add_subplot()
    for y, domain in enumerate(domains):
        found = [values[domain] for values in series.values() if domain in values]
        axes.plot([min(found), max(found)], [y, y], color=theme.grid, linewidth=3, zorder=1)
    handles = []
    for n, (label, values) in enumerate(series.items()):
        places = [y for y, domain in enumerate(domains) if domain in values]
        bits = [values[domains[y]] for y in places]
        style: dict[str, Any] = {"color": theme.series[n % len(theme.series)], "marker": "o"}
        style |= {"linestyle": "", "markersize": 7, "label": label_text(label)}
        handles += axes.plot(bits, places, zorder=2 + n, **style)
    if len(series) == 2:
        before, after = series.values()
        at = {"xycoords": ("axes fraction", "data"), "va": "center"}
        for y, domain in enumerate(domains):
            change = relative_change(before.get(domain), after.get(domain)) or ""
            axes.annotate(change, (1.01, y), color=theme.muted, size=8.5, **at)  # type: ignore[arg-type]
    _domain_axis(axes, domains, theme)
    axes.set_xlabel("bits per byte of held-out text (lower is better)")
    legend_above(figure, handles)
    return figure


def _domain_axis(axes: Axes, domains: Sequence[str], theme: Theme) -> None:
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.set_yticks(range(len(domains)), [label_text(domain) for domain in domains])
    axes.tick_params(axis="y", labelcolor=theme.ink, labelsize=9)
    axes.set_ylim(len(domains) - 0.5, -0.5)


@themed
def plot_kl(theme: Theme, divergence: Mapping[str, float]) -> Figure:
    """KL(original || compressed) of each domain (nats per token) as bars.

    Raises:
        ValueError: no domain.
    """
    if not divergence:
        raise ValueError("divergence must hold at least one domain, got none")
    figure = new_figure(0.8 + 0.34 * len(divergence))
    axes = figure.add_subplot()
    values = list(divergence.values())
    bars = axes.barh(range(len(values)), values, height=0.5, color=theme.after)
    axes.bar_label(bars, list(map(two_digits, values)), padding=4, color=theme.muted, size=8.5)
    _domain_axis(axes, list(divergence), theme)
    axes.set_xlim(0, 1.1 * max(*values, 1e-9))
    axes.set_xlabel("KL divergence from the original model, nats per token")
    return figure


def shows_stages(points: Sequence[Point]) -> bool:
    """Whether ``plot_stages`` has two points to show, and a training."""
    shown = _measured(points)
    return len(shown) > 1 and any(tokens for _, tokens, _ in shown)


def _measured(points: Sequence[Point]) -> list[tuple[Point, int, float]]:
    return [
        (point, point.tokens, bits)
        for point in points
        if (bits := point.mean("bits_per_byte")) is not None and point.tokens is not None
    ]


@themed
def plot_stages(theme: Theme, points: Sequence[Point]) -> Figure:
    """Collapse and recovery: bits per byte, mean of the domains, against tokens trained so far.

    A cut is a jump at the number of tokens where it was made. Training is a straight line to what
    was measured at its end: nothing was measured in between.

    Args:
        points: what ``stage_points`` returns; those that were not measured are left out.

    Raises:
        ValueError: fewer than two points are left, or none was trained.
    """
    shown = _measured(points)
    if not shows_stages(points):
        raise ValueError("points must hold two that were measured, and a training, got less")
    figure = new_figure(3.2)
    axes = figure.add_subplot(ylabel="bits per byte, mean of domains")
    handles = {}
    for (_, *start), (point, *end) in pairwise(shown):
        label, color = ("cut", theme.removed) if point.cut else ("training", theme.after)
        (handles[label],) = axes.plot(
            *zip(start, end, strict=True), color=color, linewidth=2, zorder=3, label=label
        )
    for point, tokens, bits in shown:
        color = theme.removed if point.cut else theme.after
        if tokens == 0 and not point.cut:
            color = theme.before
            line = {"linewidth": 1.2, "linestyle": DASHES, "label": "original"}
            original = axes.axhline(bits, color=color, zorder=2, **line)  # type: ignore[arg-type]
            handles = {"original": original} | handles
        axes.plot(tokens, bits, "o", color=color, markersize=6.5, zorder=4)
        # A cut's name and number to the upper right, where no line is; a training's below.
        axes.annotate(
            f"{label_text(point.cut)}\n{bits:.3f}" if point.cut else f"{bits:.3f}",
            (tokens, bits),
            xytext=(7, 1) if point.cut else (0, -8),
            textcoords="offset points",
            ha="left" if point.cut else "center",
            va="bottom" if point.cut else "top",
            size=8.5,
            bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 0.5},
            zorder=3.5,
        )
    most = max(tokens for _, tokens, _ in shown)
    # Room for the labels: of a cut at the last token on its right, of any on the left below.
    axes.set_xlim(-0.04 * most, (1.16 if shown[-1][0].cut else 1.04) * most)
    axes.margins(y=0.17)
    _count_tokens(axes)
    axes.set_xlabel("tokens trained so far")
    legend_above(figure, list(handles.values()))
    return figure


def _count_tokens(axes: Axes) -> None:
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: short_count(value))


def thin(metrics: Sequence[Mapping[str, Any]], most: int = MOST_RECORDS) -> list[dict[str, float]]:
    """At most ``most`` records: the first, the last, and means over runs of those between.

    Each has ``records``, the number it stands for, so that its mean over all records is kept. A
    quantity is averaged over the records that have it.

    Raises:
        ValueError: ``most`` is less than 3, to which any longer list can be brought.
    """
    if most < 3:
        raise ValueError(f"most must be at least 3, got {most}")
    runs = [[i] for i in range(len(metrics))]
    if len(metrics) > most:
        inner = np.array_split(np.arange(1, len(metrics) - 1), most - 2)
        runs = [runs[0], *(run.tolist() for run in inner), runs[-1]]
    names = dict.fromkeys(name for record in metrics for name in record)
    thinned = []
    for run in runs:
        record: dict[str, float] = {"records": len(run)}
        for name in names:
            found = [value for i in run if (value := metrics[i].get(name)) is not None]
            if found:
                record[name] = float(np.mean(found))
        thinned.append(record)
    return thinned


def training_caption(training: Training) -> str:
    """What the curves of ``plot_training`` are means of."""
    logged, shown = len(training.get("metrics") or ()), len(thin(training.get("metrics") or ()))
    each = f"{logged:,} logged steps"
    if shown < logged:
        each += f", as {shown} means over about {round((logged - 2) / (shown - 2))} each"
    width = _smoothing(shown)
    curves = f"Faint: {each}. Bold: running mean over {width} of them" if width > 1 else each
    return f"Losses on the training text. {curves}."


def _smoothing(num_records: int) -> int:
    """How many records the running mean of a curve spans."""
    return max(1, int(num_records * _SMOOTHED_SHARE))


@themed
def plot_training(theme: Theme, training: Training) -> Figure:
    """Parts of the loss against tokens (steps, if tokens are unknown), a panel each; thinned.

    Raises:
        ValueError: no part was recorded.
    """
    records = thin(training.get("metrics") or ())
    parts = shown_parts(records)
    if not parts:
        raise ValueError("training must hold metrics with a loss, got none")
    unit, per_step = "steps", 1.0
    if training.get("tokens") and training.get("steps"):
        unit, per_step = "tokens", training["tokens"] / training["steps"]
    figure, places = panels([_LOSSES[part] for part in parts], 1.9, columns=3)
    for axes, part in zip(places, parts, strict=True):
        chosen = [record for record in records if part in record]
        x = per_step * np.array([record["step"] for record in chosen])
        y = np.array([record[part] for record in chosen])
        if part == "learning_rate":
            axes.plot(x, y, color=theme.before)
            axes.set_ylim(bottom=0)
        else:
            _draw_loss(axes, x, y, theme)
        axes.set_xlim(left=0)
        _count_tokens(axes)
    figure.supxlabel(unit)
    return figure


def shown_parts(records: Sequence[Mapping[str, float]]) -> list[str]:
    """Keys that a figure shows: those recorded, without what another says already."""
    found = [name for name in _LOSSES if any(name in record for record in records)]

    def alike(name: str, other: str) -> bool:
        pairs = [(record.get(name), record.get(other)) for record in records]
        return all(a == b or (a and b and abs(a / b - 1) < 1e-5) for a, b in pairs)

    # A training on the text itself logs that loss as what it learns from, too.
    if "distill" in found and "lm" in found and alike("distill", "lm"):
        found.remove("distill")
    parts = [name for name in found if name not in ("loss", "learning_rate")]
    if any(alike("loss", part) for part in parts):
        found.remove("loss")
    return found


def _draw_loss(axes: Axes, x: np.ndarray, y: np.ndarray, theme: Theme) -> None:
    width = _smoothing(len(x))
    if width > 1:
        axes.plot(x, y, color=theme.after, linewidth=0.8, alpha=0.35)
    axes.plot(x, running_mean(y, width), "o-" if len(x) == 1 else "-", color=theme.after)
    if y.min() > 0 and y.max() > _LOG_RATIO * y.min():
        log_scale(axes, "{:g}")


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over ``width`` values; over fewer at both ends."""
    ones = np.ones(min(width, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def log_scale(axes: Axes, form: str) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: form.format(value))
    axes.minorticks_off()


def line_handle(label: str, **style: Any) -> Line2D:
    return Line2D([], [], label=label_text(label), **style)
