"""lm-evaluation-harness tasks on models of this package: where tasks are found, results, a cache.

The harness is imported when a task is asked for, not before: it is an optional dependency.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from moe_jax.config import ModelConfig
from moe_jax.data.tokenizer import tokenizer_digest
from moe_jax.evaluate.task_files import TaskSet
from moe_jax.files import write_json
from moe_jax.identity import digest
from moe_jax.settings import check_bounds

BOOTSTRAP = 1000  # draws for the standard error of metrics that are not a mean
_NO_PROCESSES = "DISABLE_MULTIPROC"  # of the harness
_SAMPLE_FIELDS = ("doc_id", "doc_hash", "target", "filter", "filtered_resps")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskSettings:
    """What decides a task's numbers, beside the model.

    Attributes:
        limit: at most so many items of each task; None: all.
        num_fewshot: examples before each item; None: as the task says. A task that says 0 keeps
            to it: that is the harness's rule.
        max_length: tokens of context; None: as many as the model was made for.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name, bounds in (("limit", ">= 1"), ("num_fewshot", ">= 0"), ("max_length", ">= 2")):
            if (value := getattr(self, name)) is not None:
                check_bounds(name, value, bounds)


def evaluate_tasks(
    params: dict[str, Any],
    config: ModelConfig,
    tokenizer: Any,
    tasks: TaskSet,
    settings: TaskSettings | None = None,
    *,
    end_tokens: Collection[int] = (),
) -> dict[str, Any]:
    """Runs tasks on a model in memory.

    Args:
        tasks: what ``find_tasks`` made of names; may be used for several models.
        end_tokens: ids that end a generated text, beside the tokenizer's end-of-text.

    Returns:
        JSON values. ``tasks``: by task (and group), ``metrics`` (by name, ``value``, ``stderr``,
        which may be None, and ``higher_is_better``), ``items``, ``num_fewshot`` and ``version``.
        ``samples``: by task, one dict for each item, in the order of the data: ``doc_id``,
        ``doc_hash``, ``target``, ``filtered_resps`` (of log-likelihoods: pairs of nats and
        whether greedy decoding gives the continuation), and the item's metrics. ``lm_eval``: the
        harness's version.

    Raises:
        ImportError: lm-evaluation-harness is not installed.
        ValueError: a model that cannot be run.
    """
    from moe_jax.evaluate.harness import (  # registers the model; needs the harness
        HarnessOptions,
        MoeJaxLM,
    )

    settings = settings or TaskSettings()
    options = HarnessOptions(max_length=settings.max_length, end_tokens=frozenset(end_tokens))
    model = MoeJaxLM(params, config, tokenizer, options)
    from lm_eval import simple_evaluate

    with _in_this_process():
        raw = simple_evaluate(
            model=model,
            tasks=list(tasks.names),
            task_manager=tasks.manager,
            limit=settings.limit,
            num_fewshot=settings.num_fewshot,
            bootstrap_iters=BOOTSTRAP,
        )
    result: dict[str, Any] = {
        "tasks": {name: _summary(raw, name) for name in raw["results"]},
        "samples": {name: [*map(_sample, items)] for name, items in raw["samples"].items()},
        "lm_eval": harness_version(),
    }
    _warn_of_fewshot(result["tasks"], settings.num_fewshot)
    return json.loads(json.dumps(result, default=_plain))


def harness_version() -> str:
    """The installed version of lm-evaluation-harness."""
    return importlib.metadata.version("lm_eval")


@dataclass(frozen=True)
class TaskModel:
    """A model that is loaded if some task's result is not there yet.

    Attributes:
        load: gives ``(params, config)``.
        digest: stands for configuration and weights.
        dtype: in which ``load`` gives the weights.
        end_tokens: see ``evaluate_tasks``.
    """

    load: Callable[[], tuple[dict[str, Any], ModelConfig]]
    digest: str
    tokenizer: Any
    dtype: str = ""
    end_tokens: frozenset[int] = frozenset()


def cached_tasks(
    model: TaskModel, tasks: TaskSet, settings: TaskSettings, cache_dir: str | Path = ""
) -> dict[str, Any]:
    """``evaluate_tasks``, one task after the other, with results kept in files.

    A file is used again for the same weights, tokenizer, task (with its data, if local), settings,
    dtype, kind of device, and versions of the harness and of this package.

    Args:
        model: not loaded if every result is there.

    Raises:
        OSError: a result cannot be written; what ``evaluate_tasks`` raises.
    """
    joined: dict[str, Any] = {"tasks": {}, "samples": {}, "lm_eval": harness_version()}
    for name in tasks.names:
        described = {
            "task": name,
            "sources": tasks.sources[name],
            "model": model.digest,
            "tokenizer": tokenizer_digest(model.tokenizer),
            "settings": vars(settings),
            "dtype": model.dtype,
            "device": jax.default_backend(),
            "versions": [harness_version(), importlib.metadata.version("moe_jax")],
        }
        file = None
        if cache_dir:
            folder = Path(cache_dir).expanduser() / model.digest
            file = folder / f"{name.replace('/', '_')}-{digest(described)}.json"
        result = _read(file)
        if result is None:
            params, config = model.load()
            one, ends = tasks.only(name), model.end_tokens
            result = evaluate_tasks(params, config, model.tokenizer, one, settings, end_tokens=ends)
            if file is not None:
                write_json(file, described | result)
        for part in ("tasks", "samples"):
            joined[part] |= result[part]
    return joined


def _read(file: Path | None) -> dict[str, Any] | None:
    """A cached result; None if there is none that can be used."""
    if file is None or not file.exists():
        return None
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        return {part: dict(raw[part]) for part in ("tasks", "samples")}
    except (ValueError, KeyError, TypeError) as error:
        _logger.warning("evaluated again, as %s is damaged: %s", file, error)
        return None


def _summary(raw: dict[str, Any], name: str) -> dict[str, Any]:
    metrics: dict[str, dict[str, Any]] = {}
    numbers = raw["results"][name]
    better = raw["higher_is_better"].get(name, {})
    for key, value in numbers.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = numbers.get(f"{metric}_stderr,{chosen}")
        metrics[metric if chosen == "none" else key] = {
            "value": value,
            "stderr": error if isinstance(error, (int, float)) else None,
            "higher_is_better": better.get(metric),
        }
    return {
        "metrics": metrics,
        "items": raw["n-samples"].get(name, {}).get("effective"),
        "num_fewshot": raw["n-shot"].get(name),
        "version": raw["versions"].get(name),
    }


def _sample(item: dict[str, Any]) -> dict[str, Any]:
    return {field: item[field] for field in (*_SAMPLE_FIELDS, *item["metrics"])}


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def _warn_of_fewshot(tasks: dict[str, dict[str, Any]], asked: int | None) -> None:
    other = [n for n, task in tasks.items() if task["num_fewshot"] not in (None, asked)]
    if asked is not None and other:
        _logger.warning("num_fewshot = %d does not move tasks that fix it: %s", asked, other)


@contextlib.contextmanager
def _in_this_process() -> Iterator[None]:
    """The harness without its pool of processes, and what it prints on standard error.

    It resamples items in forked processes; a process in which JAX runs threads must not fork.
    """
    before = os.environ.get(_NO_PROCESSES)
    os.environ[_NO_PROCESSES] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if before is None:
            del os.environ[_NO_PROCESSES]
        else:
            os.environ[_NO_PROCESSES] = before
