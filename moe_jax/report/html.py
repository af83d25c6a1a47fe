"""A report as one HTML file: no script, no request, light and dark, from phone to desk."""

from __future__ import annotations

import base64
import io
import re
from functools import cache, partial
from typing import Any

import jinja2
import matplotlib

from moe_jax.report.elements import PAGE, Document, Figure, or_warning
from moe_jax.report.facts import Report
from moe_jax.report.figures.theme import DARK, LIGHT, page_colors
from moe_jax.report.sections import document

_COLOR = re.compile(r"#[0-9a-f]{6}\b")
# Attributes in points: two decimals are enough. Transformations hold factors, too, and stay.
_POINTS = re.compile(r'\b(?:d|x|y|width|height|points)="[^"]*"')
_TO_DARK = {color: page_colors(DARK)[name] for name, color in page_colors(LIGHT).items()}


def report_html(report: Report) -> str:
    """The whole page; figures are part of it, and a security policy forbids it to load or run."""
    return document_html(document(report))


def document_html(told: Document) -> str:
    """A page of any sections; a figure that cannot be drawn is left out with a warning."""
    lost: list[str] = []
    drawn: dict[int, tuple[str, str]] = {}
    for section in told.sections:
        for element in section.shown(PAGE):
            if isinstance(element, Figure):
                images = or_warning(partial(_drawn, element), section.title, lost)
                if images:
                    drawn[id(element)] = images
    return _template().render(
        told=told,
        warnings=[*told.warnings, *lost],
        medium=PAGE,
        drawn=lambda element: drawn.get(id(element)),
        light=page_colors(LIGHT),
        dark=page_colors(DARK),
    )


@cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("moe_jax.report", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html")


def _drawn(figure: Figure) -> tuple[str, str]:
    """Addresses of two pictures that hold themselves, for a light and for a dark page."""
    light = _svg(figure.draw(dark=False))
    # The second drawing differs in colours alone, which are text but for those of pixels.
    if "<image" in light:
        return _address(light), _address(_svg(figure.draw(dark=True)))
    swapped = _COLOR.sub(lambda color: _TO_DARK.get(color[0], color[0]), light)
    return _address(light), _address(swapped)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    # Text stays text, which is small and sharp. A fixed salt and no date: equal data, equal bytes.
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "moe_jax"}
    with matplotlib.rc_context(style):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _POINTS.sub(lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), buffer.getvalue())


def _address(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
