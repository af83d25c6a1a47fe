"""What the weights alone tell about experts, neurons and key/value groups."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.jit
def expert_weight_norms(moe) -> dict[str, Array]:
    """``router_norm`` [E] of each router row, and by stored expert, [E_kept, F]:

    ``weight_norm``, over a neuron's gate and up columns and its down row; ``down_norm`` and
    ``down_sum``, the Euclidean norm and the sum of magnitudes of the down row alone.
    """
    gate, up, down = (moe["experts"][name].astype(jnp.float32) for name in ("gate", "up", "down"))
    squares = jnp.square(down).sum(2)
    kernel = moe["router"]["kernel"].astype(jnp.float32)
    return {
        "weight_norm": jnp.sqrt(jnp.square(gate).sum(1) + jnp.square(up).sum(1) + squares),
        "down_norm": jnp.sqrt(squares),
        "down_sum": jnp.abs(down).sum(2),
        "router_norm": jnp.sqrt(jnp.square(kernel).sum(0)),
    }


@functools.partial(jax.jit, static_argnums=1)
def group_weight_norm(attention, num_groups: int) -> Float[Array, " G"]:
    """Norm over the projections of each group's heads; a group's heads are consecutive."""
    by_head = [
        jnp.moveaxis(leaf, -2, 0)  # [D, heads, H] or, of a bias, [heads, H]
        for name in ("query", "key", "value")
        for leaf in attention[name].values()
    ]
    squares = sum(
        jnp.square(leaf.astype(jnp.float32)).reshape(num_groups, -1).sum(1)
        for leaf in (*by_head, attention["out"]["kernel"])
    )
    return jnp.sqrt(squares)
