"""What a report is made of: a few simple elements, which every medium renders in its own way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import matplotlib.figure

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")

PAGE, CARD, TERMINAL = "page", "card", "terminal"


@dataclass(frozen=True, kw_only=True)
class Element:
    """``title`` stands above it; ``on`` are the media that show it."""

    title: str = ""
    on: tuple[str, ...] = (PAGE, CARD)

    @property
    def kind(self) -> str:
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Paragraph(Element):
    """A sentence or a few; a ``note`` is set smaller."""

    text: str
    note: bool = False


@dataclass(frozen=True)
class Bullets(Element):
    lines: Sequence[str]


@dataclass(frozen=True)
class Facts(Element):
    """Names and values."""

    facts: Mapping[str, str]


@dataclass(frozen=True)
class Table(Element):
    """Cells of text, the header first; the first column is set to the left, others to the right.

    Attributes:
        totals: so many of the last rows sum up the others.
        prose: the last column is long text.
        tiles: a page shows each row (label, before, after, change) as a tile instead.
        folded: a page shows this line, and the table on demand.
    """

    rows: Sequence[Sequence[str]]
    totals: int = 0
    prose: bool = False
    tiles: bool = False
    folded: str = ""


@dataclass(frozen=True)
class Figure(Element):
    """``draw(dark=...)`` for a light or a dark page, alike but for the colours."""

    draw: Callable[..., matplotlib.figure.Figure]
    caption: str
    on: tuple[str, ...] = field(default=(PAGE,), kw_only=True)


@dataclass(frozen=True)
class Code(Element):
    text: str
    language: str = ""
    folded: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    content: Sequence[Element]

    def shown(self, medium: str) -> list[Element]:
        return [element for element in self.content if medium in element.on]


@dataclass(frozen=True)
class Document:
    """A heading, what a reader should not miss, and sections."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    warnings: Sequence[str] = field(default_factory=tuple)


def section(
    title: str, parts: Iterable[Callable[[], Iterable[Element]]], lost: list[str]
) -> Section:
    """A section of what can be made; what cannot is told in ``lost``."""
    made = [or_warning(lambda part=part: list(part()), title, lost) for part in parts]  # type: ignore[misc]
    return Section(title, [element for elements in made for element in elements or ()])


def or_warning(make: Callable[[], _T], what: str, lost: list[str]) -> _T | None:
    """``make()``, or None and a sentence in ``lost``: decoration never costs the result.

    The one place where any exception is caught: tables and figures are made after the work, of
    whatever was measured, and nobody can foresee all of it.
    """
    try:
        return make()
    except Exception as error:
        _logger.warning("%s: a part of the report is left out", what, exc_info=True)
        lost.append(f"{what}: a part of this report could not be made and is left out ({error}).")
        return None
