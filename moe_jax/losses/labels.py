"""The tokens that follow, and their cross-entropy."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.losses.masked import log_softmax_at, masked_sum


def next_token_labels(
    tokens: Int[Array, "B S"], segment_ids: Int[Array, "B S"]
) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """The token that follows each position, and where it exists within the same segment."""
    labels = jnp.roll(tokens, -1, axis=1)
    following = jnp.roll(segment_ids, -1, axis=1).at[:, -1].set(0)
    return labels, (segment_ids > 0) & (following == segment_ids)


def cross_entropy(
    logits: Float[Array, "*N V"], labels: Int[Array, "*N"], mask: Bool[Array, "*N"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of ``-log p(label)`` over the mask, in nats, and the number of positions."""
    return masked_sum(-log_softmax_at(logits, labels[..., None], mask)[..., 0], mask)
