"""First-order importance: gradients of a loss with respect to masks of ones.

Of all tokens of a sequence together, or of each by itself: a mask of one token's activations has
the gradient ``h dL/dh`` there, where ``dL/dh`` follows from the loss's gradient ``d`` in what the
part adds to the residual stream.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.config import LayerConfig, ModelConfig, MoeConfig
from moe_jax.losses import distill_loss, next_token_labels
from moe_jax.model import (
    BlockOptions,
    block,
    forward,
    head_logits,
    head_params,
    position_tables,
)
from moe_jax.model.block import final_states
from moe_jax.model.moe import moe_layer
from moe_jax.ops.grouped_matmul import grouped_matmul, grouped_outer
from moe_jax.params import expert_leaves, stack_experts
from moe_jax.statistics_table import SHARED, Loss

ByLayer = dict[int, dict[str, Array]]
_TAPS = ("hidden", "row_token", "row_weight", "group_sizes", "shared_hidden", "mixed")
_EXACT = jax.lax.Precision.HIGHEST


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
        ``sequence_square``: |sum|, sums of |.| and of squares over the sequences; and
        ``token_square``: sums of squares over the tokens (see ``_token_squares``); and
        ``gradient_square``, those of the gradient in a neuron's activation itself. Of the neurons
        of a shared expert the same, ``[1, U]``, with the prefix ``shared_``.
    """
    config, loss = objective.config, objective.loss
    neurons, groups = _masks(dict(enumerate(config.layers)))
    sample = loss == "kd_full"

    def sequence_gradient(item):
        tokens, mask, index = (leaf[None] for leaf in item)
        segment_ids = mask.astype(jnp.int32)
        labels, counted = next_token_labels(tokens, segment_ids)
        reference = None
        if loss != "lm":
            reference, _ = forward(teacher_params, objective.teacher, tokens, segment_ids)

        def total_loss(masks, offsets):
            logits, aux = forward(
                params,
                config,
                tokens,
                segment_ids,
                _TAPS,
                neuron_masks=masks[0],
                group_masks=masks[1],
                attention_offsets=offsets[0],
                feed_forward_offsets=offsets[1],
                rng=jax.random.fold_in(rng, index[0]) if sample else None,
                backend=objective.backend,
            )
            target = logits if reference is None else reference
            mean, metrics = distill_loss(
                logits, target, labels, counted, kind=loss, top_k=objective.top_k
            )
            return mean * metrics["positions"], aux["layers"]

        nothing = jnp.zeros((*tokens.shape, config.width), params["embed"]["embedding"].dtype)
        offsets = tuple(dict.fromkeys(range(config.num_layers), nothing) for _ in range(2))
        gradients, taps = jax.grad(total_loss, (0, 1), has_aux=True)((neurons, groups), offsets)
        (by_neuron, by_group), streams = gradients
        # Of what each part gives, before the multiplier with which it enters the stream.
        of_attention, of_feed_forward = jax.tree.map(lambda d: d * config.residual_scale, streams)
        shared, squares = {}, {}
        for i, layer in enumerate(config.layers):
            shared[i], squares[i] = _token_squares(
                params["layers"][i], config, layer, taps[i], of_attention[i][0],
                of_feed_forward[i][0], objective.backend,
            )  # fmt: skip
        return (by_neuron, by_group, shared), squares, ()

    items = (batch["tokens"], batch["mask"], jnp.arange(batch["tokens"].shape[0]))
    return _over_sequences(sequence_gradient, items)[:2]


def _masks(layers: Mapping[int, LayerConfig]) -> tuple[dict[int, Array], dict[int, Array]]:
    """Masks of ones, of neurons by layer with experts, and of groups by layer."""
    neurons = {
        i: jnp.ones((len(moe.expert_ids), moe.expert_width))
        for i, layer in layers.items()
        if isinstance(moe := layer.feed_forward, MoeConfig)
    }
    return neurons, {i: jnp.ones(layer.num_kv_heads) for i, layer in layers.items()}


def _over_sequences(
    sequence_gradient: Callable[[Any], tuple[Any, Any, Any]], items: Any
) -> tuple[ByLayer, ByLayer, Any]:
    """``mask_gradients`` by layer, of what ``sequence_gradient`` gives for each item.

    Args:
        sequence_gradient: from an item to the gradients in both masks and in one of shared
            neurons, the squares that ``_token_squares`` gives by layer, and anything else.
        items: arrays with a row for each sequence.

    Returns:
        Sums about neurons and experts, sums about groups, and anything else, a row a sequence.
    """

    def gradients(item):
        (by_neuron, by_group, shared), squares, more = sequence_gradient(item)
        by_expert = {i: gradient.sum(-1) for i, gradient in by_neuron.items()}
        return (by_neuron, by_expert, by_group, shared), squares, more

    def add(sums, item):
        gradient, new_squares, more = gradients(item)
        signed, absolute, square, squares = sums
        return (
            jax.tree.map(jnp.add, signed, gradient),
            jax.tree.map(lambda a, g: a + jnp.abs(g), absolute, gradient),
            jax.tree.map(lambda a, g: a + jnp.square(g), square, gradient),
            jax.tree.map(jnp.add, squares, new_squares),
        ), more

    shapes = jax.eval_shape(lambda: gradients(jax.tree.map(lambda leaf: leaf[0], items))[:2])
    zeros, zero_squares = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (*sums, squares), more = jax.lax.scan(add, (zeros, zeros, zeros, zero_squares), items)
    by_neuron, by_expert, by_group, shared = jax.tree.map(
        lambda signed, absolute, square: {
            "batch_abs": jnp.abs(signed),
            "sequence_abs": absolute,
            "sequence_square": square,
        },
        *sums,
    )
    for i, sums_of_experts in by_expert.items():
        by_neuron[i] |= {f"expert_{name}": array for name, array in sums_of_experts.items()}
        sums_of_shared = shared[i][0] if shared[i] else {}
        by_neuron[i] |= {f"{SHARED}{name}": array for name, array in sums_of_shared.items()}
        by_neuron[i] |= squares[i][0]
    for i, sums_of_groups in by_group.items():
        sums_of_groups |= squares[i][1]
    return by_neuron, by_group, more


@functools.partial(jax.jit, static_argnames=("config", "loss", "top_k"))
def head_gradients(
    head, config: ModelConfig, x: Float[Array, "B S D"], batch, loss: Loss, top_k: int
) -> Float[Array, "B S D"]:
    """The gradient of each sequence's loss in the stream behind the last layer.

    Args:
        head: the parts of ``params`` that ``final_states`` and ``head_params`` read.
        loss: ``lm``, or ``kd_topk`` with the model as its own teacher.
    """

    def of_sequence(item):
        x, tokens, mask = (leaf[None] for leaf in item)
        labels, counted = next_token_labels(tokens, mask.astype(jnp.int32))

        def total_loss(x):
            states = final_states(head, config, x)
            logits = head_logits(head_params(head, config), config, states)
            target = jax.lax.stop_gradient(logits)
            mean, metrics = distill_loss(logits, target, labels, counted, kind=loss, top_k=top_k)
            return mean * metrics["positions"]

        return jax.grad(total_loss)(x)[0]

    return jax.lax.map(of_sequence, (x, batch["tokens"], batch["mask"]))


@functools.partial(jax.jit, static_argnames=("config", "layer", "backend"))
def layer_gradients(
    weights, config: ModelConfig, layer: LayerConfig, x, gradient, mask, backend: str
) -> tuple[Float[Array, "B S D"], dict[str, Array], dict[str, Array]]:
    """``mask_gradients`` of one layer, from a loss's gradient in the stream behind it.

    Args:
        weights: of the layer.
        x, gradient: [B, S, D], the stream before the layer, and the gradient behind it.
        mask: Bool[B, S].

    Returns:
        The gradient in the stream before the layer, and sums about its experts and its groups.
    """
    neurons, groups = _masks({0: layer})

    def sequence_gradient(item):
        x, behind, mask = (leaf[None] for leaf in item)
        positions = position_tables(config, mask.shape, mask.astype(jnp.int32))

        def run(neurons, groups, offsets, x):
            options = BlockOptions(_TAPS, backend, neurons.get(0), groups[0], *offsets)
            return block(weights, config, layer, x, positions, options)

        nothing = (jnp.zeros_like(x), jnp.zeros_like(x))
        _, pull, taps = jax.vjp(run, neurons, groups, nothing, x, has_aux=True)
        by_neuron, by_group, streams, before = pull(behind)
        of_attention, of_feed_forward = (d[0] * config.residual_scale for d in streams)
        shared, squares = _token_squares(
            weights, config, layer, taps, of_attention, of_feed_forward, backend
        )
        return (by_neuron, by_group, {0: shared}), {0: squares}, before[0]

    by_neuron, by_group, before = _over_sequences(sequence_gradient, (x, gradient, mask))
    return before, by_neuron.get(0, {}), by_group[0]


def _token_squares(
    weights, config: ModelConfig, layer: LayerConfig, taps, of_attention, of_feed_forward, backend
) -> tuple[tuple[Array, ...], tuple[dict[str, Array], dict[str, Array]]]:
    """Sums over a sequence's tokens of the squares of each one's gradients in masks of ones.

    ``sum_t (g_e h_ej W_ej . d)^2`` of neuron j with its down row ``W_ej``, the routing weight g_e
    and the loss's gradient d [D] in what the layer adds to the stream at token t: the empirical
    Fisher information in the neuron's mask, token by token. Of an expert, a group of heads or a
    shared neuron likewise. All are in the units of the loss, squared, and compare across a model.

    Args:
        weights, config, layer: one of the model's layers.
        taps: of its block, for one sequence.
        of_attention, of_feed_forward: [S, D], the loss's gradient in what each part adds.
        backend: of ``ops.grouped_matmul``.

    Returns:
        The gradient in a mask of a shared expert's neurons, [1, U], if there is one; and the
        squares: arrays of the layer's experts (none if it is dense), and of its attention.
    """
    mixed = taps["mixed"][0]
    kernel = weights["attention"]["out"]["kernel"].astype(mixed.dtype)
    pull = jnp.einsum("snh,nhd,sd->sn", mixed, kernel, of_attention, precision=_EXACT)
    by_group = pull.astype(jnp.float32).reshape(len(pull), layer.num_kv_heads, -1).sum(-1)
    attention = {"token_square": jnp.square(by_group).sum(0)}
    if not isinstance(layer.feed_forward, MoeConfig):
        return (), ({}, attention)
    experts = stack_experts(weights["moe"]["experts"], expert_leaves(config, layer))
    sizes, hidden = taps["group_sizes"], taps["hidden"]
    rows = of_feed_forward[taps["row_token"]] * taps["row_weight"][:, None].astype(hidden.dtype)
    down = jnp.swapaxes(experts["down"], 1, 2).astype(hidden.dtype)
    gradient = grouped_matmul(rows, down, sizes, backend)
    change = (hidden * gradient).astype(jnp.float32)
    all_three = jnp.concatenate(
        [change, gradient.astype(jnp.float32), change.sum(-1, keepdims=True)], 1
    )
    squares = grouped_outer(jnp.square(all_three), jnp.ones_like(change[:, :1]), sizes)[..., 0]
    width = hidden.shape[-1]
    found = {
        "token_square": squares[:, :width],
        "gradient_square": squares[:, width:-1],
        "expert_token_square": squares[:, -1],
    }
    if "shared_hidden" not in taps:
        return (), (found, attention)
    down = weights["moe"]["shared"]["down"].astype(hidden.dtype)
    gradient = jnp.dot(of_feed_forward, down.T, precision=_EXACT).astype(jnp.float32)
    change = taps["shared_hidden"][0].astype(jnp.float32) * gradient
    for name, values in (("token", change), ("gradient", gradient)):
        found[f"{SHARED}{name}_square"] = jnp.square(values).sum(0, keepdims=True)
    return (change.sum(0, keepdims=True),), (found, attention)


@functools.partial(jax.jit, static_argnames=("config", "backend"))
def expert_pulls(params, config: ModelConfig, batch, backend: str) -> ByLayer:
    """By layer with experts and token of a batch, what an expert's output does to the loss.

    ``<y_e, d>`` with an expert's output y_e before its routing weight, and the gradient d of the
    text's cross-entropy in what the layer adds to the stream; of the 2 K experts that the router
    ranks highest, which a token may go to once some are removed, and zero of the others.

    Returns:
        ``rerouting.pulls`` and ``rerouting.logits``, [T, E].
    """
    segment_ids = batch["mask"].astype(jnp.int32)
    labels, counted = next_token_labels(batch["tokens"], segment_ids)
    nothing = jnp.zeros((*batch["tokens"].shape, config.width), params["embed"]["embedding"].dtype)

    def total_loss(offsets):
        logits, aux = forward(
            params,
            config,
            batch["tokens"],
            segment_ids,
            ("feed_forward_input",),
            feed_forward_offsets=offsets,
            backend=backend,
        )
        mean, metrics = distill_loss(logits, logits, labels, counted, kind="lm")
        return mean * metrics["positions"], aux["layers"]

    offsets = dict.fromkeys(config.moe_layers, nothing)
    gradients, taps = jax.grad(total_loss, has_aux=True)(offsets)
    return {
        i: _pulls(
            params["layers"][i], config, config.layers[i], taps[i]["feed_forward_input"],
            gradients[i], backend,
        )
        for i in config.moe_layers
    }  # fmt: skip


@functools.partial(jax.jit, static_argnames=("config", "layer", "backend"))
def layer_pulls(
    weights, config: ModelConfig, layer: LayerConfig, x, gradient, mask, backend: str
) -> dict[str, Array]:
    """``expert_pulls`` of one layer with experts, from the arguments of ``layer_gradients``."""
    positions = position_tables(config, mask.shape, mask.astype(jnp.int32))
    options = BlockOptions(("feed_forward_input",), backend)
    _, taps = block(weights, config, layer, x, positions, options)
    return _pulls(weights, config, layer, taps["feed_forward_input"], gradient, backend)


def _pulls(
    weights, config: ModelConfig, layer: LayerConfig, x, gradient, backend: str
) -> dict[str, Array]:
    """Of a layer with experts that reads ``x``, from the gradient in what it adds to the stream."""
    moe = layer.moe
    count = min(2 * moe.experts_per_token, moe.num_experts)
    wide = dataclasses.replace(moe, experts_per_token=count)
    x = x.reshape(-1, config.width)
    options = BlockOptions(("output",), backend)
    _, aux = moe_layer(weights["moe"], wide, config.router, x, None, options)
    d = gradient.reshape(-1, 1, config.width).astype(jnp.float32) * config.residual_scale
    pulls = (aux["output"][aux["row"]].astype(jnp.float32) * d).sum(-1)
    token = jnp.arange(len(x))[:, None]
    every = jnp.zeros_like(aux["router_logits"]).at[token, aux["expert_ids"]].set(pulls)
    return {"rerouting.pulls": every, "rerouting.logits": aux["router_logits"]}
