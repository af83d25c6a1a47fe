"""First-order importance: gradients of a loss with respect to masks of ones."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moe_jax.config import ModelConfig
from moe_jax.losses import distill_loss, next_token_labels
from moe_jax.model import forward
from moe_jax.statistics_table import Loss

ByLayer = dict[int, dict[str, Array]]


@dataclass(frozen=True)
class Objective:
    """The loss that is differentiated: of which model, against which teacher."""

    config: ModelConfig
    teacher: ModelConfig
    loss: Loss
    top_k: int
    backend: str


@functools.partial(jax.jit, static_argnames="objective")
def mask_gradients(
    params, teacher_params, batch, rng, objective: Objective
) -> tuple[ByLayer, ByLayer]:
    """Sums over a batch's sequences of the gradients of a loss in masks of ones.

    One backward pass per sequence gives both masks' gradients, and forms none of a weight. The
    gradient in a neuron's mask is ``sum_t h_t dL/dh_t``: the first-order change of the loss if
    the neuron is removed, its up and down projections' Taylor terms in one (SlimMoE's
    sensitivity; see arXiv 1611.06440 for the criterion). The gradient in a key/value group's mask
    is the same sum over the outputs ``o`` of its query heads: the Taylor terms of its value and
    output projections in one.

    A mask on an expert's whole output has the sum of its neurons' gradients.

    Returns:
        Of neurons, by layer with experts, ``[E_kept, F]``, of their experts ``[E_kept]``, with the
        prefix ``expert_``, and of groups, by layer, ``[G]``: ``batch_abs``, ``sequence_abs`` and
        ``sequence_square``: |sum|, sums of |.| and of squares over the sequences.
    """
    config, loss = objective.config, objective.loss
    neurons = {
        i: jnp.ones((len(config.moe(i).expert_ids), config.moe(i).expert_width))
        for i in config.moe_layers
    }
    groups = {i: jnp.ones(layer.num_kv_heads) for i, layer in enumerate(config.layers)}
    sample = loss == "kd_full"

    def sequence_gradient(item):
        tokens, mask, index = (leaf[None] for leaf in item)
        segment_ids = mask.astype(jnp.int32)
        labels, counted = next_token_labels(tokens, segment_ids)
        reference = None
        if loss != "lm":
            reference, _ = forward(teacher_params, objective.teacher, tokens, segment_ids)

        def total_loss(masks):
            logits, _ = forward(
                params,
                config,
                tokens,
                segment_ids,
                neuron_masks=masks[0],
                group_masks=masks[1],
                rng=jax.random.fold_in(rng, index[0]) if sample else None,
                backend=objective.backend,
            )
            target = logits if reference is None else reference
            mean, metrics = distill_loss(
                logits, target, labels, counted, kind=loss, top_k=objective.top_k
            )
            return mean * metrics["positions"]

        by_neuron, by_group = jax.grad(total_loss)((neurons, groups))
        return by_neuron, {i: gradient.sum(-1) for i, gradient in by_neuron.items()}, by_group

    def add(sums, item):
        gradient = sequence_gradient(item)
        signed, absolute, square = sums
        return (
            jax.tree.map(jnp.add, signed, gradient),
            jax.tree.map(lambda a, g: a + jnp.abs(g), absolute, gradient),
            jax.tree.map(lambda a, g: a + jnp.square(g), square, gradient),
        ), None

    experts = {i: mask[:, 0] for i, mask in neurons.items()}
    zeros = jax.tree.map(jnp.zeros_like, (neurons, experts, groups))
    items = (batch["tokens"], batch["mask"], jnp.arange(batch["tokens"].shape[0]))
    sums, _ = jax.lax.scan(add, (zeros, zeros, zeros), items)
    by_neuron, by_expert, by_group = jax.tree.map(
        lambda signed, absolute, square: {
            "batch_abs": jnp.abs(signed),
            "sequence_abs": absolute,
            "sequence_square": square,
        },
        *sums,
    )
    for i, sums_of_experts in by_expert.items():
        by_neuron[i] |= {f"expert_{name}": array for name, array in sums_of_experts.items()}
    return by_neuron, by_group
