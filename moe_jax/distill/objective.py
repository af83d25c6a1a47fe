"""What a training step minimises: a function of weights and a batch, perhaps with a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moe_jax.config import ModelConfig
from moe_jax.distill.settings import TrainSettings
from moe_jax.losses import (
    TeacherTopK,
    balance_loss,
    distill_sums,
    hidden_distance,
    next_token_labels,
    router_kl,
)
from moe_jax.losses.head_loss import head_loss
from moe_jax.model import head_logits, head_params, hidden_states
from moe_jax.model.router import share_logits
from moe_jax.params import Leaf, leaves_like


def cast_for_compute(params: Any, leaves: Any, dtype) -> Any:
    """Matrices in ``dtype``; routers, which compute in float32, and vectors as they are."""

    def cast(leaf: Leaf, array: Array) -> Array:
        return array.astype(dtype) if leaf.decay and leaf.part != "router" else array

    return jax.tree.map(cast, leaves, params)


def objective(
    params: dict[str, Any],
    config: ModelConfig,
    batch: dict[str, Array],
    rng,
    settings: TrainSettings,
    positions: Array,
    teacher: tuple[dict[str, Any], ModelConfig] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """This batch's part of the loss: sums over its positions, divided by ``positions``.

    Args:
        params: the student's, float32.
        batch: ``tokens`` and ``segment_ids`` Int[B, S] (segment 0 is padding), and, from a cache
            of the teacher, ``teacher_ids`` and ``teacher_log_probs`` [B, S, K].
        positions: how many positions with a next token the whole step has. Micro-batches that are
            divided by it add up to the step's mean.

    Returns:
        The loss, and its parts: ``distill`` and ``lm`` (nats), ``hidden``, ``router`` and
        ``balance`` where they have a weight.
    """
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    labels, mask = next_token_labels(tokens, segment_ids)
    params = cast_for_compute(params, leaves_like(params, config), settings.dtype)
    taps = _taps(settings)
    x, aux = hidden_states(
        params,
        config,
        tokens,
        segment_ids,
        taps,
        rng=rng if settings.sample_routing else None,
        remat=settings.remat,
    )
    per_token = {"labels": labels.reshape(-1), "mask": mask.reshape(-1)}
    teacher_head, teacher_aux, teacher_config = None, None, None
    if settings.needs_teacher and teacher is not None:
        weights, teacher_config = teacher
        with jax.named_scope("teacher"):
            leaves = leaves_like(weights, teacher_config)
            weights = jax.lax.stop_gradient(cast_for_compute(weights, leaves, settings.dtype))
            states, teacher_aux = hidden_states(weights, teacher_config, tokens, segment_ids, taps)
            teacher_head = head_params(weights, teacher_config)
            per_token["teacher"] = states.reshape(-1, states.shape[-1])
    elif settings.loss != "lm":
        names = ("teacher_ids", "teacher_log_probs")
        per_token |= {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in names}

    sums = head_loss(
        _head_loss(config, teacher_config, settings),
        head_params(params, config),
        x.reshape(-1, x.shape[-1]),
        per_token,
        teacher_head,
        chunk_tokens=settings.chunk_tokens,
    )
    loss = sums["total"] / positions
    parts = {name: sums[name] / positions for name in ("distill", "lm")}
    for name, (weight, total) in _state_sums(
        config, settings, aux, teacher_aux, segment_ids.reshape(-1) > 0, per_token["mask"]
    ).items():
        parts[name] = total / positions
        loss = loss + weight * parts[name]
    return loss, parts


def _head_loss(config: ModelConfig, teacher_config: ModelConfig | None, settings: TrainSettings):
    """The loss of a chunk of positions as a function of their hidden states."""

    def loss(head, hidden, per_token, teacher_head):
        logits = head_logits(head, config, hidden)
        if "teacher" in per_token:
            target: Any = head_logits(teacher_head, teacher_config, per_token["teacher"])  # type: ignore[arg-type]
        elif "teacher_ids" in per_token:
            target = TeacherTopK(per_token["teacher_ids"], per_token["teacher_log_probs"])
        else:
            target = None
        return distill_sums(
            logits, target, per_token["labels"], per_token["mask"], settings.options
        )

    return loss


def _taps(settings: TrainSettings) -> tuple[str, ...]:
    taps: tuple[str, ...] = ()
    if settings.hidden_weight > 0:
        taps += ("layer_output",)
    if settings.router_weight > 0 or settings.balance_weight > 0:
        taps += ("router_logits", "expert_ids")
    return taps


def _state_sums(
    config: ModelConfig,
    settings: TrainSettings,
    aux: dict[str, Any],
    teacher_aux: dict[str, Any] | None,
    valid: Array,
    mask: Array,
) -> dict[str, tuple[float, Array]]:
    """By name, the weight and the sum over positions of what compares more than predictions."""
    layers = aux["layers"]
    shares = partial(share_logits, router=config.router)
    sums: dict[str, tuple[float, Array]] = {}
    if settings.balance_weight > 0:
        # A product of two means: not a sum over positions, so each micro-batch has its own.
        each = [
            balance_loss(shares(layers[i]["router_logits"]), layers[i]["expert_ids"], valid)
            for i in config.moe_layers
        ]
        sums["balance"] = (settings.balance_weight * len(each), _mean(each) * mask.sum())
    if teacher_aux is None:
        return sums
    others = teacher_aux["layers"]
    if settings.hidden_weight > 0:
        chosen, name = settings.hidden_layers or range(config.num_layers), "layer_output"
        each = [
            hidden_distance(_rows(layers[i][name]), _rows(others[i][name]), mask)[0] for i in chosen
        ]
        sums["hidden"] = (settings.hidden_weight, _mean(each))
    if settings.router_weight > 0:
        each = [
            router_kl(shares(layers[i]["router_logits"]), shares(others[i]["router_logits"]), mask)[
                0
            ]
            for i in config.moe_layers
        ]
        sums["router"] = (settings.router_weight, _mean(each))
    return sums


def _rows(states: Array) -> Array:
    return states.reshape(-1, states.shape[-1])


def _mean(values: Sequence[Array]) -> Array:
    return jnp.stack(values).mean() if values else jnp.zeros(())
