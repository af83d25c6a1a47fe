"""The files of a comparison: numbers, tables, figures and one page with all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moe_jax.compare.grid import Grid
from moe_jax.compare.panels import access_maps, rank_panels, robustness_panels, size_panels
from moe_jax.compare.results import (
    ORIGINAL,
    Row,
    csv_text,
    original,
    result_rows,
    select,
    summary_groups,
    values_of,
)
from moe_jax.compare.subjects import Subject
from moe_jax.compare.tables import all_tables, by_ratio, findings, markdown
from moe_jax.files import replacing_file, write_json
from moe_jax.report.elements import facts_html, figure_html, plain_text, table_html
from moe_jax.report.environment import environment
from moe_jax.report.figures.access import plot_access
from moe_jax.report.figures.comparison import plot_methods_by_size, plot_ranks, plot_robustness
from moe_jax.report.files import plain
from moe_jax.report.style import page_style

_DPI = 120
_CAVEATS = (
    "One cut of every kind, and no training afterwards. Spreads (±) are standard deviations over "
    "seeds, each with a calibration sample of its own; the evaluation text is the same for all, "
    "and how much another text would change is what the number of domains hints at.",
    "How far methods are behind the best: means over differences of the same seeds, ± half of "
    "Student's 95% interval, not corrected for the number of methods. * marks intervals that hold "
    "zero; what is said to be clear has one that does not. Few seeds make them wide.",
    "Methods keep the same share of what they cut, not the same number of parameters: those that "
    "drop layers also drop attention, and constants cost next to nothing. Parameters are as "
    'stored. "Domains won" counts those in which a method needs fewer bits than the best.',
)
_CAPTIONS = {
    "sizes": "Smaller models to the right. Means of domains; bars are standard deviations over "
    "seeds.",
    "ranks": "Mean and standard deviation over seeds.",
    "robustness": "The same methods on other calibration texts and on more or less of it.",
}

Draw = Callable[[bool], Figure]


def write_results(grid: Grid, subjects: Sequence[Subject]) -> dict[str, Path]:
    """Writes what the cells say; each file appears whole or not at all.

    Returns:
        ``csv``, ``json``, ``tables``, ``summary``, ``html`` and one path for each figure.

    Raises:
        FileNotFoundError: a cell was not measured yet.
    """
    output = Path(grid.output).expanduser()
    rows = result_rows(grid, subjects)
    figures = dict(_figures(rows, grid, subjects))
    texts = {
        "csv": ("results.csv", csv_text(rows)),
        "tables": ("table.md", "\n".join(map(markdown, all_tables(rows, grid)))),
        "summary": ("summary.md", summary_text(rows, grid)),
        "html": ("report.html", page_html(rows, grid, figures)),
    }
    paths = {"json": output / "results.json"}
    write_json(paths["json"], _record(rows, grid))
    for name, (file, text) in texts.items():
        paths[name] = output / file
        with replacing_file(paths[name]) as temporary:
            temporary.write_text(text, encoding="utf-8")
    for name, (draw, _) in figures.items():
        paths[name] = output / f"{name}.png"
        with replacing_file(paths[name]) as temporary:
            draw(False).savefig(temporary, dpi=_DPI, format="png")
    return paths


def _record(rows: Sequence[Row], grid: Grid) -> dict[str, Any]:
    return plain(
        {
            "config": grid.to_dict(),
            "environment": environment(),
            "findings": findings(rows, grid),
            "originals": [row for row in rows if row["method"] == ORIGINAL],
            "cells": select(rows),
            "summary": summary_groups(rows),
        }
    )


def summary_text(rows: Sequence[Row], grid: Grid) -> str:
    """One page of Markdown: what was compared, who is ahead, bits per byte, how to read it."""
    tables = [markdown(by_ratio(rows, grid, model)) for model in values_of(rows, "model")]
    listed = "\n".join(f"- {sentence}" for sentence in findings(rows, grid))
    caveats = "\n".join(f"- {sentence}" for sentence in _CAVEATS)
    return (
        f"# One-shot compression methods compared\n\n{_scope(rows)}\n\n{listed}\n\n"
        + "\n".join(tables)
        + f"\n## How to read it\n\n{caveats}\n"
    )


def _scope(rows: Sequence[Row]) -> str:
    cells = select(rows)
    parts = [
        f"{len(values_of(cells, name))} {noun if len(values_of(cells, name)) > 1 else noun[:-1]}"
        for name, noun in (
            ("model", "models"),
            ("method", "methods"),
            ("ratio", "ratios"),
            ("source", "calibration texts"),
            ("count", "sample counts"),
            ("seed", "seeds"),
        )
    ]
    before = ", ".join(
        f"{model} {original(rows, model)['bits_per_byte']:.4f}"
        for model in values_of(rows, "model")
    )
    return (
        f"{len(cells)} cells: {', '.join(parts)}. "
        f"Bits per byte of the originals, mean of domains: {before}."
    )


def _figures(
    rows: Sequence[Row], grid: Grid, subjects: Sequence[Subject]
) -> Iterator[tuple[str, tuple[Draw, str]]]:
    """Name, what draws it, and its caption."""
    focus = grid.focus
    if sizes := size_panels(rows, grid):
        draw = lambda dark: plot_methods_by_size(sizes, focus=focus, dark=dark)  # noqa: E731
        yield "sizes", (draw, _CAPTIONS["sizes"])
        ranks = rank_panels(rows, grid)
        draw = lambda dark: plot_ranks(ranks, focus=focus, dark=dark)  # noqa: E731
        yield "ranks", (draw, _CAPTIONS["ranks"])
    if robust := robustness_panels(rows, grid):
        draw = lambda dark: plot_robustness(robust, focus=focus, dark=dark)  # noqa: E731
        yield "robustness", (draw, _CAPTIONS["robustness"])
    for n, (title, (layers, gone)) in enumerate(access_maps(rows, grid, subjects).items()):
        caption = (
            f"{title}: how often calibration selects each expert of the original, and how much "
            "its output varies, both against the layer's mean; first seed."
        )
        yield f"access_{n}", (_access_drawer(layers, gone), caption)


def _access_drawer(layers: list, gone: Mapping[str, Mapping[int, Any]]) -> Draw:
    """Bound to these data, not to a loop's last ones."""
    return lambda dark: plot_access(layers, gone, dark=dark)


def page_html(rows: Sequence[Row], grid: Grid, figures: Mapping[str, tuple[Draw, str]]) -> str:
    """The whole page: no script, no request, light and dark."""
    title = "One-shot compression methods compared"
    headings = {
        "sizes": "Quality and size",
        "ranks": "Ranking",
        "robustness": "Other calibration texts, and more or less of them",
        "access_0": "Who is removed",
    }
    parts = [f'<h1>{title}</h1><p class="sub">{escape(_scope(rows))}</p>']
    parts.append(f"<ul>{''.join(f'<li>{escape(s)}</li>' for s in findings(rows, grid))}</ul>")
    for name, (draw, caption) in figures.items():
        parts.append(f"<h2>{headings[name]}</h2>" if name in headings else "")
        parts.append(figure_html(draw, caption))
    parts.append("<h2>Tables</h2>")
    parts += [f'<p class="note">{escape(sentence)}</p>' for sentence in _CAVEATS]
    for table in all_tables(rows, grid):
        lines = [("", cells) for cells in table.rows]
        parts.append(
            f"<h3>{escape(table.title)}</h3>" + table_html(table.header, lines, kind="wide")
        )
    facts = {key: plain_text(value) for key, value in environment().items()}
    text = escape(json.dumps(plain(grid.to_dict()), indent=2))
    parts.append(f"<h2>How this was run</h2>{facts_html(facts)}")
    parts.append(
        f"<details><summary>Configuration</summary><pre><code>{text}</code></pre></details>"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{page_style()}</style></head><body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )
