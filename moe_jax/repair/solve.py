"""Least-squares repair: the rows that stay take over what they can of those that went."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.repair.removal import RIDGE, unit_diagonal

_EXACT = jax.lax.Precision.HIGHEST


@jax.jit
def repaired_down(
    gram: Float[Array, "N N"],
    down: Float[Array, "N D"],
    kept: Bool[Array, " N"],
    ridge: float | Float[Array, ""] = RIDGE,
    gap: Float[Array, "N D"] | None = None,
) -> Float[Array, "N D"]:
    """The rows ``kept`` such that the gate-weighted squared error of the output is least.

    ``W_S + (G_SS + ridge diag(G_SS))^-1 G_SR W_R`` for kept rows S and removed rows R: with no
    ridge the minimum, and the identity if nothing is removed, with any ridge (which pulls towards
    the weights as they were, not towards zero). Without tokens (all second moments 0) the kept
    rows stay as they were; with fewer than kept rows the ridge decides what those leave open.

    Args:
        gram: second moments of the activations, and in a last row and column those with 1 if the
            expert has a constant.
        down: the down-projection, and in a last row the constant if there is one.
        kept: which rows stay; the others come back as zeros.
        ridge: added to the diagonal, as a share of it.
        gap: ``sum g^2 h c^T`` with what the output should change by, ``c``, beside making up for
            what goes: the solution gains ``(G_SS + ridge diag(G_SS))^-1 gap_S``.
    """
    scaled, scale = unit_diagonal(gram, ridge)
    inside = kept[:, None] & kept
    # Removed rows become rows of the identity: one shape, whatever is kept.
    matrix = jnp.where(inside, scaled, jnp.eye(len(kept), dtype=scaled.dtype))
    lost = jnp.where(kept[:, None], 0, down.astype(scaled.dtype) * scale[:, None])
    pull = jnp.dot(scaled, lost, precision=_EXACT)
    safe = jnp.where(scale > 0, scale, jnp.inf)
    if gap is not None:
        pull = pull + gap / safe[:, None]
    pull = jnp.where(kept[:, None], pull, 0)
    taken_over = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(matrix), True), pull)
    return jnp.where(kept[:, None], down + (taken_over / safe[:, None]).astype(down.dtype), 0)
