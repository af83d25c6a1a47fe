"""Repair of all experts of a layer, at once or in turn."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from moe_jax.processes import mesh_of

# Experts of one device are worked on together while their matrices take no more than this.
_MOST_BYTES = 1 << 28
_BY_EXPERT = PartitionSpec("expert")


def over_experts(
    function: Callable[..., Array], grams: Array | np.ndarray, *stacked: Array
) -> Array:
    """``function(gram, ...)`` of every expert: ``grams [E, N, N]`` and arrays stacked alike.

    Many small experts at once, large ones in turn. If the first array lies on a mesh, each device
    gets the matrices of its own experts, and works on these.
    """
    mesh, items = mesh_of(stacked), (grams, *stacked)
    own, size, _ = grams.shape
    if mesh is not None and own % mesh.shape["expert"]:  # a few of a layer's experts alone
        items = jax.device_put(items, NamedSharding(mesh, PartitionSpec()))
        mesh = None
    if mesh is not None:
        items = jax.device_put(items, NamedSharding(mesh, _BY_EXPERT))
        own //= mesh.shape["expert"]
    together = max(1, _MOST_BYTES // (4 * size * size))
    return _over_experts(function, min(together, own), mesh, *items)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _over_experts(function, together: int, mesh, *items):
    def run(*items):
        if together == len(items[0]):
            return jax.vmap(function)(*items)
        return jax.lax.map(lambda item: function(*item), items, batch_size=together)

    if mesh is None:
        return run(*items)
    return jax.shard_map(
        run, mesh=mesh, in_specs=_BY_EXPERT, out_specs=_BY_EXPERT, check_vma=False
    )(*items)
