"""What an export stores of a model: which tensors, and how; known from shapes alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.hf.config_import import model_config
from moe_jax.hf.further_layers import CutFurther, cut_alike
from moe_jax.hf.names import Piece
from moe_jax.hf.reader import further_tensors, stored_dtypes
from moe_jax.hf.safetensors_file import TensorInfo, TensorReader
from moe_jax.hf.shards import Tensor
from moe_jax.hf.source import Source, further_layers, layout_beside, stored_pieces
from moe_jax.hf.storage import Packing, Storage, plan_storage
from moe_jax.lineage import Lineage


@dataclass(frozen=True)
class Exported:
    """What was written, or will be.

    Attributes:
        nbytes: of weights.
        packed: whether tensors are packed as the source's are.
        reason: why they are not though the source's are; else empty.
        kept, repacked: packed tensors whose bytes are the source's, and others.
        errors: what packing again lost: relative Frobenius errors by kind of leaf.
        worst: the largest of one tensor, and its name.
    """

    nbytes: int
    packed: bool = False
    reason: str = ""
    kept: int = 0
    repacked: int = 0
    errors: Mapping[str, float] = field(default_factory=dict)
    worst: tuple[float, str] = (0.0, "")


def foreseen_export(
    config: ModelConfig,
    hf: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    lineage: Lineage | None = None,
    packing: Packing = "keep",
    cut_further: bool = False,
) -> Exported:
    """What ``save_hf`` would write of a model in its source's dtypes; reads nothing.

    Args:
        config: of the model.
        hf, infos: of its source, see ``folder.read_config_file`` and ``read_tensor_infos``.
        lineage, packing, cut_further: see ``save_hf``.
    """
    origin = Source(None, dict(hf), infos)
    dtypes = stored_dtypes(config, hf, infos)
    weights = stored_weights({}, dtypes, config, origin, lineage, packing, cut_further)
    with warnings.catch_warnings(action="ignore"):  # what is left out is told when it is
        tensors = weights.tensors(config, dict(hf), origin)
    return exported(tensors, weights.storage)


class Weights(NamedTuple):
    """What is stored of a model, and how.

    Attributes:
        leaves: weights by path.
        dtypes: that each leaf is stored in.
        layout: of tensors, see ``source.layout_beside``.
        pieces: of leaves, that each tensor is made of.
        storage: how tensors are stored.
        further: the source's layers for further tokens, cut; None: as they are, or left out.
    """

    leaves: Mapping[tuple, Any]
    dtypes: Mapping[tuple, np.dtype]
    layout: Mapping[str, Any]
    pieces: Mapping[str, list[Piece]]
    storage: Storage
    further: CutFurther | None

    def tensors(self, config: ModelConfig, hf: dict[str, Any], origin: Source) -> list[Tensor]:
        """The model's, and those that are carried over from its source.

        ``hf``, the ``config.json`` to be, is edited where some are not; see ``further_layers``.
        """
        further = self.further
        carried = further_layers(config, hf, origin) if further is None else further.beside
        planned = _plan_tensors(self.pieces, self.dtypes, self.storage)
        return [*planned, *carried_tensors(carried, self.storage)]


def stored_weights(
    leaves: Mapping[tuple, Any],
    dtypes: Mapping[tuple, np.dtype],
    config: ModelConfig,
    origin: Source,
    lineage: Lineage | None,
    packing: Packing | None,
    cut_further: bool,
) -> Weights:
    """What is stored of a model; ``packing`` None: nothing is packed."""
    layout = layout_beside(config, origin)
    further = _cut_further(config, origin, lineage) if cut_further else None
    if further is not None:
        leaves = {**leaves, **further.leaves}
        dtypes = {**dtypes, **{path: leaf.dtype for path, leaf in further.leaves.items()}}
        lineage = further.lineage
    pieces, storage = _stored(config, layout, origin, lineage, packing)
    return Weights(leaves, dtypes, layout, pieces, storage, further)


def exported(tensors: Sequence[Tensor], storage: Storage) -> Exported:
    return Exported(
        sum(tensor.nbytes for tensor in tensors),
        storage.scheme is not None,
        storage.reason,
        len(storage.kept),
        len(storage.packed),
    )


def carried_tensors(
    infos: Mapping[str, TensorInfo], storage: Storage | None = None
) -> list[Tensor]:
    """Tensors as they are; packed ones unpacked where the export is not packed."""
    parts: dict[str, TensorInfo] = {}
    for key, info in infos.items():
        if info.packed is not None and storage is not None and storage.scheme is not None:
            weights, scales, scheme = info.packed
            parts |= zip(scheme.names(key), (weights, scales), strict=True)
        else:
            parts[key] = info
    return [
        Tensor(key, info.shape, info.dtype, copied=partial(_copy, info))
        for key, info in parts.items()
    ]


def _copy(info: TensorInfo, reader: TensorReader) -> np.ndarray:
    return np.array(reader.read(info))


def _cut_further(config: ModelConfig, origin: Source, lineage: Lineage | None) -> CutFurther | None:
    """The source's layers for further tokens, cut; None if there are none, or nothing was cut."""
    if origin.hf is None or not further_tensors(origin.hf, origin.infos):
        return None
    if config == model_config(origin.hf):
        return None
    if lineage is None:
        raise ValueError("cut_further needs the lineage of the model, got none")
    return cut_alike(lineage, origin.hf, origin.infos)


def _stored(
    config: ModelConfig,
    layout: Mapping[str, Any],
    origin: Source,
    lineage: Lineage | None,
    packing: Packing | None,
) -> tuple[dict[str, list[Piece]], Storage]:
    """The pieces of each tensor and how they are stored; ``packing`` None: in the leaves' dtype."""
    pieces = stored_pieces(config if lineage is None else lineage.config, layout)
    if origin.hf is None or not origin.infos:
        return pieces, Storage()
    if packing is None:
        packed = any(info.packed for info in origin.infos.values())
        return pieces, Storage(reason="another dtype was asked for" if packed else "")
    return pieces, plan_storage(pieces, origin.hf, origin.infos, lineage, packing)


def _plan_tensors(
    pieces: Mapping[str, list[Piece]], dtypes: Mapping[tuple, np.dtype], storage: Storage
) -> list[Tensor]:
    tensors = []
    for key, parts in pieces.items():
        if (kept := storage.kept.get(key)) is not None:
            names = kept.packed.scheme.names(key)
            tensors += [
                Tensor(name, *header, copied=partial(kept.read, scales=scales))
                for scales, name, header in zip((False, True), names, kept.headers(), strict=True)
            ]
            continue
        kinds = {dtypes[part.path] for part in parts}
        if len(kinds) > 1:
            raise ValueError(f"leaves stored together in {key} must share a dtype, got {kinds}")
        tensor = Tensor(key, parts[0].key_shape, kinds.pop(), tuple(parts))
        tensors.append(replace(tensor, scheme=storage.packed.get(key)))
    return tensors
