"""Held-out loss of models, per domain: perplexity, bits per byte, and distance to a reference.

    python -m moe_jax.evaluate --config=configs/evaluate.py --config.models=A,B,C
    python -m moe_jax.evaluate --config=configs/evaluate.py --config.models=A,B --config.reference=A

Prints a table, one column per model, and with ``--config.output=FILE.json`` writes all numbers.

Fields of the configuration:
    models      checkpoint folders or hub ids, separated by commas
    reference   one more of these: KL divergence from it and agreement with it are measured too
    files       text files or globs, separated by commas; each file is a domain
    tokenizer   folder or tokenizer.json; empty takes the first model's
    dtype       float32, bfloat16 or float16; empty keeps the dtype of each checkpoint
    seq_len     tokens of context; longer documents are cut into several windows
    batch_size  windows per step
    max_bytes   use at most so many bytes of each file; 0 uses all
    output      JSON file to write; empty writes none
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict, config_flags

from moe_jax.cli import require_config, run
from moe_jax.config import ModelConfig
from moe_jax.data.documents import Files, domain_names, expand_files, fingerprint
from moe_jax.data.evaluation import EvaluationWindows, evaluation_windows
from moe_jax.data.tokenizer import check_token_ids, load_tokenizer
from moe_jax.hf import load_hf
from moe_jax.losses import cross_entropy, forward_kl
from moe_jax.metrics import progress_bar
from moe_jax.model import forward
from moe_jax.shapes import count_params

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, such as configs/evaluate.py."
)
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
_SPEED_REPETITIONS = 5

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DomainEvaluation:
    """How well a model predicts one domain's text.

    Attributes:
        tokens: number of predicted tokens.
        bytes: UTF-8 bytes that they spell.
        nll: mean of -ln p(token), in nats.
        perplexity: exp(nll).
        bits_per_byte: sum of -log2 p(token) over ``bytes``; comparable between tokenizers.
        kl: mean KL(reference || model) of the next-token distributions, in nats per token.
        top1_agreement: share of positions where model and reference rank the same token first.
    """

    tokens: int
    bytes: int
    nll: float
    perplexity: float
    bits_per_byte: float
    kl: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` measures.

    Attributes:
        domains: by domain name.
        total: all text as one domain: weighted by tokens, ``bits_per_byte`` by bytes.
        mean: every domain counts the same; its perplexity is the exponential of its nll, its
            ``tokens`` and ``bytes`` are those of all text.
        tokens_per_second: of the forward pass alone, compiled; median of some repetitions.
        seq_len: S, tokens per row.
        batch_size: B, rows per step.
    """

    domains: dict[str, DomainEvaluation]
    total: DomainEvaluation
    mean: DomainEvaluation
    tokens_per_second: float
    seq_len: int
    batch_size: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``from_dict`` gives back an equal evaluation."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Evaluation:
        """Reads what ``to_dict`` wrote.

        Raises:
            ValueError: not such a dict.
        """
        try:
            domains = {name: DomainEvaluation(**d) for name, d in raw["domains"].items()}
            rest = {key: DomainEvaluation(**raw[key]) for key in ("total", "mean")}
            return cls(**{**raw, "domains": domains, **rest})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not an evaluation: {error}") from error


def evaluate(
    params: dict[str, Any],
    config: ModelConfig,
    files_or_windows: Files | Mapping[str, EvaluationWindows],
    tokenizer: Any = None,
    *,
    seq_len: int = 512,
    batch_size: int = 8,
    reference: tuple[dict[str, Any], ModelConfig] | None = None,
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
    windows = files_or_windows
    if not isinstance(windows, Mapping):
        if tokenizer is None:
            raise ValueError("a tokenizer is required to evaluate on files, got None")
        windows = evaluation_windows(windows, tokenizer, seq_len=seq_len, batch_size=batch_size)
    _check_arguments(windows, config, reference)
    num_tokens = sum(domain.num_tokens for domain in windows.values())
    sums = {}
    with progress_bar(num_tokens, description, "tokens") as progress:
        for name, domain in windows.items():
            sums[name] = _domain_sums(params, config, reference, name, domain, progress)
    domains = {name: _summary(sums[name], windows[name]) for name in windows}
    fullest = max(
        (batch for domain in windows.values() for batch in domain.batches),
        key=lambda batch: int(batch["mask"].sum()),
    )
    rows, length = fullest["tokens"].shape
    return Evaluation(
        domains=domains,
        total=_total(sums, windows),
        mean=_mean(list(domains.values())),
        tokens_per_second=forward_speed(params, config, fullest["tokens"], fullest["segment_ids"]),
        seq_len=length,
        batch_size=rows,
    )


def forward_speed(
    params: dict[str, Any],
    config: ModelConfig,
    tokens: np.ndarray,
    segment_ids: np.ndarray,
    repetitions: int = _SPEED_REPETITIONS,
) -> float:
    """Tokens per second of the compiled forward pass: median over ``repetitions`` calls.

    Args:
        tokens, segment_ids: Int[B, S]; padding (segment 0) is computed but not counted.
    """
    inputs = (jnp.asarray(tokens), jnp.asarray(segment_ids))
    jax.block_until_ready(_logits(params, config, *inputs))
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(_logits(params, config, *inputs))
        seconds.append(time.perf_counter() - start)
    return int((segment_ids > 0).sum()) / statistics.median(seconds)


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
    reference: tuple[Any, ModelConfig] | None,
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
    from moe_jax.report import environment

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


def main(argv: Sequence[str]) -> None:
    require_config(_CONFIG, argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    settings = _CONFIG.value
    result = evaluate_checkpoints(settings)
    print(
        comparison_table(
            {n: Evaluation.from_dict(r["evaluation"]) for n, r in result["models"].items()}
        )
    )
    if settings.get("output"):
        path = Path(settings.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    run(main)
