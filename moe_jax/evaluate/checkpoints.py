"""Evaluation of several checkpoints on the same text and tasks, and tables that compare them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from moe_jax.data.documents import domain_names, expand_files, fingerprint
from moe_jax.data.evaluation import EvaluationWindows, evaluation_windows
from moe_jax.data.tokenizer import load_tokenizer, tokenizer_digest
from moe_jax.environment import environment
from moe_jax.evaluate.held_out import Model, evaluate
from moe_jax.evaluate.results import Evaluation
from moe_jax.evaluate.task_files import TaskSet, find_tasks
from moe_jax.evaluate.tasks import TaskSettings, cached_tasks
from moe_jax.hf import load_hf
from moe_jax.hf.folder import find_folder
from moe_jax.hf.reader import read_config
from moe_jax.identity import checkpoint_digest
from moe_jax.params import count_params
from moe_jax.text import aligned

_FIELDS = (
    "models",
    "reference",
    "files",
    "tokenizer",
    "dtype",
    "seq_len",
    "batch_size",
    "max_bytes",
    "tasks",
    "tasks_folder",
    "tasks_root",
    "limit",
    "num_fewshot",
    "max_length",
    "cache_dir",
    "log_samples",
    "output",
)


def comparison_table(evaluations: Mapping[str, Evaluation]) -> str:
    """Bits per byte of every domain and the totals, as text with one column per model."""
    first = next(iter(evaluations.values()))
    rows = [["", *evaluations], ["bits per byte", *[""] * len(evaluations)]]
    rows += [
        [f"  {domain}", *(f"{e.domains[domain].bits_per_byte:.4f}" for e in evaluations.values())]
        for domain in first.domains
    ]

    def add(label: str, cell) -> None:
        rows.append([label, *map(cell, evaluations.values())])

    add("  all text", lambda e: f"{e.total.bits_per_byte:.4f}")
    add("  mean of domains", lambda e: f"{e.mean.bits_per_byte:.4f}")
    add("perplexity, all text", lambda e: f"{e.total.perplexity:,.3f}")
    if first.total.kl is not None:
        add("KL to reference, nats/token", lambda e: f"{e.total.kl:.5f}")
        add("top-1 agreement", lambda e: f"{e.total.top1_agreement:.2%}")
    add("tokens per second", lambda e: f"{e.tokens_per_second:,.0f}")
    return aligned(rows)


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


def tasks_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Metrics of tasks, ``value ± standard error``, as text with one column per model.

    Args:
        results: by model, ``tasks`` of ``evaluate_tasks``.
    """
    first = next(iter(results.values()))
    rows = [["", *results]]
    for name, task in first.items():
        items = "" if task["items"] is None else f" ({task['items']:,} items)"
        rows.append([f"{name}{items}", *[""] * len(results)])
        rows += [
            [
                f"  {metric}",
                *(_metric(tasks[name]["metrics"][metric]) for tasks in results.values()),
            ]
            for metric in task["metrics"]
        ]
    return aligned(rows)


def _metric(metric: Mapping[str, Any]) -> str:
    numbers = [number for number in (metric["value"], metric["stderr"]) if number is not None]
    return " ± ".join(f"{n:.4f}" if abs(n) < 1000 else f"{n:,.4g}" for n in numbers)


def evaluate_checkpoints(settings: ConfigDict) -> dict[str, Any]:
    """Evaluates every checkpoint that ``settings`` names; the JSON-able result of the command.

    Returns:
        ``models``: by name, ``parameters`` (counts), ``evaluation`` (``Evaluation.to_dict``) where
        there are text files, ``tasks`` (see ``evaluate_tasks``) where there are tasks, and
        ``samples`` with ``log_samples``; ``reference``; ``files`` and their hashes;
        ``task_settings``; ``environment``.

    Raises:
        FileNotFoundError, ImportError, ValueError: a field, a checkpoint, a text or a task that
            cannot be used.
    """
    check_fields(settings, _FIELDS)
    models = list(dict.fromkeys(names(settings.get("models", ""))))
    if not models:
        raise ValueError("--config.models must name at least one checkpoint, got none")
    files = expand_files(names(settings.files)) if names(settings.files) else []
    task_names = names(settings.get("tasks", ""))
    if not files and not task_names:
        raise ValueError("--config.files or --config.tasks must name something, got neither")
    tasks, task_settings = None, _task_settings(settings)
    if task_names:
        folder, root = settings.get("tasks_folder", ""), settings.get("tasks_root", "")
        tasks = find_tasks(task_names, folder, root)
    texts = _texts(settings, models, files) if files else {}
    named = settings.get("reference") if files else None
    reference = _load(settings, named) if named else None
    results: dict[str, Any] = {}
    for model in models:
        known = reference if model == named else None
        load = functools.cache(functools.partial(_load, settings, model, known))
        results[model] = {"parameters": dataclasses.asdict(count_params(read_config(model)))}
        if files:
            evaluation = evaluate(*load(), texts[model], reference=reference, description=model)
            results[model]["evaluation"] = evaluation.to_dict()
        if tasks is not None:
            found = _tasks(settings, model, load, tasks, task_settings)
            kept = ("tasks", "samples") if settings.get("log_samples") else ("tasks",)
            results[model] |= {part: found[part] for part in kept}
    domains = domain_names(files) if files else []
    return {
        "models": results,
        "reference": settings.get("reference") or None,
        "files": {name: fingerprint(file) for name, file in zip(domains, files, strict=True)},
        "task_settings": dataclasses.asdict(task_settings),
        "environment": environment(),
    }


def _texts(
    settings: ConfigDict, models: Sequence[str], files: Sequence[str]
) -> dict[str, EvaluationWindows]:
    """The text of each model, by its own tokenizer; models that share one share the windows.

    Raises:
        ValueError: the reference has another tokenizer than some model, so that their predictions
            are of different tokens.
    """

    def tokenizer_of(model: str) -> Any:
        return load_tokenizer(settings.get("tokenizer") or find_folder(model))

    reference = settings.get("reference")
    expected = tokenizer_digest(tokenizer_of(reference)) if reference else ""
    tokenizers = {model: tokenizer_of(model) for model in models}
    digests = {model: tokenizer_digest(tokenizer) for model, tokenizer in tokenizers.items()}
    for model, digest in digests.items():
        if reference and digest != expected:
            raise ValueError(
                f"{model} and the reference {reference} must share a tokenizer for KL divergence "
                "and agreement, and theirs differ; compare bits per byte without a reference"
            )
    made: dict[str, EvaluationWindows] = {}
    for model in models:
        if digests[model] not in made:
            made[digests[model]] = evaluation_windows(
                files,
                tokenizers[model],
                seq_len=settings.seq_len,
                batch_size=settings.batch_size,
                max_bytes=settings.get("max_bytes") or None,
            )
    return {model: made[digests[model]] for model in models}


def _load(settings: ConfigDict, model: str, known: Model | None = None) -> Model:
    """Weights and configuration, unless they are known already."""
    if known is not None:
        return known
    config, params = load_hf(model, dtype=settings.get("dtype") or None)
    return params, config


def _task_settings(settings: ConfigDict) -> TaskSettings:
    fewshot = settings.get("num_fewshot", -1)
    return TaskSettings(
        limit=settings.get("limit") or None,
        num_fewshot=None if fewshot == -1 else fewshot,
        max_length=settings.get("max_length") or None,
    )


def _tasks(
    settings: ConfigDict,
    model: str,
    load: Callable[[], Model],
    tasks: TaskSet,
    task_settings: TaskSettings,
) -> dict[str, Any]:
    from moe_jax.evaluate.harness import end_tokens_of

    folder = find_folder(model)
    return cached_tasks(
        load,
        checkpoint_digest(folder),
        load_tokenizer(settings.get("tokenizer") or folder),
        tasks,
        task_settings,
        dtype=settings.get("dtype") or "",
        cache_dir=settings.get("cache_dir", ""),
        end_tokens=end_tokens_of(folder),
    )
