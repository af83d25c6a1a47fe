"""The model card: Markdown with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.report.stages import (
    cuts,
    domain_point_rows,
    point_rows,
    stage_points,
    stage_title,
    training_sentences,
    trains,
)
from moe_jax.report.tables import (
    DOMAIN_HEADER,
    domain_rows,
    headline_rows,
    run_rows,
    underdetermined_experts,
    unreached_experts,
)

# Beside that of the names; a table with more is too wide for a card.
_MOST_COLUMNS = 6


def model_card(report: Mapping[str, Any]) -> str:
    """``README.md`` of an exported checkpoint: what it is, its numbers, how to load and remake it.

    The front matter names ``base_model`` only if ``source.id`` is given, since the hub takes it
    for a repository, and ``license`` only if the source's is known.
    """
    sections = [
        _front_matter(report),
        f"# {_text(report.get('name') or 'Compressed Mixture-of-Experts model')}",
        _introduction(report),
        *_numbers(report),
        *_methods(report),
        *_loading(report),
        *_limits(report),
        *_provenance(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(report: Mapping[str, Any]) -> str:
    source = report.get("source") or {}
    stages = report.get("stages") or ()
    methods = [stage.get("method") for stage in stages if cuts(stage)]
    methods += ["distillation"] if any(map(trains, stages)) else []
    tags = [
        "moe",
        "moe_jax",
        "mixture-of-experts",
        "compression",
        "pruning",
        *filter(None, methods),
    ]
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": source.get("id"),
        "license": source.get("license"),
        "tags": list(dict.fromkeys(tags)),
    }
    # A JSON value is a YAML value, quoted whatever it holds.
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items() if value]
    return "\n".join(["---", *lines, "---"])


def _introduction(report: Mapping[str, Any]) -> str:
    source = report.get("source") or {}
    origin = source.get("id") or source.get("path")
    family = f" ({_text(source['family'])})" if source.get("family") else ""
    made = f"A smaller version of {_code(origin)}{family}" if origin else "A compressed model"
    return f"{made}, made with `moe_jax`, which compresses Mixture-of-Experts language models."


def _numbers(report: Mapping[str, Any]) -> list[str]:
    sections = []
    headline = headline_rows(report)
    if headline:
        table = _table(("", "original", "this model", "change"), headline)
        sections += ["## Size and quality", table]
    run = [row for row in run_rows(report) if row[0].startswith(("KL", "top-1"))]
    if run:
        sections.append("\n".join(f"- {label}: {value}" for label, value in run))
    domains = domain_rows(report)
    if domains:
        note = "Held-out text. KL: nats per token from the original; top-1: agreement with it."
        sections += ["## By domain", _table(DOMAIN_HEADER, domains), note]
    return sections


def _methods(report: Mapping[str, Any]) -> list[str]:
    stages = report.get("stages") or ()
    if not stages:
        return []
    lines = []
    for n, stage in enumerate(stages):
        lines.append(f"- stage {n}, **{_text(stage_title(stage) or 'unnamed')}**")
        lines += [f"  - {line}" for line in _steps(stage)]
    sections = ["## How it was made", "\n".join(lines)]
    points = stage_points(report)
    if points:
        note = "Means over domains; KL in nats per token and top-1 compare with the original."
        header, *rows = point_rows(points)
        sections += [_table(header, rows), note]
    by_domain = domain_point_rows(points)
    if by_domain and len(by_domain[0]) <= 1 + _MOST_COLUMNS:
        header, *rows = by_domain
        sections += ["Bits per byte by domain:", _table(header, rows)]
    return sections


def _steps(stage: Mapping[str, Any]) -> list[str]:
    """What a stage kept, and how it was trained."""
    training = stage.get("training") or {}
    lines = [f"kept: {_text(stage['kept'])}"] if stage.get("kept") and cuts(stage) else []
    if stage.get("settings"):
        lines.append(f"settings: {_code(json.dumps(stage['settings']))}")
    lines += [f"never reached in calibration: {line}" for line in unreached_experts(stage)]
    lines += [f"fewer tokens than neurons: {line}" for line in underdetermined_experts(stage)]
    if training:
        lines.append(_text(training_sentences(training)))
    if training.get("settings"):
        lines.append(f"training settings: {_code(json.dumps(training['settings']))}")
    return lines


def _loading(report: Mapping[str, Any]) -> list[str]:
    loader = report.get("loader")
    if loader is None:
        return []
    remote = ", trust_remote_code=True" if loader.get("trust_remote_code") else ""
    code = (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder\n'
        f"model = AutoModelForCausalLM.from_pretrained(folder{remote})\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "```"
    )
    notes = "\n".join(f"- {_text(note)}" for note in loader.get("notes") or ())
    return ["## Loading", code, "In JAX: `config, params = moe_jax.load_hf(folder)`.", notes]


def _limits(report: Mapping[str, Any]) -> list[str]:
    warnings = report.get("warnings") or ()
    if not warnings:
        return []
    return ["## Warnings", "\n".join(f"- {_text(warning)}" for warning in warnings)]


def _provenance(report: Mapping[str, Any]) -> list[str]:
    lines = []
    if report.get("command"):
        lines.append(f"- command: {_code(report['command'])}")
    if report.get("seed") is not None:
        lines.append(f"- seed: {_text(report['seed'])}")
    for kind, files in (report.get("data") or {}).items():
        hashed = ", ".join(f"{_code(name)} ({_text(str(h)[:12])})" for name, h in files.items())
        lines.append(f"- {_text(kind)} text (sha256): {hashed}")
    versions = ", ".join(
        f"{_text(key)} {_text(value)}" for key, value in (report.get("environment") or {}).items()
    )
    if versions:
        lines.append(f"- environment: {versions}")
    return ["## Reproduction", "\n".join(lines)] if lines else []


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [[_text(cell) for cell in row] for row in (header, *rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (lines[0], rule, *lines[1:]))


def _text(value: Any) -> str:
    """Plain words: no Markdown, no HTML, one line."""
    return re.sub(r"([\\`*<>\[\]|])", r"\\\1", " ".join(str(value).split()))


def _code(value: Any) -> str:
    """A code span; longer fences than any inside it."""
    text = " ".join(str(value).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"
