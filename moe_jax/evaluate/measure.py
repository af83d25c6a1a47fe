"""One jitted step over held-out windows, its sums per domain, and the speed of the model."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moe_jax.config import ModelConfig
from moe_jax.data.documents import Files
from moe_jax.data.evaluation import EvaluationWindows, evaluation_windows
from moe_jax.data.tokenizer import check_token_ids
from moe_jax.evaluate.results import DomainEvaluation, Evaluation
from moe_jax.losses import cross_entropy, forward_kl
from moe_jax.metrics import progress_bar
from moe_jax.model import forward

Model = tuple[dict[str, Any], ModelConfig]

_SPEED_REPETITIONS = 5

_logger = logging.getLogger(__name__)


def evaluate(
    params: dict[str, Any],
    config: ModelConfig,
    files_or_windows: Files | Mapping[str, EvaluationWindows],
    tokenizer: Any = None,
    *,
    seq_len: int = 512,
    batch_size: int = 8,
    reference: Model | None = None,
    description: str = "evaluating",
) -> Evaluation:
    """Measures a model on held-out text, domain by domain.

    Args:
        params, config: the model.
        files_or_windows: text files (each is a domain, see ``data.evaluation_windows``), or
            windows that were made before and are used again for another model.
        tokenizer: what ``load_tokenizer`` returns; not needed with windows.
        seq_len: S, tokens per row; windows bring their own.
        batch_size: B, rows per step; windows bring their own.
        reference: ``(params, config)`` of the model to compare with; its logits are computed in
            the same step and never kept.
        description: stands before the progress bar.

    Raises:
        FileNotFoundError: a file name matches nothing.
        ValueError: no text, token ids outside the vocabulary, vocabularies that differ, files
            without a tokenizer, or logits that are not finite (the message names the domain).
    """
    windows = _as_windows(files_or_windows, tokenizer, seq_len, batch_size)
    sums = _sums(params, config, windows, reference, description)
    (speed,) = _speeds([(params, config)], windows)
    return _evaluation(windows, sums, speed)


def evaluate_pair(
    before: Model,
    after: Model,
    files_or_windows: Files | Mapping[str, EvaluationWindows],
    tokenizer: Any = None,
    *,
    seq_len: int = 512,
    batch_size: int = 8,
    description: str = "evaluating",
) -> tuple[Evaluation, Evaluation]:
    """Measures an original and what was made from it, in one pass over the text.

    The second result is ``evaluate(*after, reference=before)`` and the first one
    ``evaluate(*before)``, at two forward passes of the text instead of three, and with their
    speeds measured in turn.

    Args:
        before, after: ``(params, config)``.

    The other arguments and the errors are those of ``evaluate``.
    """
    windows = _as_windows(files_or_windows, tokenizer, seq_len, batch_size)
    sums = _sums(*after, windows, before, description)
    original = {name: {"nll": domain["reference_nll"]} for name, domain in sums.items()}
    speeds = _speeds([before, after], windows)
    return _evaluation(windows, original, speeds[0]), _evaluation(windows, sums, speeds[1])


def _as_windows(
    files_or_windows: Files | Mapping[str, EvaluationWindows],
    tokenizer: Any,
    seq_len: int,
    batch_size: int,
) -> Mapping[str, EvaluationWindows]:
    if isinstance(files_or_windows, Mapping):
        return files_or_windows
    if tokenizer is None:
        raise ValueError("a tokenizer is required to evaluate on files, got None")
    return evaluation_windows(files_or_windows, tokenizer, seq_len=seq_len, batch_size=batch_size)


def _sums(
    params,
    config: ModelConfig,
    windows: Mapping[str, EvaluationWindows],
    reference: Model | None,
    description: str,
) -> dict[str, dict[str, float]]:
    """Per domain, the sums of ``_step`` over all positions."""
    _check_arguments(windows, config, reference)
    num_tokens = sum(domain.num_tokens for domain in windows.values())
    with progress_bar(num_tokens, description, "tokens") as progress:
        return {
            name: _domain_sums(params, config, reference, name, domain, progress)
            for name, domain in windows.items()
        }


def _speeds(models: Sequence[Model], windows: Mapping[str, EvaluationWindows]) -> list[float]:
    fullest = max(
        (batch for domain in windows.values() for batch in domain.batches),
        key=lambda batch: int(batch["mask"].sum()),
    )
    return forward_speed(models, fullest["tokens"], fullest["segment_ids"])


def _evaluation(
    windows: Mapping[str, EvaluationWindows],
    sums: Mapping[str, Mapping[str, float]],
    tokens_per_second: float,
) -> Evaluation:
    domains = {name: _summary(sums[name], windows[name]) for name in windows}
    rows, length = next(iter(windows.values())).batches[0]["tokens"].shape
    return Evaluation(
        domains=domains,
        total=_total(sums, windows),
        mean=_mean(list(domains.values())),
        tokens_per_second=tokens_per_second,
        seq_len=length,
        batch_size=rows,
    )


def forward_speed(
    models: Sequence[Model],
    tokens: np.ndarray,
    segment_ids: np.ndarray,
    repetitions: int = _SPEED_REPETITIONS,
) -> list[float]:
    """Tokens per second of each model's compiled forward pass: the best of ``repetitions`` calls.

    The best, and the models in turn, since what else runs on the machine only ever adds time, and
    seldom the same to each.

    Args:
        models: ``(params, config)`` of each.
        tokens, segment_ids: Int[B, S]; padding (segment 0) is computed but not counted.
    """
    inputs = (jnp.asarray(tokens), jnp.asarray(segment_ids))
    for params, config in models:
        jax.block_until_ready(_logits(params, config, *inputs))
    seconds = [math.inf] * len(models)
    for _ in range(repetitions):
        for i, (params, config) in enumerate(models):
            start = time.perf_counter()
            jax.block_until_ready(_logits(params, config, *inputs))
            seconds[i] = min(seconds[i], time.perf_counter() - start)
    num_tokens = int((segment_ids > 0).sum())
    return [num_tokens / spent for spent in seconds]


@partial(jax.jit, static_argnames="config")
def _logits(params, config, tokens, segment_ids):
    return forward(params, config, tokens, segment_ids)[0]


@partial(jax.jit, static_argnames=("config", "reference_config"))
def _step(params, config, batch, reference, reference_config) -> dict[str, Array]:
    """Sums over each row, Float32[B]; the host adds rows up in float64."""
    tokens, targets, mask = batch["tokens"], batch["targets"], batch["mask"]
    segment_ids = batch["segment_ids"]
    logits, _ = forward(params, config, tokens, segment_ids)
    sums = {
        "nll": jax.vmap(cross_entropy)(logits, targets, mask)[0],
        "broken": _broken(logits, mask),
    }
    if reference is not None:
        with jax.named_scope("reference"):
            expected, _ = forward(reference, reference_config, tokens, segment_ids)
        agree = (logits.argmax(-1) == expected.argmax(-1)) & mask
        sums["reference_nll"] = jax.vmap(cross_entropy)(expected, targets, mask)[0]
        sums["kl"] = jax.vmap(forward_kl)(logits, expected, mask)[0]
        sums["agree"] = agree.sum(-1)
        sums["broken_reference"] = _broken(expected, mask)
    return sums


def _broken(logits, mask):
    return (~jnp.isfinite(logits).all(-1) & mask).sum(-1)


def _domain_sums(
    params, config, reference, name: str, domain: EvaluationWindows, progress
) -> dict[str, float]:
    reference_params, reference_config = reference or (None, None)
    results = (
        _step(params, config, batch, reference_params, reference_config) for batch in domain.batches
    )
    totals: dict[str, float] = {}
    for batch, sums in zip(domain.batches, _one_ahead(results), strict=True):
        for key, rows in sums.items():
            totals[key] = totals.get(key, 0.0) + float(np.asarray(rows, np.float64).sum())
        for key, culprit in (("broken", "the model"), ("broken_reference", "the reference")):
            if totals.get(key):
                raise ValueError(
                    f"logits must be finite, got NaN or infinity from {culprit} at "
                    f"{totals[key]:.0f} positions of domain {name!r}"
                )
        progress.update(int(batch["mask"].sum()))
    return totals


def _one_ahead(results: Iterator[Any]) -> Iterator[Any]:
    """The same items, each after the next one has been started."""
    previous = next(results, None)
    for result in results:
        yield previous
        previous = result
    if previous is not None:
        yield previous


def _summary(sums: Mapping[str, float], windows: EvaluationWindows) -> DomainEvaluation:
    tokens, num_bytes = windows.num_tokens, windows.num_bytes
    return DomainEvaluation(
        tokens=tokens,
        bytes=num_bytes,
        nll=sums["nll"] / tokens,
        perplexity=_exp(sums["nll"] / tokens),
        bits_per_byte=windows.bits_per_byte(sums["nll"]),
        kl=sums["kl"] / tokens if "kl" in sums else None,
        top1_agreement=sums["agree"] / tokens if "agree" in sums else None,
    )


def _total(
    sums: Mapping[str, Mapping[str, float]], windows: Mapping[str, EvaluationWindows]
) -> DomainEvaluation:
    first = next(iter(sums.values()))
    joined = EvaluationWindows(
        batches=[],
        num_bytes=sum(domain.num_bytes for domain in windows.values()),
        num_tokens=sum(domain.num_tokens for domain in windows.values()),
        num_documents=sum(domain.num_documents for domain in windows.values()),
    )
    return _summary({key: sum(s[key] for s in sums.values()) for key in first}, joined)


def _mean(domains: Sequence[DomainEvaluation]) -> DomainEvaluation:
    def mean(field: str) -> float:
        return statistics.fmean(getattr(domain, field) for domain in domains)

    compared = domains[0].kl is not None
    return DomainEvaluation(
        tokens=sum(domain.tokens for domain in domains),
        bytes=sum(domain.bytes for domain in domains),
        nll=mean("nll"),
        perplexity=_exp(mean("nll")),
        bits_per_byte=mean("bits_per_byte"),
        kl=mean("kl") if compared else None,
        top1_agreement=mean("top1_agreement") if compared else None,
    )


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def _check_arguments(
    windows: Mapping[str, EvaluationWindows],
    config: ModelConfig,
    reference: Model | None,
) -> None:
    if not windows:
        raise ValueError("windows must hold at least one domain, got none")
    batches = [batch for domain in windows.values() for batch in domain.batches]
    largest = max(max(int(b["tokens"].max()), int(b["targets"].max())) for b in batches)
    check_token_ids(largest, config.vocab_size)
    if reference is not None and reference[1].vocab_size != config.vocab_size:
        raise ValueError(
            f"the reference must share the model's vocab_size = {config.vocab_size}, "
            f"got {reference[1].vocab_size}"
        )
    length = batches[0]["tokens"].shape[1]
    if length > config.max_positions:
        _logger.warning(
            "windows of %d tokens exceed the model's %d positions", length, config.max_positions
        )
