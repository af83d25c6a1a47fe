"""What a training logged: its losses over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from moe_jax.report.theme import Theme, new_figure, style_axes, theme
from moe_jax.text import short_count

MOST_RECORDS = 300
_COLUMNS = 3
# The running mean spans this share of the records.
_SMOOTHED_SHARE = 1 / 20
# Above this ratio of the largest to the smallest value the axis is logarithmic.
_LOG_RATIO = 10
# Key of a record -> title of its panel, in this order.
_TITLES = {
    "loss": "loss in all",
    "distill": "distillation, nats per token",
    "lm": "the text itself, nats per token",
    "hidden": "hidden states",
    "router": "routers",
    "balance": "load balance",
    "learning_rate": "learning rate",
}


def thin(
    metrics: Sequence[Mapping[str, float | None]], most: int = MOST_RECORDS
) -> list[dict[str, float]]:
    """At most ``most`` records: the first, the last, and means over runs of those between.

    Each has ``records``, the number it stands for, so that its mean over all records is kept. A
    quantity is averaged over the records that have it.

    Raises:
        ValueError: ``most`` is less than 3, to which any longer list can be brought.
    """
    if most < 3:
        raise ValueError(f"most must be at least 3, got {most}")
    groups = [[i] for i in range(len(metrics))]
    if len(metrics) > most:
        inner = np.array_split(np.arange(1, len(metrics) - 1), most - 2)
        groups = [groups[0], *(run.tolist() for run in inner), groups[-1]]
    names = dict.fromkeys(name for record in metrics for name in record)
    thinned = []
    for group in groups:
        record: dict[str, float] = {"records": len(group)}
        for name in names:
            found = [value for i in group if (value := metrics[i].get(name)) is not None]
            if found:
                record[name] = float(np.mean(found))
        thinned.append(record)
    return thinned


def training_caption(training: Mapping[str, Any]) -> str:
    """What the curves of ``plot_training`` are means of."""
    logged = len(training.get("metrics") or ())
    shown = len(thin(training.get("metrics") or ()))
    each = f"{logged:,} logged steps"
    if shown < logged:
        each += f", as {shown} means over about {round((logged - 2) / (shown - 2))} each"
    width = _smoothing(shown)
    curves = f"Faint: {each}. Bold: running mean over {width} of them." if width > 1 else each
    return f"Losses on the training text. {curves.removesuffix('.')}."


def _smoothing(num_records: int) -> int:
    """How many records the running mean of a curve spans."""
    return max(1, int(num_records * _SMOOTHED_SHARE))


def plot_training(training: Mapping[str, Any], *, dark: bool = False) -> Figure:
    """Parts of the loss against tokens, a panel each; thinned, with a running mean.

    Args:
        training: TRAINING of ``moe_jax.report``. Without ``tokens`` the axis counts steps.

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
    colors = theme(dark)
    columns = min(_COLUMNS, len(parts))
    rows = -(-len(parts) // columns)
    figure = new_figure(0.5 + 1.9 * rows, colors)
    for n, part in enumerate(parts):
        chosen = [record for record in records if part in record]
        axes = figure.add_subplot(rows, columns, n + 1)
        x = per_step * np.array([record["step"] for record in chosen])
        y = np.array([record[part] for record in chosen])
        if part == "learning_rate":
            axes.plot(x, y, color=colors.before, linewidth=1.8)
            axes.set_ylim(bottom=0)
        else:
            _draw_loss(axes, x, y, colors)
        style_axes(axes, colors, grid="y")
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
        axes.set_title(_TITLES[part], loc="left", color=colors.ink, size=9.5)
    figure.supxlabel(unit, color=colors.ink, size=9)
    return figure


def shows_training(training: Mapping[str, Any]) -> bool:
    """Whether ``plot_training`` has anything to show."""
    return bool(shown_parts(thin(training.get("metrics") or ())))


def shown_parts(records: Sequence[Mapping[str, float]]) -> list[str]:
    """Keys that a figure shows: those recorded, without what another says already."""
    found = [name for name in _TITLES if any(name in record for record in records)]

    def same(name: str, other: str) -> bool:
        pairs = [(record.get(name), record.get(other)) for record in records]
        return all(a == b or (a and b and abs(a / b - 1) < 1e-5) for a, b in pairs)

    # A training on the text itself logs that loss as what it learns from, too.
    if "distill" in found and "lm" in found and same("distill", "lm"):
        found.remove("distill")
    parts = [name for name in found if name not in ("loss", "learning_rate")]
    if any(same("loss", part) for part in parts):
        found.remove("loss")
    return found


def _draw_loss(axes: Axes, x: np.ndarray, y: np.ndarray, colors: Theme) -> None:
    width = _smoothing(len(x))
    if width > 1:
        axes.plot(x, y, color=colors.after, linewidth=0.8, alpha=0.35)
    mark = "o" if len(x) == 1 else ""
    axes.plot(x, _running_mean(y, width), mark + "-", color=colors.after, linewidth=1.8)
    if y.min() > 0 and y.max() > _LOG_RATIO * y.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred; over fewer values at both ends."""
    ones = np.ones(width)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
