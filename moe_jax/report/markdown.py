"""Sections as Markdown, and the model card with the front matter that the hub reads."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

from moe_jax.report.elements import CARD, Bullets, Code, Document, Element, Facts, Paragraph, Table
from moe_jax.report.facts import Report
from moe_jax.report.points import cuts, trains
from moe_jax.report.sections import document

# A path from the root, from home or from above, with what follows up to a space, quote or comma;
# addresses such as https://host/path are no paths.
_PATH = re.compile(r"(?<![\w:/.~])(?:file://|~|\.\.)?/[^\s'\",;()\[\]{}=|<>`]*")
_QUOTED_PATH = re.compile(r"(?<=(['\"]))(?:file://|~|\.\.)?/(?:(?!\1).)*(?=\1)")


def model_card(report: Report) -> str:
    """``README.md`` of an exported checkpoint: what it is, its numbers, how to load and remake it.

    The front matter names ``base_model`` only if ``source.id`` is given, since the hub takes it for
    a repository, and ``license`` only if the source's is known. Files are named without the folders
    that they lay in: a card is read by others.
    """
    public = without_folders(report)
    told = document(public)
    return f"{_front_matter(public)}\n\n{document_markdown(told, _introduction(public))}"


def document_markdown(told: Document, introduction: str = "") -> str:
    """Any sections, warnings last but one."""
    blocks = [f"# {_text(told.title)}", introduction]
    warned: list[tuple[str, list[Element]]] = []
    if told.warnings:
        warned = [("Warnings", [Bullets(told.warnings)])]
    sections = [(s.title, shown) for s in told.sections if (shown := s.shown(CARD))]
    for title, content in [*sections[:-1], *warned, *sections[-1:]]:
        blocks += [f"## {_text(title)}", *map(_element, content)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def without_folders(value: Any) -> Any:
    """The same data with every path from the root, from home or from above as its last name."""
    if isinstance(value, str):
        return _public_text(value)
    if isinstance(value, dict):
        return {
            _public_text(key): _public_command(item) if key == "command" else without_folders(item)
            for key, item in value.items()
        }
    return [without_folders(item) for item in value] if isinstance(value, list) else value


def _public_text(text: str) -> str:
    # A whole text that is a path may hold spaces.
    if re.match(r"(file://|~|\.\.)?/", text) and "\n" not in text:
        return ",".join(_last_name(part) for part in text.split(","))
    return _PATH.sub(lambda m: _last_name(m[0]), _QUOTED_PATH.sub(lambda m: _last_name(m[0]), text))


def _public_command(command: Any) -> Any:
    """Word by word, since a word of a command may hold spaces."""
    try:
        words = shlex.split(str(command))
    except ValueError:  # no command line after all
        return _public_text(str(command))
    parts = [word.partition("=") for word in words]
    return shlex.join(f"{_public_text(name)}{eq}{_public_text(value)}" for name, eq, value in parts)


def _last_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "/"


def _front_matter(report: Report) -> str:
    source, stages = report.get("source") or {}, report.get("stages") or []
    methods = [stage.get("method") for stage in stages if cuts(stage)]
    methods += ["distillation"] if any(map(trains, stages)) else []
    tags = ["moe", "moe_jax", "mixture-of-experts", "compression", "pruning", *methods]
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": source.get("id"),
        "license": source.get("license"),
        "tags": list(dict.fromkeys(filter(None, tags))),
    }
    return front_matter(fields)


def front_matter(fields: dict[str, Any]) -> str:
    """What the hub reads of a card; without the fields that are empty."""
    # A JSON value is a YAML value, quoted whatever it holds.
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items() if value]
    return "\n".join(["---", *lines, "---"])


def _introduction(report: Report) -> str:
    source = report.get("source") or {}
    origin = source.get("id") or source.get("path")
    family = f" ({_text(source['family'])})" if source.get("family") else ""
    made = f"A smaller version of {_code(origin)}{family}" if origin else "A compressed model"
    return f"{made}, made with `moe_jax`, which compresses Mixture-of-Experts language models."


def _element(element: Element) -> str:
    title = f"### {_text(element.title)}\n\n" if element.title else ""
    return title + _body(element)


def _body(element: Element) -> str:
    match element:
        case Paragraph():
            return _text(element.text)
        case Bullets():
            return "\n".join(f"- {_text(line)}" for line in element.lines)
        case Facts():
            return "\n".join(f"- {_text(k)}: {_code(v)}" for k, v in element.facts.items())
        case Table():
            return markdown_table(element.rows)
        case Code():
            return f"```{element.language}\n{element.text}\n```"
    return ""


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The header first; all columns but the first are set to the right."""
    return markup_table([[_text(cell) for cell in row] for row in rows])


def markup_table(rows: Sequence[Sequence[Any]], numbers: bool = True) -> str:
    """A table of cells that are Markdown; ``numbers``: all but the first are set to the right."""
    header, *lines = rows
    rule = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, rule, *lines))


def _text(value: Any) -> str:
    """Plain words: no Markdown, no HTML, one line."""
    return re.sub(r"([\\`*<>\[\]|])", r"\\\1", " ".join(str(value).split()))


def _code(value: Any) -> str:
    """A code span; longer fences than any inside it."""
    text = " ".join(str(value).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"
