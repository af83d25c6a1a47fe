"""Evaluation of several checkpoints on the same text, and the table that compares them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from moe_jax.data.documents import domain_names, expand_files, fingerprint
from moe_jax.data.evaluation import evaluation_windows
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.evaluate.measure import evaluate
from moe_jax.evaluate.results import Evaluation
from moe_jax.hf import load_hf
from moe_jax.report.environment import environment
from moe_jax.shapes import count_params

_FIELDS = (
    "models",
    "reference",
    "files",
    "tokenizer",
    "dtype",
    "seq_len",
    "batch_size",
    "max_bytes",
    "output",
)


def comparison_table(evaluations: Mapping[str, Evaluation]) -> str:
    """Bits per byte of every domain and the totals, as text with one column per model."""
    first = next(iter(evaluations.values()))
    rows: list[tuple[str, list[str]]] = [("bits per byte", [""] * len(evaluations))]
    rows += [
        (f"  {domain}", [f"{e.domains[domain].bits_per_byte:.4f}" for e in evaluations.values()])
        for domain in first.domains
    ]

    def add(label: str, cell) -> None:
        rows.append((label, [cell(e) for e in evaluations.values()]))

    add("  all text", lambda e: f"{e.total.bits_per_byte:.4f}")
    add("  mean of domains", lambda e: f"{e.mean.bits_per_byte:.4f}")
    add("perplexity, all text", lambda e: f"{e.total.perplexity:,.3f}")
    if first.total.kl is not None:
        add("KL to reference, nats/token", lambda e: f"{e.total.kl:.5f}")
        add("top-1 agreement", lambda e: f"{e.total.top1_agreement:.2%}")
    add("tokens per second", lambda e: f"{e.tokens_per_second:,.0f}")
    return "\n".join(_aligned([("", list(evaluations)), *rows]))


def _aligned(rows: Sequence[tuple[str, list[str]]]) -> list[str]:
    label_width = max(len(label) for label, _ in rows)
    widths = [max(map(len, column)) for column in zip(*(c for _, c in rows), strict=True)]
    return [
        "  ".join([label.ljust(label_width), *map(str.rjust, cells, widths)]).rstrip()
        for label, cells in rows
    ]


def names(value: str | Sequence[str]) -> list[str]:
    """``"a, b"`` or ``("a", "b")`` or ``("a,b",)`` -> ``["a", "b"]``."""
    parts = [value] if isinstance(value, str) else list(value)
    return [name.strip() for part in parts for name in str(part).split(",") if name.strip()]


def check_fields(settings: ConfigDict, known: Sequence[str]) -> None:
    """Raises ValueError for a field that is not in ``known``, and names the nearest one."""
    for field in settings:
        if field not in known:
            near = difflib.get_close_matches(field, known, 1, 0)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown configuration field {field!r}{hint}")


def evaluate_checkpoints(settings: ConfigDict) -> dict[str, Any]:
    """Evaluates every checkpoint that ``settings`` names; the JSON-able result of the command.

    Returns:
        ``models``: by name, the evaluation (``Evaluation.to_dict``) and parameter counts;
        ``reference``; ``files`` and their hashes; ``environment``.

    Raises:
        FileNotFoundError, ValueError: a field, a checkpoint or a text that cannot be used.
    """
    check_fields(settings, _FIELDS)
    models = names(settings.get("models", ""))
    if not models:
        raise ValueError("--config.models must name at least one checkpoint, got none")
    files = expand_files(names(settings.files))
    dtype = settings.get("dtype") or None
    reference_name = settings.get("reference") or None
    windows = evaluation_windows(
        files,
        load_tokenizer(settings.get("tokenizer") or models[0]),
        seq_len=settings.seq_len,
        batch_size=settings.batch_size,
        max_bytes=settings.get("max_bytes") or None,
    )
    reference = None
    if reference_name:
        reference_config, reference_params = load_hf(reference_name, dtype=dtype)
        reference = (reference_params, reference_config)
    results: dict[str, Any] = {}
    for model in dict.fromkeys(models):
        if reference is not None and model == reference_name:
            params, config = reference
        else:
            config, params = load_hf(model, dtype=dtype)
        evaluation = evaluate(params, config, windows, reference=reference, description=model)
        counts = dataclasses.asdict(count_params(config))
        results[model] = {"parameters": counts, "evaluation": evaluation.to_dict()}
    hashes = {
        name: fingerprint(file) for name, file in zip(domain_names(files), files, strict=True)
    }
    return {
        "models": results,
        "reference": reference_name,
        "files": hashes,
        "environment": environment(),
    }
