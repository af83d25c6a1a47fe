"""Losses of one layer: its hidden states and its router."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.losses.divergences import forward_kl
from moe_jax.losses.masked import check_one_shape, masked_sum, zero_masked

# Keeps the distance of a zero state finite; far below the square norm of any other.
_EPS = 1e-6


def hidden_distance(
    student: Float[Array, "*N D"], teacher: Float[Array, "*N D"], mask: Bool[Array, "*N"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of ``||s - t||^2 / (||t||^2 + 1e-6)`` over the mask; no gradient reaches the teacher.

    Relative, since hidden states grow with depth, and token by token, since a sum of ratios adds
    up over shards where a ratio of sums does not.

    Raises:
        ValueError: different shapes.
    """
    check_one_shape("hidden states", student, teacher)
    s, t = zero_masked(student, mask), zero_masked(jax.lax.stop_gradient(teacher), mask)
    return masked_sum(jnp.square(s - t).sum(-1) / (jnp.square(t).sum(-1) + _EPS), mask)


def router_kl(
    student: Float[Array, "*N E"], teacher: Float[Array, "*N E"], mask: Bool[Array, "*N"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """``KL(teacher || student)`` of two routers' softmaxes; no gradient reaches the teacher.

    Router KD (arXiv 2603.02217) recovers a compressed model by training its routers alone, on
    the teacher's next-token distribution; this matches each layer's routing itself, position by
    position.

    Raises:
        ValueError: different shapes, so routers over different experts.
    """
    check_one_shape("router logits", student, teacher)
    return forward_kl(student, jax.lax.stop_gradient(teacher), mask)


def balance_loss(
    router_logits: Float[Array, "T E"],
    expert_ids: Int[Array, "T K"],
    valid: Bool[Array, " T"],
) -> Float[Array, ""]:
    """Load-balancing loss ``E sum_e f_e P_e`` of one layer (arXiv 2101.03961, eqs. 4-6).

    ``f_e`` is the share of (token, slot) pairs sent to expert e and ``P_e`` its mean softmax
    probability, over valid tokens; 1 when routing is uniform.
    """
    num_experts = router_logits.shape[-1]
    count = jnp.maximum(valid.sum(), 1)
    weights = jnp.broadcast_to(valid[:, None], expert_ids.shape).astype(jnp.float32)
    sent = jnp.zeros(num_experts).at[expert_ids].add(weights) / (count * expert_ids.shape[-1])
    probability = jax.nn.softmax(zero_masked(router_logits, valid), -1)
    probability = jnp.where(valid[:, None], probability, 0).sum(0) / count
    return num_experts * (jax.lax.stop_gradient(sent) * probability).sum()
