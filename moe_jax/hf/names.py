"""Which part of which tensor on disk is which part of which leaf.

A family's table is expanded, for one ModelConfig and one layout, into pieces: the smallest units
that are copied between disk and host. A stacked leaf is one piece per expert, so that reading and
writing need no more host memory than a leaf and a tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_jax.config import ModelConfig, MoeConfig
from moe_jax.hf.family import Family
from moe_jax.hf.layouts import Stored, TensorTable, copy_transposed
from moe_jax.params import Leaf, abstract_params, leaves_with_path, path_name


@dataclass(frozen=True)
class Piece:
    """A region of a tensor on disk and the part of a leaf that it holds.

    Attributes:
        path: of the leaf.
        row: index into the leaf's first axis, or None for the whole leaf.
        shape: of that part of the leaf.
        key, key_shape: the tensor on disk.
        entry: index into its first axis if it stacks all experts of a layer, else None.
        region: index of the part of it, or of that entry.
        matrix: (in, out) if the region is stored transposed, as ``[out, in]``; else None.
        input_axes: how many of the first axes of ``shape`` are a matrix's input.
    """

    path: tuple
    row: int | None
    shape: tuple[int, ...]
    key: str
    key_shape: tuple[int, ...]
    entry: int | None = None
    region: tuple[Any, ...] = ()
    matrix: tuple[int, int] | None = None
    input_axes: int = 1

    def read(self, tensor: np.ndarray, part: np.ndarray, window: tuple[slice, ...]) -> None:
        """Copies ``window`` of what a tensor, or its entry, holds of the leaf to ``part``; casts.

        Args:
            part: contiguous.
            window: of the dimensions of ``shape``; what is outside of it is not touched.
        """
        stored = tensor[self.region]
        if self.matrix is None:
            part[...] = stored.reshape(self.shape)[window]
        elif part.shape == self.shape:
            copy_transposed(stored, part.reshape(self.matrix))
        elif self.matrix == self.shape:
            copy_transposed(stored[window[::-1]], part)
        else:
            part[...] = stored.T.reshape(self.shape)[window]

    def write(self, leaf: np.ndarray, tensor: np.ndarray) -> None:
        """Copies from the whole leaf into the tensor, and casts."""
        part = leaf if self.row is None else leaf[self.row]
        whole = tensor if self.entry is None else tensor[self.entry]
        stored = whole[self.region]
        if self.matrix is None:
            stored[...] = part.reshape(stored.shape)
        else:
            copy_transposed(part.reshape(self.matrix), stored)


def expand(row: Family, config: ModelConfig, layout: str) -> list[Piece]:
    """All pieces of a model in the order of its leaves.

    Raises:
        ValueError: the family has no name for a leaf, or the layout none for novices, for experts
            that differ in width, or for the constants that experts add.
    """
    table = row.layouts[layout]
    pieces: list[Piece] = []
    for path, leaf in leaves_with_path(abstract_params(config)):
        stored = _stored(table, path)
        if stored is None:
            raise ValueError(
                f"{row.model_type}: layout {layout!r} has no tensor name for {path_name(path)}"
            )
        pieces += _pieces_of_leaf(config, path, leaf, stored)
    return pieces


def _stored(table: TensorTable, path: tuple) -> Stored | None:
    """Where a leaf lies, or None if the layout cannot hold it."""
    if path[0] != "layers":
        return table.get(path_name(path))
    stored = table.get(path_name(("layers", "{layer}", *without_bucket(path)[2:])))
    # A tensor that stacks all experts of a layer has room for one width only.
    if stored is not None and _bucket(path) is not None and stored.form.stacked:
        return None
    return stored


def _bucket(path: tuple) -> int | None:
    """Index of the bucket in the path of a leaf of experts that differ in width."""
    return next((part for part in path[2:] if isinstance(part, int)), None)


def without_bucket(path: tuple) -> tuple:
    """The path of a leaf without the index of its bucket, if it has one."""
    return (*path[:2], *(part for part in path[2:] if not isinstance(part, int)))


def _owners(moe: MoeConfig, path: tuple) -> tuple[int, ...]:
    """Ids of the experts or novices whose rows a leaf stacks."""
    if "novices" in path:
        return moe.novice_ids
    bucket = _bucket(path)
    return moe.expert_ids if bucket is None else moe.buckets[bucket].expert_ids


def _pieces_of_leaf(
    config: ModelConfig, path: tuple, leaf: Leaf, stored: Stored
) -> Iterator[Piece]:
    name, form = stored
    own_tensors = "{expert}" in name or "{novice}" in name
    by_row = own_tensors or form.stacked
    shape = leaf.shape[1:] if by_row else leaf.shape
    tensor_shape = form.tensor_shape(shape)
    how = (form.region(shape), form.matrix(shape), form.input_axes(shape))
    if not by_row:
        yield Piece(path, None, shape, name.format(layer=path[1]), tensor_shape, None, *how)
        return
    moe = config.moe(path[1])
    for row, owner in enumerate(_owners(moe, path)):
        key = name.format(layer=path[1], expert=owner, novice=owner)
        whole = (moe.num_experts, *tensor_shape) if form.stacked else tensor_shape
        entry = owner if form.stacked else None
        yield Piece(path, row, shape, key, whole, entry, *how)


def tied_head(row: Family, config: ModelConfig, layout: str) -> Piece | None:
    """The output head of a model with tied embeddings, for files that store it all the same."""
    if not config.tied_embeddings:
        return None
    shape = (config.vocab_size, config.width)
    name = row.layouts[layout]["lm_head.kernel"].name
    return Piece(("embed", "embedding"), None, shape, name, shape)


def detect_layout(row: Family, config: ModelConfig, keys: Iterable[str]) -> str:
    """The layout that accounts for most of ``keys``; of those that can hold the model the first.

    All layers are stored alike: those up to the first one with experts are looked at.
    """
    present = set(keys)
    paths = [path for path, _ in leaves_with_path(abstract_params(config))]
    usable = [
        name for name, table in row.layouts.items() if all(_stored(table, path) for path in paths)
    ]
    first = next(iter(config.moe_layers), 0) + 1
    part = dataclasses.replace(config, layers=config.layers[:first])
    return max(
        usable or [row.default_layout],
        key=lambda name: len(present & {piece.key for piece in expand(row, part, name)}),
    )
