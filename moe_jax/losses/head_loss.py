"""A loss over the vocabulary that never holds the logits of more than one chunk of tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# loss(head, hidden, per_token, constants) -> sums over tokens
Loss = Callable[[Any, Array, dict[str, Any], Any], dict[str, Array]]


def head_loss(
    loss: Loss,
    head: Any,
    hidden: Float[Array, "T D"],
    per_token: dict[str, Any],
    constants: Any = None,
    *,
    chunk_tokens: int = 0,
) -> dict[str, Float[Array, ""]]:
    """The sums that ``loss`` returns, added up over chunks of tokens.

    A differentiated call computes each chunk's loss and gradients together, and keeps the gradients
    only: the backward pass scales them, and nothing is computed twice. Memory is that of
    ``chunk_tokens * V`` logits (the student's, and the teacher's if ``loss`` makes them) instead of
    ``T * V``, beside a float32 gradient of ``head`` and the gradient of ``hidden``. The idea is
    that of the fused linear cross-entropy of Liger Kernel (arXiv 2410.10989).

    Args:
        loss: ``(head, hidden [N, D], per_token of N tokens, constants) -> {name: scalar}``, sums
            over the tokens where ``per_token["mask"]`` holds. It must not close over anything that
            is differentiated.
        head: weights, a pytree; differentiated.
        hidden: the last hidden states; differentiated.
        per_token: arrays with leading axis T, such as labels or the teacher's hidden states, among
            them ``mask``, boolean.
        constants: arrays that every chunk needs, such as the teacher's head.
        chunk_tokens: most tokens per chunk; 0: all of them. Best a divisor of T, and a multiple
            of the devices that share the tokens: what is missing is padding, with mask False.

    Returns:
        The sums. ``total`` alone has a gradient, in ``head`` and ``hidden`` and in their dtypes.

    Raises:
        ValueError: ``chunk_tokens`` below 0, no boolean ``mask``, leading axes other than T, or a
            loss without ``total``.
    """
    if chunk_tokens < 0:
        raise ValueError(f"chunk_tokens must be at least 0, got {chunk_tokens}")
    num_tokens = hidden.shape[0]
    mask = per_token.get("mask")
    if mask is None or mask.dtype != jnp.bool_:
        raise ValueError(f"per_token must hold a boolean 'mask', got {_shapes(per_token)}")
    if any(leaf.shape[:1] != (num_tokens,) for leaf in jax.tree.leaves(per_token)):
        raise ValueError(f"per_token must have leading axes {num_tokens}, got {_shapes(per_token)}")
    # Chunks of equal size, so that less than one token in each is padding.
    num_chunks = -(-num_tokens // chunk_tokens) if chunk_tokens else 1
    with jax.named_scope("head_loss"):
        return _chunked(loss, max(num_chunks, 1), head, hidden, per_token, constants)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(loss: Loss, num_chunks: int, head, hidden, per_token, constants):
    chunk = _chunks(num_chunks, hidden, per_token)

    def step(_, i):
        hidden, per_token = chunk(i)
        return None, _sums(loss, head, hidden, per_token, constants)

    _, sums = jax.lax.scan(step, None, jnp.arange(num_chunks))
    return {name: each.sum(0) for name, each in sums.items()}


def _forward(loss: Loss, num_chunks: int, head, hidden, per_token, constants):
    chunk = _chunks(num_chunks, hidden, per_token)

    def step(total_gradient, i):
        def total(head, hidden, per_token):
            sums = _sums(loss, head, hidden, per_token, constants)
            return sums["total"], sums

        (gradient, hidden_gradient), sums = jax.grad(total, (0, 1), has_aux=True)(head, *chunk(i))
        return jax.tree.map(jnp.add, total_gradient, gradient), (hidden_gradient, sums)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), head)
    gradient, (by_chunk, sums) = jax.lax.scan(step, zeros, jnp.arange(num_chunks))
    hidden_gradient = by_chunk.swapaxes(0, 1).reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    sums = {name: each.sum(0) for name, each in sums.items()}
    return sums, (head, gradient, hidden_gradient)


def _backward(loss: Loss, num_chunks: int, saved, cotangents):
    head, gradient, hidden_gradient = saved
    scale = cotangents["total"]
    scaled = jax.tree.map(lambda leaf, g: (scale * g).astype(leaf.dtype), head, gradient)
    return scaled, (scale * hidden_gradient).astype(hidden_gradient.dtype), None, None


_chunked.defvjp(_forward, _backward)


def _sums(loss: Loss, head, hidden, per_token, constants) -> dict[str, Array]:
    sums = loss(head, hidden, per_token, constants)
    if "total" not in sums:
        raise ValueError(f"loss must return a 'total', got {sorted(sums)}")
    return sums


def _chunks(num_chunks: int, hidden, per_token):
    """A function from i to the tokens i, i + num_chunks, ..., padded with zeros.

    Strided: tokens that are sharded over devices then lie, in every chunk, on all of the devices.
    """

    def padded(leaf):
        pad = [(0, -leaf.shape[0] % num_chunks)] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.pad(leaf, pad).reshape(-1, num_chunks, *leaf.shape[1:])

    tree = jax.tree.map(padded, (hidden, per_token))
    return lambda i: jax.tree.map(lambda leaf: leaf[:, i], tree)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(jnp.shape, tree)
