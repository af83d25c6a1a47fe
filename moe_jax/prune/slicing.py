"""Parts of arrays, chosen by the letters of their axes, laid out over devices as the whole was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from moe_jax.params import Leaf, stack_experts


def cut_leaves(leaves: Any, weights: Any, index: Mapping[str, np.ndarray]) -> Any:
    """What a cut keeps of a model, or of a part of one.

    Args:
        leaves: the abstract tree of ``weights``, of which the axes are read.
        weights: arrays; experts of a layer are stacked.
        index: by letter of ``params.AXES``, which entries stay along every axis of that letter, in
            their new order. That of ``F`` is ``[E, W]``: each expert's own neurons, of the experts
            that ``E`` leaves; where a number is past the end there are zeros.

    Returns:
        Arrays of which everything stays are the ones in ``weights``.
    """

    def cut(leaf: Leaf, array: Array) -> Array:
        for axis, letter in enumerate(leaf.axes):
            if letter in index and letter != "F":
                array = take(array, index[letter], axis)
        if "F" in index and "F" in leaf.axes:
            array = _take_neurons(array, index["F"], leaf.axes)
        return array

    return jax.tree.map(cut, leaves, weights)


def stacked(leaves: dict[str, Any], weights: dict[str, Any]) -> tuple[dict, dict]:
    """A layer whose experts lie in one array a name, whatever their widths, and its leaves."""
    if not isinstance(weights.get("moe", {}).get("experts"), list):
        return leaves, weights
    widest = leaves["moe"]["experts"][0]
    experts = stack_experts(weights["moe"]["experts"], widest)
    return (
        {**leaves, "moe": {**leaves["moe"], "experts": widest}},
        {**weights, "moe": {**weights["moe"], "experts": experts}},
    )


def neuron_index(
    kept: Sequence[Sequence[int]], width: int, stored_width: int
) -> Int[np.ndarray, "E W"]:
    """Which neurons each expert keeps of ``width``, ascending, then past the end up to the stored.

    Args:
        kept: neurons of each expert.
        width: of the experts as they are.
        stored_width: of the experts as they will be.
    """
    index = np.full((len(kept), stored_width), width)
    for row, neurons in zip(index, kept, strict=True):
        row[: len(neurons)] = sorted(neurons)
    return index


def take(array: Array, index: np.ndarray, axis: int) -> Array:
    """The entries at these indices; the array itself if these are all, in order."""
    if np.array_equal(index, np.arange(array.shape[axis])):
        return array
    return placed_like(_jit_take(array, index, axis), array)


def put(array: Array, index: np.ndarray, new: Array, axis: int) -> Array:
    """The array with other entries at these indices, in its own dtype."""
    return placed_like(_jit_put(array, index, new, axis), array)


def placed_like(new: Array, old: Array) -> Array:
    """``new`` where ``old`` lies on a mesh, so that pruning a sharded model gives a sharded one."""
    sharding = getattr(old, "sharding", None)
    return jax.device_put(new, sharding) if isinstance(sharding, NamedSharding) else new


def _take_neurons(array: Array, index: Int[np.ndarray, "E W"], axes: str) -> Array:
    experts, neurons = axes.index("E"), axes.index("F")
    ordered = index if experts < neurons else index.T
    others = tuple(axis for axis in range(len(axes)) if axis not in (experts, neurons))
    along = np.expand_dims(ordered, others)
    return placed_like(_jit_take_or_zero(array, along, neurons), array)


_jit_take = jax.jit(lambda array, index, axis: jnp.take(array, index, axis), static_argnums=2)
_jit_take_or_zero = jax.jit(
    lambda array, index, axis: jnp.take_along_axis(array, index, axis, mode="fill", fill_value=0),
    static_argnums=2,
)
_jit_put = jax.jit(
    lambda array, index, new, axis: jnp.moveaxis(
        jnp.moveaxis(array, axis, 0).at[index].set(jnp.moveaxis(new, axis, 0).astype(array.dtype)),
        0,
        axis,
    ),
    static_argnums=3,
)
