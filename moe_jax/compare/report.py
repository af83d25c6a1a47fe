"""The files of a comparison: numbers, tables, figures and one page with all of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moe_jax.compare.figures import (
    access_maps,
    course_panels,
    curve_panels,
    plot_access,
    plot_lines,
    plot_ranks,
    rank_panels,
    robustness_panels,
    size_panels,
    study_panels,
)
from moe_jax.compare.grid import Grid
from moe_jax.compare.results import (
    ORIGINAL,
    Row,
    courses,
    csv_text,
    original,
    result_rows,
    select,
    summary_groups,
    tokens_needed,
    values_of,
)
from moe_jax.compare.subjects import Subject
from moe_jax.compare.tables import all_tables, findings
from moe_jax.environment import environment
from moe_jax.files import replacing_file, write_json
from moe_jax.report import plain
from moe_jax.report.elements import (
    PAGE,
    Bullets,
    Code,
    Document,
    Facts,
    Figure,
    Section,
    or_warning,
)
from moe_jax.report.html import document_html
from moe_jax.report.markdown import document_markdown

_DPI = 120
_TITLE = "Compression methods compared"
_CAVEATS = (
    "Without training, unless tokens trained are told. Spreads (±) are standard deviations over "
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
    "studies": "Mean and standard deviation over seeds.",
    "robustness": "The same methods on other calibration texts and on more or less of it.",
    "course": "Every point is a training of its own length. Dotted: without any.",
    "curves": "The text is new at each step and the same for all: curves rise and fall with it.",
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
    figures = list(_figures(rows, grid, subjects))
    told, tables = document(rows, grid, figures), Section("Tables", all_tables(rows, grid))
    texts = {
        "csv": ("results.csv", csv_text(rows)),
        "tables": ("table.md", document_markdown(Document(_TITLE, "", [tables]))),
        "summary": ("summary.md", document_markdown(told, told.subtitle)),
        "html": ("report.html", document_html(told)),
    }
    paths = {"json": output / "results.json"}
    write_json(paths["json"], _record(rows, grid))
    for name, (file, text) in texts.items():
        paths[name] = output / file
        with replacing_file(paths[name]) as temporary:
            temporary.write_text(text, encoding="utf-8")
    for name, _, figure in figures:
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
            "courses": {
                title: {
                    one: {other: tokens_needed(methods[one], methods[other])}
                    for one, other in itertools.permutations(methods, 2)
                }
                for title, methods in courses(rows).items()
            },
        }
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
) -> Iterator[tuple[str, str, Figure]]:
    """Name of the file, heading, figure."""
    focus = grid.focus
    more, bits = "bits per byte more than the original", "bits per byte of held-out text"
    loss = "cross-entropy of new text, nats"
    for name, heading, panels, draw in (
        ("sizes", "Quality and size", size_panels(rows, grid),
         partial(plot_lines, ylabel=more, focus=focus, falling=True)),
        ("ranks", "Ranking", rank_panels(rows, grid), partial(plot_ranks, focus=focus)),
        ("studies", "Studies", study_panels(rows, grid), partial(plot_ranks, focus=focus)),
        ("robustness", "Other calibration texts, and more or less of them",
         robustness_panels(rows, grid), partial(plot_lines, ylabel=bits, focus=focus)),
        ("course", "Trainings of several lengths", course_panels(rows),
         partial(plot_lines, ylabel=more, focus=focus, level=True)),
        ("curves", "While they train", curve_panels(rows, grid),
         partial(plot_lines, ylabel=loss, focus=focus)),
    ):  # fmt: skip
        if panels:
            yield name, heading, Figure(partial(draw, panels), _CAPTIONS[name])
    for n, (title, (layers, gone)) in enumerate(access_maps(rows, grid, subjects).items()):
        caption = (
            f"{title}: how often calibration selects each expert of the original, and how much "
            "its output varies, both against the layer's mean; first seed."
        )
        heading = "" if n else "Who is removed"
        yield f"access_{n}", heading, Figure(partial(plot_access, layers, gone), caption)


def document(
    rows: Sequence[Row], grid: Grid, figures: Sequence[tuple[str, str, Figure]]
) -> Document:
    """The page; its summary, in Markdown, is what of it is for cards, too."""
    tables = all_tables(rows, grid)
    first = [t for t in tables if "by method and ratio" in t.title or t.title in grid.studies]
    shown = [t if t in first else dataclasses.replace(t, on=(PAGE,)) for t in tables]
    facts = Facts({key: str(value) for key, value in environment().items()}, on=(PAGE,))
    config = json.dumps(plain(grid.to_dict()), indent=2)
    sections = [
        Section("Findings", [Bullets(findings(rows, grid))]),
        *(Section(heading, [figure]) for _, heading, figure in figures),
        Section("Tables", shown),
        Section("How to read it", [Bullets(_CAVEATS)]),
        Section("How this was run", [facts, Code(config, folded="Configuration", on=(PAGE,))]),
    ]
    return Document(_TITLE, _scope(rows), sections)
