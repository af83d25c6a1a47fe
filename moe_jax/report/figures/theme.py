"""What all figures share: colours and type for a light and a dark page, panels, maps, labels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure

_P = ParamSpec("_P")
DASHES = (0, (4, 2))
# Quiet axes: no frame but the left and bottom lines, a light grid below the data.
_SHAPES = Path(__file__).parent.parent / "templates" / "figures.mplstyle"


@dataclass(frozen=True)
class Theme:
    """Colours by what they stand for; blue and vermilion stay apart for colour-blind readers.

    Two roles that share a colour in one theme share it in the other: a page swaps colours by value.
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


def page_colors(theme: Theme) -> dict[str, str]:
    """Name -> colour of all but the maps."""
    named = {name: value for name, value in vars(theme).items() if isinstance(value, str)}
    return named | {f"series-{n}": value for n, value in enumerate(theme.series)}


def themed(draw: Callable[Concatenate[Theme, _P], Figure]) -> Callable[..., Figure]:
    """``draw`` with a keyword ``dark`` in place of its first argument, drawing in that style."""

    @functools.wraps(draw)
    def drawn(*args: _P.args, dark: bool = False, **kwargs: _P.kwargs) -> Figure:
        theme = DARK if dark else LIGHT
        with matplotlib.style.context([_SHAPES, _style(theme)]):
            return draw(theme, *args, **kwargs)

    return drawn


def _style(theme: Theme) -> Any:
    """What of the style a theme changes; the rest is in ``figures.mplstyle``."""
    roles = {
        theme.paper: ("figure.facecolor", "axes.facecolor"),
        theme.ink: ("text.color", "axes.labelcolor"),
        theme.grid: ("axes.edgecolor", "grid.color"),
        theme.muted: ("xtick.color", "ytick.color"),
    }
    return {name: color for color, names in roles.items() for name in names}


def new_figure(height: float) -> Figure:
    """An empty figure, nine inches wide, that belongs to no global state."""
    return Figure(figsize=(9.0, height))


def panels(titles: Sequence[str], height: float, columns: int = 4) -> tuple[Figure, list[Axes]]:
    """One titled panel each, ``height`` inches tall.

    Raises:
        ValueError: no title.
    """
    if not titles:
        raise ValueError("a figure needs data in at least one layer, got none")
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    figure = new_figure(0.7 + height * rows)
    places = [figure.add_subplot(rows, columns, n + 1) for n in range(len(titles))]
    for axes, title in zip(places, titles, strict=True):
        axes.set_title(label_text(title))
    return figure, places


def draw_map(axes: Axes, values: np.ndarray, brightest: float, theme: Theme) -> Any:
    """A map [rows, E] with a column per expert, from 0 to ``brightest``; NaN stays empty."""
    # Without interpolation a file holds one pixel per cell, whatever the map's size.
    image = axes.imshow(
        values, cmap=theme.colormap, vmin=0, vmax=brightest, aspect="auto", interpolation="none"
    )
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    num_experts = values.shape[1]
    axes.set_xticks(range(0, num_experts, max(1, -(-num_experts // 16))))
    axes.tick_params(axis="y", labelcolor=theme.ink)
    return image


def color_bar(figure: Figure, axes: Any, image: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, aspect=18, label=label)
    bar.outline.set_visible(False)  # type: ignore[operator]


def legend_above(figure: Figure, handles: Sequence[Any], columns: int = 0) -> None:
    if handles:
        columns = columns or len(handles)
        figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=2.2)


def label_text(name: object) -> str:
    """One line of what can be printed, and no formula where a name has dollar signs."""
    line = " ".join(str(name).replace("_", " ").split()).replace("$", r"\$")
    return "".join(character for character in line if character.isprintable())
