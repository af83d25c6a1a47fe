"""The model card: Markdown with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.report.tables import (
    DOMAIN_HEADER,
    domain_rows,
    headline_rows,
    run_rows,
    unreached_experts,
)


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
    methods = [stage.get("method") for stage in report.get("stages") or ()]
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
        kept = f": {_text(stage['kept'])}" if stage.get("kept") else ""
        settings = stage.get("settings") or {}
        detail = f" ({_code(json.dumps(settings))})" if settings else ""
        lines.append(f"- stage {n}, **{_text(stage.get('method') or 'unnamed')}**{kept}{detail}")
        lines += [f"  - never reached in calibration: {line}" for line in unreached_experts(stage)]
    return ["## How it was made", "\n".join(lines)]


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
