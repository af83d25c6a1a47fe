"""What the weights alone tell about experts, neurons and key/value groups."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.statistics_table import SHARED


@jax.jit
def expert_weight_norms(moe) -> dict[str, Array]:
    """``router_norm`` [E] of each router row, and of neurons those of ``_neuron_norms``.

    By stored expert, [E_kept, F], and of a shared expert, [1, U], with the prefix ``shared_``.
    """
    kernel = moe["router"]["kernel"].astype(jnp.float32)
    norms = {"router_norm": jnp.sqrt(jnp.square(kernel).sum(0)), **_neuron_norms(moe["experts"])}
    if "shared" not in moe:
        return norms
    one = {name: moe["shared"][name][None] for name in ("gate", "up", "down")}
    return norms | {f"{SHARED}{name}": array for name, array in _neuron_norms(one).items()}


def _neuron_norms(experts) -> dict[str, Array]:
    """``weight_norm``, over a neuron's gate and up columns and its down row; ``down_norm`` and
    ``down_sum``, the Euclidean norm and the sum of magnitudes of the down row alone;
    ``weight_sum``, the sum of magnitudes of all three.
    """
    gate, up, down = (experts[name].astype(jnp.float32) for name in ("gate", "up", "down"))
    squares, sums = jnp.square(down).sum(2), jnp.abs(down).sum(2)
    return {
        "weight_norm": jnp.sqrt(jnp.square(gate).sum(1) + jnp.square(up).sum(1) + squares),
        "down_norm": jnp.sqrt(squares),
        "down_sum": sums,
        "weight_sum": jnp.abs(gate).sum(1) + jnp.abs(up).sum(1) + sums,
    }


@functools.partial(jax.jit, static_argnums=1)
def group_weight_norm(attention, num_groups: int) -> Float[Array, " G"]:
    """Norm over the projections of each group's heads; a group's heads are consecutive."""
    squares = sum(
        jnp.square(jnp.moveaxis(leaf, heads, 0).astype(jnp.float32)).reshape(num_groups, -1).sum(1)
        for name, heads in _OF_HEADS.items()
        for leaf in attention.get(name, {}).values()
        if leaf.ndim > 1  # not the bias of the output
    )
    return jnp.sqrt(squares)


# Projections -> the axis of their heads, of kernels and, counted from the end, of biases.
_OF_HEADS = {"query": -2, "query_up": -2, "key": -2, "value": -2, "key_value": -2, "out": -3}
