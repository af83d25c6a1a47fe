"""Repair of all experts of a layer, at once or in turn."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import ArrayLike
from jaxtyping import Array

# Experts of one device are worked on together while their matrices take no more than this.
_MOST_BYTES = 1 << 28


def over_experts(function: Callable[..., Array], grams: ArrayLike, *stacked: Array) -> Array:
    """``function(gram, ...)`` of every expert: ``grams [E, N, N]`` and arrays stacked alike.

    Many small experts at once, large ones in turn; all of them at once if any array is sharded, so
    that each device does its own.
    """
    grams = jnp.asarray(grams)
    spread = any(
        isinstance(getattr(leaf, "sharding", None), NamedSharding) and len(leaf.devices()) > 1
        for leaf in stacked
    )
    together = len(grams) if spread else max(1, _MOST_BYTES // (4 * grams[0].size))
    return _over_experts(function, min(together, len(grams)), grams, *stacked)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _over_experts(function, together: int, grams, *stacked):
    if together == len(grams):
        return jax.vmap(function)(grams, *stacked)
    items = (grams, *stacked)
    return jax.lax.map(lambda item: function(*item), items, batch_size=together)
