"""Sums over the positions that count, whatever the others hold."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def masked_sum(
    loss: Float[Array, "*N"], mask: Bool[Array, "*N"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of ``loss`` over the mask, and the number of positions."""
    return jnp.where(mask, loss, 0).sum(), mask.sum().astype(jnp.float32)


def zero_masked(values: Float[Array, "*N D"], mask: Bool[Array, "*N"]) -> Float[Array, "*N D"]:
    """Float32, with zeros where masked.

    Needed before the loss as well as after it: in a gradient, a masked NaN times 0 is NaN.
    """
    return jnp.where(mask[..., None], values.astype(jnp.float32), 0)


def log_softmax(
    logits: Float[Array, "*N V"], mask: Bool[Array, "*N"], temperature: float = 1.0
) -> Float[Array, "*N V"]:
    """Of ``logits / temperature``, in float32; zeros where masked."""
    logits = logits.astype(jnp.float32) / temperature
    return jnp.where(mask[..., None], logits - _logsumexp(logits, mask)[..., None], 0)


def log_softmax_at(
    logits: Float[Array, "*N V"],
    ids: Int[Array, "*N K"],
    mask: Bool[Array, "*N"],
    temperature: float = 1.0,
) -> Float[Array, "*N K"]:
    """``log_softmax`` at ``ids``, without its ``[N, V]`` array: the logits are gathered."""
    logits = logits.astype(jnp.float32) / temperature
    chosen = jnp.take_along_axis(logits, ids, -1) - _logsumexp(logits, mask)[..., None]
    return jnp.where(mask[..., None], chosen, 0)


@jax.custom_jvp
def _logsumexp(logits, mask):
    """With gradient 0 where masked, and so no masked copy of the logits that has to be made."""
    return jax.nn.logsumexp(logits, -1)


@_logsumexp.defjvp
def _logsumexp_jvp(primals, tangents):
    (logits, mask), (change, _) = primals, tangents
    total = _logsumexp(logits, mask)
    softmax = jnp.where(mask[..., None], jnp.exp(logits - total[..., None]), 0)
    return total, (softmax * change).sum(-1)


def check_one_shape(what: str, student, teacher) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher {what} must have one shape, got {student.shape} and "
            f"{teacher.shape}"
        )
