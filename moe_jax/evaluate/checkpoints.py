"""Evaluation of several checkpoints on the same text and tasks, and tables that compare them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_jax.calibrate import layer_by_layer
from moe_jax.data import EvaluationWindows, evaluation_windows, fingerprint, load_tokenizer
from moe_jax.data.documents import domain_names, expand_files
from moe_jax.data.tokenizer import tokenizer_digest
from moe_jax.environment import environment
from moe_jax.evaluate.held_out import Model, evaluate
from moe_jax.evaluate.results import Evaluation
from moe_jax.evaluate.task_files import TaskSet, find_tasks
from moe_jax.evaluate.tasks import TaskModel, TaskSettings, cached_tasks
from moe_jax.hf import load_hf
from moe_jax.hf.folder import find_folder
from moe_jax.hf.reader import open_hf, prevalent_dtype, read_config
from moe_jax.identity import checkpoint_digest
from moe_jax.params import ITEM_BYTES, count_params
from moe_jax.settings import DTYPES, EvaluationConfig, setting
from moe_jax.text import aligned, number


@dataclass(frozen=True)
class EvaluateConfig(EvaluationConfig):
    """Which models to evaluate, beside the text: ``python -m moe_jax.evaluate``."""

    models: tuple[str, ...] = setting((), "Checkpoint folders or hub ids.")
    reference: str = setting(
        "",
        "One more of these: KL divergence from it and agreement with it are measured, too. It must "
        "share the tokenizer of all models.",
    )
    tokenizer: str = setting(
        "", "Folder or tokenizer.json for all models; empty: each model has its own."
    )
    dtype: str = setting("", "Of computation; empty: as each checkpoint is stored.", choices=DTYPES)
    tasks: tuple[str, ...] = setting(
        (), "Tasks, groups or tags of lm-evaluation-harness, beside the text or instead of it."
    )
    tasks_folder: str = setting("", "Folder with further task definitions (*.yaml).")
    tasks_root: str = setting(
        "", "Where relative data files of these start; empty: at the definition itself."
    )
    limit: int = setting(0, "Most items of each task to use; 0 uses all.", bounds=">= 0")
    num_fewshot: int = setting(
        -1, "Examples before each item; -1: as the task says.", bounds=">= -1"
    )
    max_length: int = setting(
        0, "Tokens of context of tasks; 0: as many as the model was made for.", bounds=">= 0"
    )
    cache_dir: str = setting(
        "", "Folder in which tasks' results are kept and found again; empty keeps none."
    )
    log_samples: bool = setting(False, "Write every item's result to the output, too.")
    output: str = setting("", "JSON file to write; empty writes none.")

    @property
    def task_settings(self) -> TaskSettings:
        return TaskSettings(
            limit=self.limit or None,
            num_fewshot=None if self.num_fewshot == -1 else self.num_fewshot,
            max_length=self.max_length or None,
        )

    def tokenizer_of(self, model: str) -> Any:
        """The one to evaluate ``model`` with."""
        return load_tokenizer(self.tokenizer or find_folder(model))


def evaluate_checkpoints(asked: EvaluateConfig) -> dict[str, Any]:
    """Evaluates every checkpoint that ``asked`` names; the JSON-able result of the command.

    Returns:
        ``models``: by name, ``parameters`` (counts), ``evaluation`` (``Evaluation.to_dict``) where
        there are text files, ``tasks`` (see ``evaluate_tasks``) where there are tasks, and
        ``samples`` with ``log_samples``; ``reference``; ``files`` and their hashes;
        ``task_settings``; ``environment``.

    Raises:
        FileNotFoundError, ImportError, ValueError: a field, a checkpoint, a text or a task that
            cannot be used.
    """
    if not asked.models:
        raise ValueError("--config.models must name at least one checkpoint, got none")
    if not asked.files and not asked.tasks:
        raise ValueError("--config.files or --config.tasks must name something, got neither")
    settings = asked.task_settings
    files = expand_files(asked.files) if asked.files else []
    tasks = find_tasks(asked.tasks, asked.tasks_folder, asked.tasks_root) if asked.tasks else None
    texts = _texts(asked) if files else {}
    reference = _load(asked, asked.reference) if files and asked.reference else None
    results: dict[str, Any] = {}
    for model in dict.fromkeys(asked.models):
        known = reference if model == asked.reference else None
        load = functools.cache(functools.partial(_load, asked, model, known))
        results[model] = {"parameters": dataclasses.asdict(count_params(read_config(model)))}
        if files:
            found = evaluate(*load(), texts[model], reference=reference, description=model)
            results[model]["evaluation"] = found.to_dict()
        if tasks is not None:
            answers = _tasks(asked, model, load, tasks)
            kept = ("tasks", "samples") if asked.log_samples else ("tasks",)
            results[model] |= {part: answers[part] for part in kept}
    domains = domain_names(files) if files else []
    return {
        "models": results,
        "reference": asked.reference or None,
        "files": {name: fingerprint(file) for name, file in zip(domains, files, strict=True)},
        "task_settings": dataclasses.asdict(settings),
        "environment": environment(),
    }


def _load(asked: EvaluateConfig, model: str, known: Model | None = None) -> Model:
    """Weights and configuration, unless they are known already.

    Of a model that does not fit in memory the weights stay on disk, where text alone is evaluated.
    """
    if known is not None:
        return known
    folder = find_folder(model)
    dtype = asked.dtype or prevalent_dtype(folder)
    nbytes = count_params(read_config(folder)).total * ITEM_BYTES[dtype]
    on_disk = not asked.tasks and layer_by_layer("auto", nbytes)
    config, params = (open_hf if on_disk else load_hf)(folder, asked.dtype or None)
    return params, config


def _texts(asked: EvaluateConfig) -> dict[str, EvaluationWindows]:
    """The text of each model by its own tokenizer; models that share one share the windows.

    Raises:
        ValueError: the reference has another tokenizer than some model, so that their predictions
            are of different tokens.
    """
    expected = tokenizer_digest(asked.tokenizer_of(asked.reference)) if asked.reference else ""
    tokenizers = {model: asked.tokenizer_of(model) for model in asked.models}
    digests = {model: tokenizer_digest(tokenizer) for model, tokenizer in tokenizers.items()}
    for model, digest in digests.items():
        if expected not in ("", digest):
            raise ValueError(
                f"{model} and the reference {asked.reference} must share a tokenizer for KL "
                "divergence and agreement, and theirs differ; bits per byte compare without a "
                "reference"
            )
    by_digest = {digest: tokenizers[model] for model, digest in digests.items()}
    made = {digest: evaluation_windows(asked, one) for digest, one in by_digest.items()}
    return {model: made[digest] for model, digest in digests.items()}


def _tasks(
    asked: EvaluateConfig, model: str, load: Callable[[], Model], tasks: TaskSet
) -> dict[str, Any]:
    from moe_jax.evaluate.harness import end_tokens_of

    folder = find_folder(model)
    about = TaskModel(
        load,
        checkpoint_digest(folder),
        asked.tokenizer_of(model),
        asked.dtype,
        frozenset(end_tokens_of(folder)),
    )
    return cached_tasks(about, tasks, asked.task_settings, asked.cache_dir)


def comparison_table(evaluations: Mapping[str, Evaluation]) -> str:
    """Bits per byte of every domain and the totals, as text with one column per model."""
    first = next(iter(evaluations.values()))
    rows = [["", *evaluations], ["bits per byte", *[""] * len(evaluations)]]

    def add(label: str, cell: Callable[[Evaluation], str]) -> None:
        rows.append([label, *map(cell, evaluations.values())])

    for domain in first.domains:
        cells = (f"{e.domains[domain].bits_per_byte:.4f}" for e in evaluations.values())
        rows.append([f"  {domain}", *cells])
    add("  all text", lambda e: f"{e.total.bits_per_byte:.4f}")
    add("  mean of domains", lambda e: f"{e.mean.bits_per_byte:.4f}")
    add("perplexity, all text", lambda e: f"{e.total.perplexity:,.3f}")
    if first.total.kl is not None:
        add("KL to reference, nats/token", lambda e: f"{e.total.kl:.5f}")
        add("top-1 agreement", lambda e: f"{e.total.top1_agreement:.2%}")
    add("tokens per second", lambda e: number(e.tokens_per_second, "{:,.0f}"))
    return aligned(rows)


def tasks_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Metrics of tasks, ``value ± standard error``, as text with one column per model."""
    rows = [["", *results]]
    for name, task in next(iter(results.values())).items():
        items = "" if task["items"] is None else f" ({task['items']:,} items)"
        rows.append([f"{name}{items}", *[""] * len(results)])
        for metric in task["metrics"]:
            cells = (_metric(tasks[name]["metrics"][metric]) for tasks in results.values())
            rows.append([f"  {metric}", *cells])
    return aligned(rows)


def _metric(metric: Mapping[str, Any]) -> str:
    numbers = [number for number in (metric["value"], metric["stderr"]) if number is not None]
    return " ± ".join(f"{n:.4f}" if abs(n) < 1000 else f"{n:,.4g}" for n in numbers)
