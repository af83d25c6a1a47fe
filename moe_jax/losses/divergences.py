"""Divergences of student and teacher over the whole vocabulary."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.losses.masked import log_softmax, masked_sum


def forward_kl(
    student: Float[Array, "*N V"],
    teacher: Float[Array, "*N V"],
    mask: Bool[Array, "*N"],
    temperature: float = 1.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """``T^2 KL(teacher || student)`` over the whole vocabulary (arXiv 1503.02531, section 2)."""
    log_p, log_q = (log_softmax(logits, mask, temperature) for logits in (teacher, student))
    return masked_sum(temperature**2 * kl(log_p, log_q), mask)


def reverse_kl(
    student: Float[Array, "*N V"],
    teacher: Float[Array, "*N V"],
    mask: Bool[Array, "*N"],
    temperature: float = 1.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """``T^2 KL(student || teacher)``, position by position (MiniLLM, arXiv 2306.08543, eq. 1)."""
    return forward_kl(teacher, student, mask, temperature)


def jensen_shannon(
    student: Float[Array, "*N V"],
    teacher: Float[Array, "*N V"],
    mask: Bool[Array, "*N"],
    beta: float = 0.5,
    temperature: float = 1.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649, eq. 1), times ``T^2``.

    ``beta KL(P || M) + (1 - beta) KL(Q || M)`` with ``M = beta P + (1 - beta) Q``, P the teacher
    and Q the student. At most ``ln 2``. Divided by ``beta`` it tends to the forward KL as ``beta``
    tends to 0, and divided by ``1 - beta`` to the reverse KL as ``beta`` tends to 1.

    Raises:
        ValueError: ``beta`` outside ``(0, 1)``.
    """
    check_beta(beta)
    log_p, log_q = (log_softmax(logits, mask, temperature) for logits in (teacher, student))
    log_m = jnp.logaddexp(math.log(beta) + log_p, math.log1p(-beta) + log_q)
    loss = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    return masked_sum(temperature**2 * loss, mask)


def kl(log_p, log_q):
    """``KL(p || q)`` over the last axis."""
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def check_beta(beta: float) -> None:
    if not 0 < beta < 1:
        raise ValueError(f"beta must be in (0, 1), got {beta}")
