"""Layers behind the last one, for predicting further tokens (MTP), cut as the last one was.

They are no part of the model. Their tensors are those of a layer like the last one, and some of
their own beside (``hf.reader.further_tensors``), which no cut concerns.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.hf import folder as folders
from moe_jax.hf.families import find_family
from moe_jax.hf.names import Piece, detect_layout, expand
from moe_jax.hf.reader import further_tensors, stored_leaves
from moe_jax.hf.safetensors_file import TensorInfo
from moe_jax.lineage import Lineage, Origin, gathered
from moe_jax.params import abstract_params, leaves_with_path
from moe_jax.stored import StoredLeaf

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


class FurtherLayers(NamedTuple):
    """The further layers of a checkpoint.

    Attributes:
        config: the architecture with them as its last layers.
        pieces: of their leaves.
        beside: their other tensors.
    """

    config: ModelConfig
    pieces: list[Piece]
    beside: dict[str, TensorInfo]


def read_further(
    config: ModelConfig, folder: Path, infos: Mapping[str, TensorInfo]
) -> FurtherLayers:
    """The further layers of a checkpoint.

    Args:
        config, infos: its architecture and tensors.

    Raises:
        ValueError: they are not like its last layer.
    """
    found = further_tensors(folders.read_config_file(folder), infos)
    row = find_family(config.family)
    layers = {match[1] for key in found if (match := _LAYER.match(key))}
    longer = dataclasses.replace(config, layers=config.layers + config.layers[-1:] * len(layers))
    pieces = [
        piece
        for piece in expand(row, longer, detect_layout(row, config, infos))
        if piece.path[0] == "layers" and piece.path[1] >= config.num_layers
    ]
    for piece in pieces:
        shape = found[piece.key].shape if piece.key in found else "no such tensor"
        if shape != piece.key_shape:
            raise ValueError(
                f"{folder}: layers for further tokens are cut where they are like the last layer: "
                f"{piece.key} must have shape {piece.key_shape}, got {shape}"
            )
    if found and not pieces:
        raise ValueError(
            f"{folder}: layers for further tokens are cut where they are stored as layers, got "
            f"{next(iter(found))}"
        )
    own = {piece.key for piece in pieces}
    return FurtherLayers(longer, pieces, {k: v for k, v in found.items() if k not in own})


def with_further(lineage: Lineage, source: ModelConfig) -> Lineage:
    """The lineage of a model with its further layers: they come from the source's, as the last did.

    Args:
        source: ``FurtherLayers.config`` of the source.
    """
    first, last = lineage.source.num_layers, lineage.layers[-1]
    rows = tuple(dataclasses.replace(row, new=frozenset()) for row in last.rows)
    behind = tuple(
        dataclasses.replace(last, source=i, rows=rows, new=frozenset())
        for i in range(first, source.num_layers)
    )
    config = lineage.config
    longer = dataclasses.replace(config, layers=config.layers + config.layers[-1:] * len(behind))
    return dataclasses.replace(
        lineage, source=source, config=longer, layers=lineage.layers + behind
    )


def cut_alike(
    lineage: Lineage, given: FurtherLayers, infos: Mapping[str, TensorInfo]
) -> tuple[dict[tuple, StoredLeaf], dict[str, TensorInfo]]:
    """The further layers of a cut model.

    Args:
        lineage: ``with_further`` of the model's.
        given: those of its source, whose tensors are ``infos``.

    Returns:
        Leaves by path in ``lineage.config``, read from the source when they are wanted, and the
        tensors beside them by their new names.
    """
    before, after = given.config, lineage.config
    old = given.pieces[0].path[1]
    new = old - before.num_layers + after.num_layers
    stored = stored_leaves(before, given.pieces, infos)
    axes = {path: leaf.axes for path, leaf in leaves_with_path(abstract_params(before))}
    leaves = {}
    for path, leaf in leaves_with_path(abstract_params(after)):
        if path[0] == "layers" and path[1] >= new:
            origins = [origin for origin in lineage.origins(path) if origin is not None]
            read = partial(_read, origins, stored, axes)
            leaves[path] = StoredLeaf(leaf.shape, stored[origins[0].path].dtype, read)
    return leaves, {renumbered(key, new - old): info for key, info in given.beside.items()}


def renumbered(key: str, more: int) -> str:
    """The name of a tensor of a layer that stands so many places further back."""
    return _LAYER.sub(lambda match: f"model.layers.{int(match[1]) + more}.", key)


def _read(
    origins: list[Origin],
    stored: Mapping[tuple, StoredLeaf],
    axes: Mapping[tuple, tuple[str, ...]],
    window: tuple[slice, ...],
) -> np.ndarray:
    """A window of what is left of a leaf, or of the experts that it stacks."""
    parts = []
    for origin in origins:
        leaf = stored[origin.path]
        rows = slice(None) if origin.row is None else slice(origin.row, origin.row + 1)
        array = leaf.read((rows, *[slice(None)] * (leaf.ndim - 1)))
        parts.append(gathered(array, axes[origin.path], origin))
    return (np.stack(parts) if origins[0].row is not None else parts[0])[window]
