"""Parts of arrays, jitted, laid out over devices as the whole was."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from moe_jax.params import NEURON_AXIS


def take(leaf: Array, index: np.ndarray, axis: int) -> Array:
    """The entries at these indices; the leaf itself if these are all, in order."""
    if np.array_equal(index, np.arange(leaf.shape[axis])):
        return leaf
    return placed_like(_jit_take(leaf, index, axis), leaf)


def fit_neurons(experts: Mapping[str, Array], index: Int[np.ndarray, "E W"]) -> dict[str, Array]:
    """Each expert's own neurons at its indices; zeros where one is past the end."""
    fitted = {}
    for name, leaf in experts.items():
        axis = NEURON_AXIS[name]
        along = np.expand_dims(index, 3 - axis)
        fitted[name] = placed_like(_jit_take_or_zero(leaf, along, axis), leaf)
    return fitted


def put(leaf: Array, index: np.ndarray, new: Array, axis: int) -> Array:
    """The leaf with other entries at these indices, in its own dtype."""
    return placed_like(_jit_put(leaf, index, new, axis), leaf)


def placed_like(new: Array, old: Array) -> Array:
    """Keeps a NamedSharding, so that pruning a sharded model gives one."""
    sharding = getattr(old, "sharding", None)
    return jax.device_put(new, sharding) if isinstance(sharding, NamedSharding) else new


_jit_take = jax.jit(lambda leaf, index, axis: jnp.take(leaf, index, axis), static_argnums=2)
_jit_take_or_zero = jax.jit(
    lambda leaf, index, axis: jnp.take_along_axis(leaf, index, axis, mode="fill", fill_value=0),
    static_argnums=2,
)
_jit_put = jax.jit(
    lambda leaf, index, new, axis: jnp.moveaxis(
        jnp.moveaxis(leaf, axis, 0).at[index].set(jnp.moveaxis(new, axis, 0).astype(leaf.dtype)),
        0,
        axis,
    ),
    static_argnums=3,
)
