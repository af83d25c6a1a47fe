"""Parts of a page, of which all text is escaped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from moe_jax.report.svg import inline_svg


def plain_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def facts_html(facts: Mapping[str, str]) -> str:
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return f'<dl class="facts">{items}</dl>'


def table_html(
    header: Sequence[str],
    rows: Sequence[tuple[str, Sequence[str]]],
    ids: tuple[str, Sequence[str]] | None = None,
    kind: str = "",
) -> str:
    """A table of class ``kind``. Rows are (class, cells); ``ids`` is a last column of text."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    head += f'<th class="ids">{escape(ids[0])}</th>' if ids else ""
    body = []
    for n, (row_kind, cells) in enumerate(rows):
        line = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        line += f'<td class="ids">{escape(ids[1][n])}</td>' if ids else ""
        body.append(f"<tr{_class(row_kind)}>{line}</tr>")
    return (
        f'<div class="scroll"><table{_class(kind)}><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def figure_html(draw: Callable[[bool], Figure], caption: str) -> str:
    """What ``draw(dark)`` draws, with its caption."""
    return (
        f'<figure><div class="scroll">{inline_svg(draw, caption)}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
