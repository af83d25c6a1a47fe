"""Layers behind the last one, for predicting further tokens (MTP), cut as the last one was.

They are no part of the model. Their tensors are those of a layer like the last one, and some of
their own beside (``hf.reader.further_tensors``), which no cut concerns.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.hf.config_export import needs_modeling_file
from moe_jax.hf.config_import import model_config
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
    config: ModelConfig, hf: Mapping[str, Any], infos: Mapping[str, TensorInfo]
) -> FurtherLayers:
    """The further layers of a checkpoint.

    Args:
        config, hf, infos: its architecture, its text model's file and its tensors.

    Raises:
        ValueError: they are not like its last layer.
    """
    found = further_tensors(hf, infos)
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
                "layers for further tokens are cut where they are like the last layer: "
                f"{piece.key} must have shape {piece.key_shape}, got {shape}"
            )
    if found and not pieces:
        raise ValueError(
            "layers for further tokens are cut where they are stored as layers, got "
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


class CutFurther(NamedTuple):
    """The further layers of a cut model.

    Attributes:
        lineage: of the model with them as its last layers.
        leaves: theirs, by path, read from the source when they are wanted.
        beside: their other tensors by their new names.
    """

    lineage: Lineage
    leaves: dict[tuple, StoredLeaf]
    beside: dict[str, TensorInfo]


def cut_alike(
    lineage: Lineage, hf: Mapping[str, Any], infos: Mapping[str, TensorInfo]
) -> CutFurther:
    """The further layers of a source, cut as the last layer of a model was.

    Args:
        lineage: of the model.
        hf, infos: of the source.

    Raises:
        ValueError: see ``read_further``; a model that the stock class does not hold.
    """
    check_further(lineage.config, hf, infos)
    given = read_further(lineage.source, hf, infos)
    more = lineage.config.num_layers - lineage.source.num_layers
    whole = with_further(lineage, given.config)
    stored = stored_leaves(given.config, given.pieces, infos)
    axes = {path: leaf.axes for path, leaf in leaves_with_path(abstract_params(given.config))}
    leaves = {}
    for path, leaf in leaves_with_path(abstract_params(whole.config)):
        if path[0] == "layers" and path[1] >= lineage.config.num_layers:
            origins = [origin for origin in whole.origins(path) if origin is not None]
            read = partial(_read, origins, stored, axes)
            leaves[path] = StoredLeaf(leaf.shape, stored[origins[0].path].dtype, read)
    beside = {renumbered(key, more): info for key, info in given.beside.items()}
    return CutFurther(whole, leaves, beside)


def check_further(
    result: ModelConfig, hf: Mapping[str, Any], infos: Mapping[str, TensorInfo]
) -> None:
    """Raises what ``cut_alike`` would, for a cut that leaves ``result``."""
    check_stock(result, "a model whose layers for further tokens are cut, too,")
    read_further(model_config(hf), hf, infos)


def check_stock(config: ModelConfig, what: str) -> None:
    """Raises ValueError if ``what`` is no model of a stock class."""
    if needs_modeling_file(config):
        raise ValueError(
            f"{what} must be one of the stock class; novices, and layers or experts that differ, "
            "have no place in it"
        )


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
