"""Held-out losses of models per domain, alone or against a reference, and their speed."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import ModelConfig
from moe_jax.data.evaluation import EvaluationWindows, TextSize
from moe_jax.evaluate.results import DomainEvaluation, Evaluation
from moe_jax.metrics import progress_bar
from moe_jax.model import forward, head_logits, head_params
from moe_jax.model.block import embed, final_states, layer_output
from moe_jax.params import layers_are_uniform, stack_layers
from moe_jax.processes import gather, mesh_of, on_mesh_of, one_ahead, place_batch
from moe_jax.stored import in_memory, in_turn, is_stored
from moe_jax.tokens import check_token_ids

Model = tuple[dict[str, Any], ModelConfig]
Predictions = tuple[Any, Any]

_SPEED_REPETITIONS = 5
# Compiling a layer takes seconds; a copy of the weights takes memory.
_MANY_LAYERS, _SMALL_BYTES = 12, 2 << 30
_LOGITS_BYTES = 1 << 26  # at a time, of a model on disk

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """The model that others are compared with.

    Attributes:
        kept: its predictions on every batch of the text: log-probabilities Float32[B, S, V] and
            the likeliest token Int32[B, S]. Empty: they are computed again, in the step of the
            model that is compared, and never kept.
    """

    params: dict[str, Any]
    config: ModelConfig
    kept: tuple[Predictions, ...] = ()

    @classmethod
    def keeping(cls, model: Model, text: EvaluationWindows, budget_mib: int) -> Reference:
        """With predictions, for comparison with many models, if they fit into ``budget_mib``."""
        params, config = model
        size = sum(batch["tokens"].size for batch in text.batches) * config.vocab_size * 4
        if size > budget_mib * 2**20:
            _logger.info(
                "predictions of the original take %d MiB, more than reference_mib = %d: they are "
                "computed again for every model, which takes about twice the time",
                size // 2**20,
                budget_mib,
            )
            return cls(params, config)
        mesh = mesh_of(params)
        placed = (place_batch(batch, mesh) for batch in text.batches)
        with on_mesh_of(params):
            kept = [gather(_predictions(params, config, batch)) for batch in placed]
        return cls(params, config, tuple(kept))


def evaluate(
    params: dict[str, Any],
    config: ModelConfig,
    text: EvaluationWindows,
    *,
    reference: Reference | Model | None = None,
    description: str = "evaluating",
    with_speed: bool = True,
) -> Evaluation:
    """Measures a model on held-out text, domain by domain.

    Args:
        text: what ``data.evaluation_windows`` made of files.
        reference: the model to compare with, ``(params, config)`` or a ``Reference``.

    Raises:
        ValueError: no text, token ids outside the vocabulary, vocabularies that differ, or logits
            that are not finite (the message names the domain).
    """
    if isinstance(reference, tuple):
        reference = Reference(*reference)
    sums = _sums((params, config), text, reference, description)
    speed = _speeds([(params, config)], text)[0] if with_speed else None
    return _evaluation(text, sums, speed)


def evaluate_pair(
    before: Model, after: Model, text: EvaluationWindows, *, description: str = "evaluating"
) -> tuple[Evaluation, Evaluation]:
    """Measures an original and what was made from it, in one pass over the text.

    The second result is ``evaluate(*after, text, reference=before)`` and the first one
    ``evaluate(*before, text)``, at two forward passes of the text instead of three, and with their
    speeds measured in turn. Errors are those of ``evaluate``.
    """
    sums = _sums(after, text, Reference(*before), description)
    original = {"nll": sums["reference_nll"]}
    speeds = _speeds([before, after], text)
    return _evaluation(text, original, speeds[0]), _evaluation(text, sums, speeds[1])


def _sums(
    model: Model, text: EvaluationWindows, reference: Reference | None, description: str
) -> dict[str, dict[str, float]]:
    """By quantity of ``evaluation_step`` and by domain, the sum over all positions."""
    _check(text, model[1], reference)
    found: list[dict[str, np.ndarray]] = []
    with progress_bar(text.total.num_tokens, description, "tokens") as progress:
        results = one_ahead(_results(model, text, reference))
        for batch, sums in zip(text.batches, results, strict=True):
            found.append({key: rows.astype(np.float64) for key, rows in gather(sums).items()})
            progress.update(int(batch["mask"].sum()))
    totals = {key: text.by_domain([sums[key] for sums in found]) for key in found[0]}
    for key, culprit in (("broken", "the model"), ("broken_reference", "the reference")):
        for domain, positions in totals.pop(key, {}).items():
            if positions:
                raise ValueError(
                    f"logits must be finite, got NaN or infinity from {culprit} at "
                    f"{positions:.0f} positions of domain {domain!r}"
                )
    return totals


def _results(
    model: Model, text: EvaluationWindows, reference: Reference | None
) -> Iterator[dict[str, Any]]:
    if is_stored((model[0], reference.params if reference else {})):
        yield from _results_in_turn(model, text, reference)
        return
    mesh = mesh_of(model[0])
    model = _scannable(model)
    compared: tuple[Any, Any] = (None, None)
    if reference is not None and not reference.kept:
        compared = _scannable((reference.params, reference.config))
    for i, whole in enumerate(text.batches):
        if reference is not None and reference.kept:
            compared = (reference.kept[i], None)
        with on_mesh_of(model[0]):
            sums = evaluation_step(*model, place_batch(whole, mesh), *compared)
        yield sums


def _results_in_turn(
    model: Model, text: EvaluationWindows, reference: Reference | None
) -> Iterator[dict[str, Any]]:
    """Of a model on disk: all text passes one layer after the other, then the head, in parts.

    A head that the reference has too is in memory once.
    """
    models, kept = [model], reference.kept if reference is not None else ()
    if reference is not None and not kept:
        models.append((reference.params, reference.config))
    configs = tuple(config for _, config in models)
    states = [_states_in_turn(each, text) for each in models]
    heads = in_memory([_head_of(*each) for each in models], passing=True)
    for i, batch in enumerate(text.batches):
        rows, length = batch["tokens"].shape
        step = max(1, _LOGITS_BYTES // (4 * rows * model[1].vocab_size))
        totals: dict[str, np.ndarray] = {}
        for start in range(0, length, step):
            cut = slice(start, start + step)
            part = {name: batch[name][:, cut] for name in ("mask", "targets")}
            expected = tuple(array[:, cut] for array in kept[i]) if kept else None
            given = [of_model[i][:, cut] for of_model in states]
            for name, sums in gather(_sums_at_head(heads, configs, given, expected, part)).items():
                totals[name] = totals.get(name, 0) + sums.astype(np.float64)
        yield totals


def _head_of(params: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """What ``final_states`` and ``head_params`` read."""
    names = [name for name in params if name not in ("layers", "embed")]
    names += ["embed"] if config.tied_embeddings else []
    return {name: params[name] for name in names}


def _states_in_turn(model: Model, text: EvaluationWindows) -> list[np.ndarray]:
    """The stream of each batch behind the last layer."""
    params, config = model
    embedding = in_memory({"embed": params["embed"]}, passing=True)
    states = [np.asarray(embed(embedding, config, batch["tokens"])) for batch in text.batches]
    del embedding
    with progress_bar(config.num_layers, "evaluate layer by layer", "layer") as bar:
        layers = in_turn(params)["layers"]
        for n, layer in enumerate(config.layers):
            weights = layers[n]  # not of zip, which would hold on to the layer before
            for i, batch in enumerate(text.batches):
                y = layer_output(weights, config, layer, states[i], batch["segment_ids"])
                states[i] = np.asarray(y)
            del weights
            bar.update()
    return states


@partial(jax.jit, static_argnames="configs")
def _sums_at_head(heads, configs, states, kept, batch) -> dict[str, Float[Array, " B"]]:
    """``evaluation_step`` from the streams behind the last layers, of a model or of two."""
    predicted = [
        _of_logits(head_logits(head_params(head, config), config, final_states(head, config, x)))
        for head, config, x in zip(heads, configs, states, strict=True)
    ]
    return _sums_of(predicted[0], predicted[1] if len(predicted) > 1 else kept, batch)


def _of_logits(logits) -> tuple[Float[Array, "B S V"], Int[Array, "B S"]]:
    return jax.nn.log_softmax(logits), logits.argmax(-1)


def _scannable(model: Model) -> Model:
    """With stacked layers, of which one is compiled, if there are many and room for a copy."""
    params, config = model
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if config.num_layers < _MANY_LAYERS or size > _SMALL_BYTES or not layers_are_uniform(config):
        return model
    return jax.jit(stack_layers)(params), config


@partial(jax.jit, static_argnames="config")
def _predictions(params, config, batch) -> tuple[Float[Array, "B S V"], Int[Array, "B S"]]:
    logits, _ = forward(params, config, batch["tokens"], batch["segment_ids"])
    return _of_logits(logits)


@partial(jax.jit, static_argnames=("config", "reference_config"))
def evaluation_step(
    params, config, batch, reference, reference_config
) -> dict[str, Float[Array, " B"]]:
    """Sums over each row; the host adds rows up in float64.

    ``reference`` is weights with ``reference_config``, or predictions without, or None.
    """
    predicted = _predictions(params, config, batch)
    with jax.named_scope("reference"):
        if reference_config is not None:
            reference = _predictions(reference, reference_config, batch)
    return _sums_of(predicted, reference, batch)


@jax.jit
def _sums_of(predicted, reference, batch) -> dict[str, Float[Array, " B"]]:
    """Sums over each row, from the predictions of a model and, if there is one, the reference."""
    mask, targets = batch["mask"], batch["targets"]
    log_q, likeliest = predicted
    sums = {"nll": -_at(log_q, targets), "broken": _broken(log_q)}
    if reference is not None:
        log_p, expected = reference
        sums |= {
            "reference_nll": -_at(log_p, targets),
            "kl": (jnp.exp(log_p) * (log_p - log_q)).sum(-1),
            "agree": likeliest == expected,
            "broken_reference": _broken(log_p),
        }
    return {key: jnp.where(mask, value, 0.0).sum(-1) for key, value in sums.items()}


def _at(log_p: Float[Array, "B S V"], ids: Int[Array, "B S"]) -> Float[Array, "B S"]:
    return jnp.take_along_axis(log_p, ids[..., None], -1)[..., 0]


def _broken(log_p: Float[Array, "B S V"]) -> Bool[Array, "B S"]:
    return ~jnp.isfinite(log_p).all(-1)


def forward_speed(
    models: Sequence[Model], tokens: np.ndarray, segment_ids: np.ndarray
) -> list[float]:
    """Tokens per second of each model's compiled forward pass: the best of several calls.

    The best, and the models in turn, since what else runs on the machine only ever adds time, and
    seldom equally much to each.

    Args:
        tokens, segment_ids: Int[B, S]; padding (segment 0) is computed but not counted.
    """
    placed = place_batch({"tokens": tokens, "segment_ids": segment_ids}, mesh_of(models[0][0]))
    inputs = (jnp.asarray(placed["tokens"]), jnp.asarray(placed["segment_ids"]))

    def run(params, config):
        with on_mesh_of(params):
            jax.block_until_ready(_logits(params, config, *inputs))

    for model in models:
        run(*model)
    seconds = [math.inf] * len(models)
    for _ in range(_SPEED_REPETITIONS):
        for i, model in enumerate(models):
            start = time.perf_counter()
            run(*model)
            seconds[i] = min(seconds[i], time.perf_counter() - start)
    num_tokens = int((segment_ids > 0).sum())
    return [num_tokens / spent for spent in seconds]


@partial(jax.jit, static_argnames="config")
def _logits(params, config, tokens, segment_ids):
    return forward(params, config, tokens, segment_ids)[0]


def _speeds(models: Sequence[Model], text: EvaluationWindows) -> Sequence[float | None]:
    """Of each model; none of those on disk, where reading them is what is measured."""
    if any(is_stored(params) for params, _ in models):
        return [None] * len(models)
    fullest = max(text.batches, key=lambda batch: int(batch["mask"].sum()))
    return forward_speed(models, fullest["tokens"], fullest["segment_ids"])


def _evaluation(
    text: EvaluationWindows, sums: Mapping[str, Mapping[str, float]], speed: float | None
) -> Evaluation:
    domains = {
        name: _summary({key: by_domain[name] for key, by_domain in sums.items()}, size)
        for name, size in text.domains.items()
    }
    rows, length = text.batches[0]["tokens"].shape
    return Evaluation(
        domains=domains,
        total=_summary({key: sum(values.values()) for key, values in sums.items()}, text.total),
        mean=_mean(list(domains.values())),
        tokens_per_second=speed,
        seq_len=length,
        batch_size=rows,
    )


def _summary(sums: Mapping[str, float], size: TextSize) -> DomainEvaluation:
    tokens = size.num_tokens
    return DomainEvaluation(
        tokens=tokens,
        bytes=size.num_bytes,
        nll=sums["nll"] / tokens,
        perplexity=_exp(sums["nll"] / tokens),
        bits_per_byte=size.bits_per_byte(sums["nll"]),
        kl=sums["kl"] / tokens if "kl" in sums else None,
        top1_agreement=sums["agree"] / tokens if "agree" in sums else None,
    )


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


def _check(text: EvaluationWindows, config: ModelConfig, reference: Reference | None) -> None:
    if not text.batches:
        raise ValueError("text must hold at least one domain, got none")
    largest = max(max(int(b["tokens"].max()), int(b["targets"].max())) for b in text.batches)
    check_token_ids(largest, config.vocab_size)
    if reference is not None and reference.config.vocab_size != config.vocab_size:
        raise ValueError(
            f"the reference must share the model's vocab_size = {config.vocab_size}, "
            f"got {reference.config.vocab_size}"
        )
    length = text.batches[0]["tokens"].shape[1]
    if length > config.max_positions:
        _logger.warning(
            "windows of %d tokens exceed the model's %d positions", length, config.max_positions
        )
