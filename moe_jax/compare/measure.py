"""Held-out losses of many models against one original, whose predictions are computed once."""

from __future__ import annotations

import dataclasses
import functools
import logging
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moe_jax.config import ModelConfig, MoeConfig
from moe_jax.data.evaluation import EvaluationWindows
from moe_jax.model import forward
from moe_jax.params import NEURON_AXIS, stack_experts

Params = dict[str, Any]
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """The original and the text that others are compared with it on.

    Attributes:
        params, config: of the original.
        windows: held-out text by domain.
        kept: predictions of every batch, domain after domain: log-probabilities Float32[B, S, V]
            and the likeliest token Int32[B, S]; empty if they would exceed the budget, and are
            computed again for every model.
    """

    params: Params
    config: ModelConfig
    windows: Mapping[str, EvaluationWindows]
    kept: tuple[tuple[np.ndarray, np.ndarray], ...] = ()

    @classmethod
    def make(
        cls,
        params: Params,
        config: ModelConfig,
        windows: Mapping[str, EvaluationWindows],
        budget_mib: int,
    ) -> Reference:
        """Computes the original's predictions, if they fit into ``budget_mib`` of host memory."""
        reference = cls(params, config, windows)
        batches = [batch for domain in windows.values() for batch in domain.batches]
        size = sum(batch["tokens"].size for batch in batches) * config.vocab_size * 4
        if size > budget_mib * 2**20:
            _logger.info(
                "predictions of the original take %d MiB, more than reference_mib = %d: they are "
                "computed again for every model, which takes about twice the time",
                size // 2**20,
                budget_mib,
            )
            return reference
        kept = tuple(jax.device_get(_predictions(params, config, batch)) for batch in batches)
        return dataclasses.replace(reference, kept=kept)

    def predictions(self, index: int, batch: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
        """Of batch ``index``."""
        return self.kept[index] if self.kept else _predictions(self.params, self.config, batch)


def held_out(params: Params, config: ModelConfig, reference: Reference) -> dict[str, Any]:
    """What ``moe_jax.evaluate.evaluate`` measures against the original, but for the speed.

    Returns:
        ``domains``: by name, ``bits_per_byte``, ``kl`` (nats per token) and ``top1_agreement``;
        ``mean``: the mean over domains of each.

    Raises:
        ValueError: logits that are not finite (the message names the domain).
    """
    domains, index = {}, 0
    for name, windows in reference.windows.items():
        sums = np.zeros(3)
        for batch in windows.batches:
            expected = reference.predictions(index, batch)
            sums += np.asarray(_step(params, config, batch, *expected), np.float64).sum(1)
            index += 1
        if not np.isfinite(sums).all():
            raise ValueError(f"logits must be finite, got NaN or infinity in domain {name!r}")
        domains[name] = {
            "bits_per_byte": windows.bits_per_byte(sums[0]),
            "kl": sums[1] / windows.num_tokens,
            "top1_agreement": sums[2] / windows.num_tokens,
        }
    quantities = next(iter(domains.values()))
    mean = {key: statistics.fmean(d[key] for d in domains.values()) for key in quantities}
    return {"domains": domains, "mean": mean}


def canonical(params: Params, config: ModelConfig, width: int) -> tuple[Params, ModelConfig]:
    """The same function with each layer's novices last among its router rows.

    Which experts are novices, and how wide each is, are part of a configuration and so of the
    compiled program: as they are, no two plans share one. Experts that differ in width are filled
    up with zeros to ``width``, the original's, novices beside them too: experts of no neurons.
    """
    layers = list(params["layers"])
    for i in config.moe_layers:
        moe, part = config.moe(i), dict(layers[i]["moe"])
        if not moe.novice_ids and not moe.expert_widths:
            continue
        order = np.array([*moe.expert_ids, *moe.novice_ids])
        part["router"] = {**part["router"], "kernel": part["router"]["kernel"][:, order]}
        if moe.expert_widths:
            part = _of_one_width(part, moe, width)
            facts = {"expert_widths": (), "expert_width": width, "expert_bias": True}
            config = config.replace_moe(i, novice_ids=(), **facts)
        else:
            last = tuple(range(len(moe.expert_ids), moe.num_experts))
            config = config.replace_moe(i, novice_ids=last)
        layers[i] = {**layers[i], "moe": part}
    return {**params, "layers": layers}, config


def _of_one_width(part: Params, moe: MoeConfig, width: int) -> Params:
    """All experts and then all novices as experts of ``width`` neurons and a constant."""
    novices, missing = len(moe.novice_ids), width - moe.expert_width
    experts = {}
    for name, leaf in stack_experts(part["experts"], moe).items():
        padding = [(0, novices), (0, 0), (0, 0)]
        padding[NEURON_AXIS[name]] = (0, missing)
        experts[name] = jnp.pad(leaf, padding)
    model_width = part["router"]["kernel"].shape[0]
    bias = part.get("expert_bias", jnp.zeros((len(moe.expert_ids), model_width)))
    if novices:
        bias = jnp.concatenate([bias, part["novices"]["constant"]])
    return {"router": part["router"], "experts": experts, "expert_bias": bias}


@functools.partial(jax.jit, static_argnames="config")
def _predictions(params, config: ModelConfig, batch) -> tuple[Array, Array]:
    logits, _ = forward(params, config, batch["tokens"], batch["segment_ids"])
    return jax.nn.log_softmax(logits.astype(jnp.float32)), logits.argmax(-1)


@functools.partial(jax.jit, static_argnames="config")
def _step(params, config: ModelConfig, batch, log_p, likeliest) -> Array:
    """Sums over each row of loss, divergence and agreement, Float32[3, B].

    Every pass over [B, S, V] costs as much as a layer or two, so that the normaliser is shared,
    and instead of an argmax the maximum is compared with the logit of the token that should be it.
    """
    logits, _ = forward(params, config, batch["tokens"], batch["segment_ids"])
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, -1)

    def logit_of(ids):
        return jnp.take_along_axis(logits, ids[..., None], -1)[..., 0]

    nll = total - logit_of(batch["targets"])
    divergence = (jnp.exp(log_p) * (log_p - (logits - total[..., None]))).sum(-1)
    agree = logit_of(likeliest) == logits.max(-1)
    sums = jnp.stack([nll, divergence, agree.astype(jnp.float32)])
    return jnp.where(batch["mask"], sums, 0).sum(-1)
