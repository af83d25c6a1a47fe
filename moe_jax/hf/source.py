"""The checkpoint that an export was made from, and what of its form the export takes over."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.files import MARKER
from moe_jax.hf import folder as folders
from moe_jax.hf.config_export import needs_modeling_file
from moe_jax.hf.config_import import model_config
from moe_jax.hf.families import find_family
from moe_jax.hf.family import FURTHER_LAYERS
from moe_jax.hf.names import Piece, detect_layout, expand, tied_head
from moe_jax.hf.nested import text_part
from moe_jax.hf.packed import left_out, scheme_of, would_be_packed
from moe_jax.hf.reader import further_tensors
from moe_jax.hf.safetensors_file import DTYPES, TensorInfo
from moe_jax.params import ITEM_BYTES, abstract_params, leaves_with_path


class Source(NamedTuple):
    """The checkpoint that a model was made from: its text model's file and headers."""

    folder: Path | None
    hf: dict[str, Any] | None
    infos: Mapping[str, TensorInfo]

    @classmethod
    def at(cls, folder: Path | None) -> Source:
        if folder is None:
            return cls(None, None, {})
        described = (folder / folders.CONFIG).exists()
        infos = folders.read_tensor_infos(folder) if folders.has_weights(folder) else {}
        return cls(folder, folders.read_config_file(folder) if described else None, infos)

    @classmethod
    def described(cls, hf: Mapping[str, Any]) -> Source:
        """What a checkpoint with this ``config.json`` is like, its further layers left out.

        Packed are the matrices that the file's scheme packs by custom: all but embeddings, head and
        routers in FP8, those of routed experts in MXFP4, less the modules that it names.

        Raises:
            ValueError: a file, or a packed form, that is not read.
        """
        file, text = Path(folders.CONFIG), text_part(hf)
        config, scheme = model_config(text), scheme_of(text, file)
        row = find_family(config.family)
        leaves = dict(leaves_with_path(abstract_params(config)))
        stored = str(text.get("dtype") or text.get("torch_dtype"))
        dtype = np.dtype(stored if stored in ITEM_BYTES else "float32")
        infos: dict[str, TensorInfo] = {}
        unpacked = left_out(text)
        for piece in expand(row, config, row.default_layout):
            leaf, key = leaves[piece.path], piece.key
            if leaf.exact:
                infos[key] = TensorInfo(key, file, DTYPES["F32"], piece.key_shape, 0)
                continue
            info = TensorInfo(key, file, dtype, piece.key_shape, 0)
            matrix = leaf.decay and len(leaf.axes) > 1 and not unpacked(key.removesuffix(".weight"))
            if scheme is not None and matrix and leaf.part in scheme.parts:
                info = would_be_packed(info, scheme)
            infos[key] = info
        return cls(None, dict(text), infos)

    @property
    def nbytes(self) -> int:
        """Of all its tensors as they are stored."""
        parts = (info.packed[:2] if info.packed else (info,) for info in self.infos.values())
        return sum(part.nbytes for part in chain.from_iterable(parts))


def further_layers(
    config: ModelConfig, hf: dict[str, Any], origin: Source
) -> dict[str, TensorInfo]:
    """Tensors of the source's layers behind the last one, for multi-token prediction.

    They are carried where the model has the source's architecture. Elsewhere their experts would
    be others than ``hf`` describes: they are left out, ``hf`` is edited to announce none, and a
    warning says so.
    """
    if origin.hf is None:
        return {}
    found = further_tensors(origin.hf, origin.infos)
    if not found:
        if not origin.infos and find_family(config.family).further_layers:  # small files alone
            hf.update({name: 0 for name in FURTHER_LAYERS if hf.get(name)})
        return {}
    if config == model_config(origin.hf):
        return found
    hf.update({name: 0 for name in FURTHER_LAYERS if name in hf})
    warnings.warn(
        f"the {len(found)} tensors of layers for multi-token prediction behind layer "
        f"{config.num_layers - 1} are left out: their experts are not cut; config.json announces "
        "none",
        stacklevel=4,
    )
    return {}


def stored_layout(config: ModelConfig, origin: Path | None) -> dict[str, Any]:
    """How a model derived from ``origin`` is stored: as its weights, or its marker file, say.

    Returns:
        ``layout``, a name in the family's row, and ``tied_head``, whether an output head that is
        tied to the embedding is stored all the same.
    """
    return layout_beside(config, Source.at(origin))


def layout_beside(config: ModelConfig, origin: Source) -> dict[str, Any]:
    row = find_family(config.family)
    default = row.default_layout
    layout, with_head = default, False
    if origin.infos:
        layout = detect_layout(row, config, origin.infos)
        head = tied_head(row, config, layout)
        with_head = head is not None and head.key in origin.infos
    elif origin.folder is not None and (origin.folder / MARKER).exists():
        marker = folders.read_json(folders.file_inside(origin.folder, MARKER))
        layout = marker.get("layout", default)
        with_head = bool(marker.get("tied_head")) and config.tied_embeddings
    # Experts that differ in kind have no stacked form on disk, and the modelling file knows none.
    if needs_modeling_file(config):
        layout = row.own_layout
    elif layout == row.own_layout:  # of a source that needed the file
        layout = default
    return {"layout": layout if layout in row.layouts else default, "tied_head": with_head}


def stored_pieces(config: ModelConfig, layout: Mapping[str, Any]) -> dict[str, list[Piece]]:
    """The pieces of each tensor that is stored."""
    row = find_family(config.family)
    pieces = expand(row, config, layout["layout"])
    head = tied_head(row, config, layout["layout"])
    if layout["tied_head"] and head is not None:
        pieces.append(head)
    tensors: dict[str, list[Piece]] = {}
    for piece in pieces:
        tensors.setdefault(piece.key, []).append(piece)
    return tensors
