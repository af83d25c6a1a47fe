"""Colours and typography of the figures, on a light and on a dark page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure

WIDTH_INCHES = 9.0


@dataclass(frozen=True)
class Theme:
    """Colours by what they stand for; blue and vermilion stay apart for colour-blind readers.

    A page names those that its theme changes: two that are one colour in a theme are one in both.
    """

    ink: str
    muted: str
    grid: str
    paper: str
    tile: str
    before: str
    after: str
    removed: str
    colormap: Colormap
    series: tuple[str, ...]


LIGHT = Theme(
    ink="#1c2430",
    muted="#5d6775",
    grid="#dde2e9",
    paper="#ffffff",
    tile="#f5f7fa",
    before="#8a94a3",
    after="#1f6fc5",
    removed="#d1480f",
    colormap=LinearSegmentedColormap.from_list("light", ("#f4f7fb", "#7fb2e5", "#0b3d7e")),
    series=("#8a94a3", "#1f6fc5", "#0a8f6a", "#b5489a", "#b87a00", "#6a5acd"),
)
DARK = Theme(
    ink="#e8ecf2",
    muted="#9aa5b4",
    grid="#313a47",
    paper="#151a21",
    tile="#1d242e",
    before="#8792a2",
    after="#62a8f5",
    removed="#ff8a57",
    colormap=LinearSegmentedColormap.from_list("dark", ("#1d2632", "#3478bd", "#e3f1ff")),
    series=("#8792a2", "#62a8f5", "#45c9a1", "#e08bc9", "#e3ae4a", "#a79bf0"),
)


def theme(dark: bool) -> Theme:
    return DARK if dark else LIGHT


def css_variables(colors: Theme) -> dict[str, str]:
    """Name of a variable of the page's style -> colour, such as ``--ink``."""
    named = {f"--{name}": value for name, value in vars(colors).items() if isinstance(value, str)}
    return named | {f"--series-{n}": value for n, value in enumerate(colors.series)}


def new_figure(height: float, colors: Theme, width: float = WIDTH_INCHES) -> Figure:
    """An empty figure (inches) that belongs to no global state."""
    return Figure(figsize=(width, height), layout="constrained", facecolor=colors.paper)


def style_axes(axes: Axes, colors: Theme, grid: Literal["x", "y", "both"] | None = "x") -> None:
    """Quiet axes: no frame but the left and bottom lines, a light grid below the data."""
    axes.set_facecolor(colors.paper)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(colors.grid)
    axes.tick_params(colors=colors.muted, labelcolor=colors.muted, labelsize=8.5, length=0, pad=4)
    axes.xaxis.label.set(color=colors.ink, size=9)
    axes.yaxis.label.set(color=colors.ink, size=9)
    axes.title.set(color=colors.ink, size=9.5)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=colors.grid, linewidth=0.7)


def legend(owner: Any, colors: Theme, **options: Any) -> None:
    """A legend without a box, for a figure or for axes."""
    defaults = {"frameon": False, "fontsize": 9, "labelcolor": colors.ink, "handletextpad": 0.5}
    owner.legend(**defaults | options)
