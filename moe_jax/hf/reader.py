"""Streaming import of a checkpoint: headers first, then one leaf at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.hf import folder as folders
from moe_jax.hf.checks import typed
from moe_jax.hf.config_import import LAYERS_KEY, model_config, read_facts
from moe_jax.hf.families import find_family
from moe_jax.hf.family import FURTHER_LAYERS
from moe_jax.hf.names import Piece, detect_layout, expand, tied_head, without_bucket
from moe_jax.hf.safetensors_file import DTYPES, TensorInfo, TensorReader, all_finite
from moe_jax.params import abstract_params, leaves_with_path, nest, path_name
from moe_jax.processes import spec_tree
from moe_jax.stored import StoredLeaf, aligned_empty, in_memory


def load_hf(
    path_or_id: str | Path,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    *,
    check_finite: bool = True,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a Hugging Face checkpoint of one of the families in ``hf.families``.

    JSON and safetensors are read, nothing is executed. Every tensor must be accounted for exactly
    once and every leaf filled; all names, shapes and dtypes are checked before the first weight
    is read. A process reads what its devices hold. Host memory stays at about one leaf beside what
    ``params`` itself takes there.

    Args:
        path_or_id: a folder, or the id of a hub repository.
        dtype: float32, bfloat16 or float16 for all weights; None keeps each tensor's own.
        mesh: devices to shard over (see ``processes``); None puts everything on the default one.

    Returns:
        The architecture, and the weights shaped as ``params.abstract_params`` of it.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: unsupported ``model_type``, pickled weights, packed ones other than ``packed``
            tells of (which are read as bfloat16), damaged files, missing or unexpected tensors,
            wrong shapes, NaN, a dimension that its mesh axis does
            not divide; the message names the culprit.
    """
    config, stored = _opened(path_or_id, dtype, check_finite)
    places = None if mesh is None else spec_tree(config, mesh)
    return config, in_memory(stored, places)


def open_hf(path_or_id: str | Path, dtype: Any = None) -> tuple[ModelConfig, dict[str, Any]]:
    """``load_hf`` without the reading: each leaf of the weights is read when it is wanted.

    Headers are checked as ``load_hf`` checks them; a NaN is found, and named, when it is read.

    Returns:
        The architecture, and weights whose leaves are ``stored.StoredLeaf``.
    """
    return _opened(path_or_id, dtype, True)


def _opened(
    path_or_id: str | Path, dtype: Any, check_finite: bool
) -> tuple[ModelConfig, dict[str, Any]]:
    target = None if dtype is None else _weight_dtype(dtype)
    config, pieces, infos = read_pieces(path_or_id)
    reader = TensorReader()
    _check_tied_head(config, infos, reader)
    _check_novices(pieces, infos, reader)
    return config, nest(stored_leaves(config, pieces, infos, target, check_finite))


def read_pieces(
    path_or_id: str | Path,
) -> tuple[ModelConfig, list[Piece], dict[str, TensorInfo]]:
    """A checkpoint's architecture, the pieces of its leaves and its tensors, all from headers.

    Errors are those of ``load_hf``.
    """
    folder = folders.find_folder(path_or_id)
    hf = folders.read_config_file(folder)
    infos = folders.read_tensor_infos(folder)
    _check_counts(hf, infos, folder)
    config = model_config(hf)
    return config, _match(config, hf, infos, folder), infos


def stored_leaves(
    config: ModelConfig,
    pieces: Sequence[Piece],
    infos: Mapping[str, TensorInfo],
    target: np.dtype | None = None,
    check_finite: bool = True,
) -> dict[tuple, StoredLeaf]:
    """By path, the leaves that pieces belong to; read as ``target``, or in the tensors' dtype."""
    by_leaf = {path: list(own) for path, own in groupby(pieces, lambda piece: piece.path)}
    leaves = {p: leaf for p, leaf in leaves_with_path(abstract_params(config)) if p in by_leaf}
    dtypes = {
        path: (not leaf.exact and target) or _leaf_dtype(path, by_leaf[path], infos)
        for path, leaf in leaves.items()
    }
    reader = TensorReader()

    def read(path: tuple, window: tuple[slice, ...]) -> np.ndarray:
        buffer = aligned_empty([part.stop - part.start for part in window], dtypes[path])
        for piece in by_leaf[path]:
            part, own = buffer, window
            if piece.row is not None:
                if not window[0].start <= piece.row < window[0].stop:
                    continue
                part, own = buffer[piece.row - window[0].start], window[1:]
            with np.errstate(over="ignore"):  # reported below, with a name
                piece.read(reader.read(infos[piece.key], piece.entry), part, own)
            if check_finite and not all_finite(part):
                raise ValueError(
                    f"weights must be finite, got NaN or infinity in {piece.key} "
                    f"({infos[piece.key].file}) read as {part.dtype}"
                )
        reader.release_pages()
        return buffer

    def prefetch(path: tuple) -> None:
        for piece in by_leaf[path]:
            reader.prefetch(infos[piece.key])

    return {
        path: StoredLeaf(leaf.shape, dtypes[path], partial(read, path), partial(prefetch, path))
        for path, leaf in leaves.items()
    }


def read_config(path_or_id: str | Path) -> ModelConfig:
    """The architecture of a checkpoint, from its ``config.json`` and the headers of its weights.

    Errors are those of ``load_hf``.
    """
    folder = folders.find_folder(path_or_id)
    hf = folders.read_config_file(folder)
    if folders.has_weights(folder):
        _check_counts(hf, folders.read_tensor_infos(folder), folder)
    return model_config(hf)


def _check_counts(hf: Mapping[str, Any], infos: Mapping[str, TensorInfo], folder: Path) -> None:
    """Numbers of layers and experts against the tensors, before anything is built of that size."""
    row = find_family(hf.get("model_type"))
    facts = read_facts(row, hf)
    indices = {int(index) for key in infos for index in _LAYER.findall(key)}
    if indices and facts["num_layers"] > max(indices) + 1:
        raise ValueError(
            f"{folder}: num_hidden_layers must be at most the {max(indices) + 1} layers that have "
            f"tensors, got {facts['num_layers']}"
        )
    routers = {
        table["layers.{layer}.moe.router.kernel"].name.format(layer=i)
        for table in row.layouts.values()
        if "layers.{layer}.moe.router.kernel" in table
        for i in indices
    }
    rows = {infos[key].shape[0]: key for key in routers & infos.keys() if infos[key].shape}
    # Layers may have fewer than the file says, each its own number, where the file lists them.
    own = bool(hf.get(LAYERS_KEY))
    experts = facts.get("num_experts", 0)
    if rows and (experts > max(rows) or (not own and {experts} != {*rows})):
        count, key = max(rows.items())
        raise ValueError(
            f"{folder}: the number of experts must be {count}, the rows of {key}, got {experts}"
        )


_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")


def further_tensors(
    hf: Mapping[str, Any], infos: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """Tensors of the layers behind the last one that ``config.json`` announces, if it does."""
    row = find_family(hf.get("model_type"))
    announced = [hf[name] for name in FURTHER_LAYERS if hf.get(name) is not None]
    if not row.further_layers or not announced:
        return {}
    first = read_facts(row, hf)["num_layers"]
    count = min(typed(FURTHER_LAYERS[0], announced[0], int), len(infos))
    prefixes = tuple(
        begin.format(layer=i) for begin in row.further_layers for i in range(first, first + count)
    )
    return {key: info for key, info in infos.items() if key.startswith(prefixes)}


def stored_dtype(path_or_id: str | Path) -> str | None:
    """The one dtype of all weights of a checkpoint, or None where they differ; reads headers."""
    infos = folders.read_tensor_infos(folders.find_folder(path_or_id))
    names = {str(info.dtype) for info in infos.values()}
    return names.pop() if len(names) == 1 else None


def stored_dtypes(
    config: ModelConfig, hf: Mapping[str, Any], infos: Mapping[str, TensorInfo]
) -> dict[tuple, np.dtype]:
    """For each leaf of ``config``, the dtype of the tensors that it was made from.

    Leaves that the checkpoint has no counterpart of, constants above all, get that of the constants
    that the layer's experts add, or else of their down projections.

    Args:
        hf, infos: of that checkpoint, see ``folder.read_config_file`` and ``read_tensor_infos``.
    """
    original = model_config(hf)
    row = find_family(original.family)
    stored: dict[tuple, np.dtype] = {}
    for piece in expand(row, original, detect_layout(row, original, infos)):
        path, dtype = without_bucket(piece.path), infos[piece.key].dtype
        stored[path] = np.promote_types(dtype, stored.get(path, dtype))
    kept = config.kept_layers or range(config.num_layers)
    dtypes = {}
    for path, _ in leaves_with_path(abstract_params(config)):
        origin = without_bucket(path)
        if path[0] == "layers":
            origin = ("layers", kept[path[1]], *origin[2:])
        moe = (*origin[:2], "moe")
        alike = (origin, (*moe, "expert_bias"), (*moe, "experts", "down"))
        dtypes[path] = next(stored[leaf] for leaf in alike if leaf in stored)
    return dtypes


def prevalent_dtype(path_or_id: str | Path) -> str:
    """The dtype of most bytes of a checkpoint's weights; reads headers."""
    nbytes: Counter[str] = Counter()
    for info in folders.read_tensor_infos(folders.find_folder(path_or_id)).values():
        nbytes[str(info.dtype)] += info.nbytes
    return nbytes.most_common(1)[0][0]


def _weight_dtype(dtype: Any) -> np.dtype:
    try:
        resolved = np.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved not in DTYPES.values():
        raise ValueError(f"dtype must be one of {[str(d) for d in DTYPES.values()]}, got {dtype}")
    return resolved


def _match(
    config: ModelConfig, hf: Mapping[str, Any], infos: Mapping[str, TensorInfo], folder: Path
) -> list[Piece]:
    """The pieces of the checkpoint's layout; raises if they and the files differ."""
    row = find_family(config.family)
    layout = detect_layout(row, config, infos)
    pieces = expand(row, config, layout)
    head = tied_head(row, config, layout)
    optional = [head] if head is not None and head.key in infos else []
    shapes = {piece.key: piece.key_shape for piece in (*pieces, *optional)}
    missing = [key for key in shapes if key not in infos]
    beside = further_tensors(hf, infos)
    unexpected = [key for key in infos if key not in shapes and key not in beside]
    if missing or unexpected:
        raise ValueError(
            f"{folder}: tensors do not match config.json ({row.model_type}, {layout} layout): "
            f"{_first(missing)} missing, {_first(unexpected)} unexpected"
        )
    for key, shape in shapes.items():
        if infos[key].shape != shape:
            raise ValueError(
                f"{infos[key].file}: {key} must have shape {shape}, got {infos[key].shape}"
            )
    return pieces


def _first(keys: list[str], show: int = 3) -> str:
    if not keys:
        return "none"
    more = ", ..." if len(keys) > show else ""
    return f"{len(keys)} ({', '.join(keys[:show])}{more})"


def _leaf_dtype(path: tuple, pieces: list[Piece], infos: Mapping[str, TensorInfo]) -> np.dtype:
    first = infos[pieces[0].key]
    for piece in pieces:
        info = infos[piece.key]
        if info.dtype != first.dtype:
            raise ValueError(
                f"tensors stacked into {path_name(path)} must share a dtype, got {first.dtype} "
                f"in {first.key} and {info.dtype} in {info.key}; pass dtype to convert"
            )
    return first.dtype


def _check_tied_head(
    config: ModelConfig, infos: Mapping[str, TensorInfo], reader: TensorReader
) -> None:
    row = find_family(config.family)
    head = tied_head(row, config, row.default_layout)
    if head is None or head.key not in infos:
        return
    embedding = row.layouts[row.default_layout]["embed.embedding"].name
    stored, tied = reader.read(infos[head.key]), reader.read(infos[embedding])
    if stored.dtype != tied.dtype or not np.array_equal(stored.view("u1"), tied.view("u1")):
        raise ValueError(
            f"{head.key} must equal {embedding} where tie_word_embeddings is true; "
            "set it to false in config.json if the two differ on purpose"
        )
    reader.release_pages()


def _check_novices(
    pieces: list[Piece], infos: Mapping[str, TensorInfo], reader: TensorReader
) -> None:
    """Where novices have a place among stacked experts, it holds zeros."""
    entries: dict[str, set[int]] = {}
    for piece in pieces:
        if piece.entry is not None:
            entries.setdefault(piece.key, set()).add(piece.entry)
    for key, used in entries.items():
        for entry in set(range(infos[key].shape[0])) - used:
            if reader.read(infos[key], entry).any():
                raise ValueError(
                    f"{infos[key].file}: {key} must be zero where experts are constants, got other "
                    f"weights of expert {entry}"
                )
    reader.release_pages()
