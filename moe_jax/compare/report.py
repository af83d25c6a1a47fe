"""The files of a comparison: numbers, tables, figures and one page with all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moe_jax.compare.figures import (
    access_maps,
    plot_access,
    plot_methods_by_size,
    plot_ranks,
    plot_robustness,
    rank_panels,
    robustness_panels,
    size_panels,
)
from moe_jax.compare.grid import Grid
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
from moe_jax.environment import environment
from moe_jax.files import replacing_file, write_json
from moe_jax.report import plain
from moe_jax.report.elements import (
    Bullets,
    Code,
    Document,
    Facts,
    Figure,
    Paragraph,
    Section,
    Table,
    or_warning,
)
from moe_jax.report.html import document_html

_DPI = 120
_TITLE = "One-shot compression methods compared"
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


def write_results(grid: Grid, subjects: Sequence[Subject]) -> dict[str, Path]:
    """Writes what the cells say; each file appears whole or not at all.

    Returns:
        ``csv``, ``json``, ``tables``, ``summary``, ``html`` and one path for each figure.

    Raises:
        FileNotFoundError: a cell was not measured yet.
    """
    output = Path(grid.output).expanduser()
    rows = result_rows(subjects)
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
    for name, figure in figures.items():
        drawn = or_warning(figure.draw, name, [])  # told on the page, too
        if drawn is not None:
            paths[name] = output / f"{name}.png"
            with replacing_file(paths[name]) as temporary:
                drawn.savefig(temporary, dpi=_DPI, format="png")
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
        f"# {_TITLE}\n\n{_scope(rows)}\n\n{listed}\n\n"
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
) -> Iterator[tuple[str, Figure]]:
    """By name of the file."""
    panels = {
        "sizes": (plot_methods_by_size, size_panels(rows, grid)),
        "ranks": (plot_ranks, rank_panels(rows, grid)),
        "robustness": (plot_robustness, robustness_panels(rows, grid)),
    }
    for name, (draw, shown) in panels.items():
        if shown:
            yield name, Figure(partial(draw, shown, grid.focus), _CAPTIONS[name])
    for n, (title, (layers, gone)) in enumerate(access_maps(rows, grid, subjects).items()):
        caption = (
            f"{title}: how often calibration selects each expert of the original, and how much "
            "its output varies, both against the layer's mean; first seed."
        )
        yield f"access_{n}", Figure(partial(plot_access, layers, gone), caption)


def page_html(rows: Sequence[Row], grid: Grid, figures: Mapping[str, Figure]) -> str:
    """The whole page: no script, no request, light and dark."""
    headings = {
        "sizes": "Quality and size",
        "ranks": "Ranking",
        "robustness": "Other calibration texts, and more or less of them",
        "access_0": "Who is removed",
    }
    sections = [Section("Findings", [Bullets(findings(rows, grid))])]
    sections += [Section(headings.get(name, ""), [figure]) for name, figure in figures.items()]
    caveats = [Paragraph(sentence, note=True) for sentence in _CAVEATS]
    tables = [Table([t.header, *t.rows], title=t.title) for t in all_tables(rows, grid)]
    sections.append(Section("Tables", [*caveats, *tables]))
    facts = Facts({key: str(value) for key, value in environment().items()})
    config = Code(json.dumps(plain(grid.to_dict()), indent=2), folded="Configuration")
    sections.append(Section("How this was run", [facts, config]))
    return document_html(Document(_TITLE, _scope(rows), sections))
