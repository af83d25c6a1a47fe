"""Weights that stay on disk: parameters that are read when they are wanted, layer after layer.

A stored model is a tree shaped as ``params`` whose leaves are ``StoredLeaf``. What walks over its
layers takes ``params["layers"]`` of ``in_turn``: each layer is read when its turn comes, while the
operating system already reads the next one, and is gone when the caller lets go of it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

_ALIGNMENT = 64  # bytes, of the memory of arrays


class StoredLeaf:
    """A parameter on disk. ``np.asarray`` reads it, anew each time.

    Attributes:
        shape, dtype: of what is read.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        read: Callable[[tuple[slice, ...]], np.ndarray],
        prefetch: Callable[[], None] = lambda: None,
    ) -> None:
        """``read`` takes a window: where it begins and ends along every axis.

        ``prefetch`` asks the operating system to have the bytes at hand, and returns at once.
        """
        self.shape, self.dtype, self._read, self.prefetch = shape, np.dtype(dtype), read, prefetch

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """All of it, or a part without steps."""
        index = (slice(None),) * self.ndim if index is None else index
        sizes = zip(index, self.shape, strict=True)
        return self._read(tuple(slice(*part.indices(size)[:2]) for part, size in sizes))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # every array is new
        array = self.read()
        return array if dtype is None else array.astype(dtype)


def is_stored(params: Any) -> bool:
    """Whether any of these weights lie on disk."""
    return any(isinstance(leaf, StoredLeaf) for leaf in jax.tree.leaves(params))


def aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array that JAX on a CPU can use where it is, rather than copy."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def in_memory(tree: Any, places: Any = None, *, passing: bool = False) -> Any:
    """A part of a model on its devices: what is stored is read, once if it stands in two places.

    Args:
        tree: of leaves, stored or not.
        places: shardings of them; a process then reads what its own devices hold. None: all goes to
            the default device.
        passing: the arrays are read and let go, and given to no program that takes their memory
            over: on a CPU they are then not copied.
    """
    if places is not None:
        return jax.tree.map(_placed, tree, places)

    if passing:
        gc.collect(0)  # with which JAX lets go of the memory of arrays that are gone

    found: dict[int, jax.Array] = {}

    def read(leaf: Any) -> Any:
        if not isinstance(leaf, StoredLeaf):
            return leaf
        if id(leaf) not in found:
            found[id(leaf)] = jax.device_put(leaf.read(), may_alias=passing)
        return found[id(leaf)]

    return jax.tree.map(read, tree)


def _placed(leaf: StoredLeaf, place: jax.sharding.Sharding) -> jax.Array:
    parts: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        # Devices that hold the same part share what is read of it.
        if str(index) not in parts:
            parts[str(index)] = leaf.read(index)
        return parts[str(index)]

    return jax.make_array_from_callback(leaf.shape, place, part)


class LayersInTurn(Sequence):
    """The layers of a stored model: to index one is to read it, and to prefetch the next one.

    The next one is that behind it, or before it for who goes backwards.
    """

    def __init__(self, layers: Sequence[dict[str, Any]]) -> None:
        self._layers, self._last = layers, -1

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, i: Any) -> Any:
        found = in_memory(self._layers[i], passing=True)
        following, self._last = (i + 1 if i >= self._last else i - 1), i
        for leaf in jax.tree.leaves(self._layers[following]) if 0 <= following < len(self) else ():
            if isinstance(leaf, StoredLeaf):
                leaf.prefetch()
        return found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))


def in_turn(params: dict[str, Any]) -> dict[str, Any]:
    """The same weights, of which each layer is read when it is asked for."""
    return {**params, "layers": LayersInTurn(params["layers"])} if is_stored(params) else params
