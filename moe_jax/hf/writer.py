"""Export: shards planned from shapes, written tensor by tensor, in a folder that appears whole."""

from __future__ import annotations

import json
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.files import MARKER, check_apart, check_output_folder, replacing_folder
from moe_jax.hf import folder as folders
from moe_jax.hf.config_export import export_config, needs_modeling_file
from moe_jax.hf.config_import import model_config
from moe_jax.hf.families import find_family
from moe_jax.hf.family import FURTHER_LAYERS
from moe_jax.hf.further_layers import cut_alike, read_further, with_further
from moe_jax.hf.modeling_file import MODELING_FILE, modeling_file
from moe_jax.hf.names import Piece, detect_layout, expand, tied_head
from moe_jax.hf.nested import text_prefix, with_text_part
from moe_jax.hf.reader import further_tensors, read_config, stored_dtypes
from moe_jax.hf.safetensors_file import (
    NAMES,
    TensorInfo,
    TensorReader,
    all_finite,
    write_file,
)
from moe_jax.lineage import Lineage
from moe_jax.params import abstract_params, leaves_with_path, path_name
from moe_jax.processes import barrier, gather, is_writer

Item = TypeVar("Item")
_FURTHER_CUT = "a model whose layers for further tokens are cut, too,"


@dataclass(frozen=True)
class _Tensor:
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[Piece, ...] = ()
    carried: TensorInfo | None = None  # where it lies, if it is copied as it is

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def save_hf(
    path: str | Path,
    params: Mapping[str, Any],
    config: ModelConfig,
    source: str | Path | None = None,
    dtype: Any = None,
    max_shard_bytes: float = 5e9,
    extra_files: Mapping[str, str | bytes] | None = None,
    compression_config: Mapping[str, Any] | None = None,
    *,
    expert_substitution: bool = True,
    lineage: Lineage | None = None,
    cut_further: bool = False,
) -> None:
    """Writes a Hugging Face checkpoint, atomically.

    What was read with ``load_hf`` is written back with the same tensor names, layout, dtypes and
    bytes. Models that stock classes cannot hold (novices, layers or experts that differ in shape,
    experts that add a constant) get a small modelling file beside them, for
    ``trust_remote_code=True``, and one tensor per expert and projection. Host memory stays at
    about one leaf and two tensors. Of many processes, which must all call this, one writes.

    Args:
        path: folder to write: absent, empty, or an earlier export, which is replaced.
        params: weights, shaped as ``params.abstract_params(config)``.
        source: the checkpoint that the model was made from: its ``config.json`` is edited rather
            than written anew, its layout is kept, and its tokenizer, chat template, generation
            config and other small files are carried over.
        dtype: float32, bfloat16 or float16 for all weights; None keeps that of each leaf;
            ``"source"`` gives each tensor the dtype of those that it was made from.
        max_shard_bytes: weights of more bytes are split over several files.
        extra_files: further files by name; they replace files of the source.
        compression_config: merged into that key of ``config.json``.
        expert_substitution: describe novices in ``compression_config`` too, beside their authors'
            keys. The vLLM proposal takes either description and, so far, refuses both together;
            it cannot describe experts that differ in width or add a constant, so that models with
            such experts go without.
        lineage: where the model comes from in ``source``.
        cut_further: cut the source's layers for predicting further tokens as the last layer was,
            which takes ``lineage``; else they stay where the model is the source's, or are left
            out.

    Raises:
        FileExistsError: ``path`` holds something that is not an export of ours.
        OSError: a full disk; refused before a byte is written if it is known to be too small.
        ValueError: shapes that do not follow from ``config``, a source of another family or one
            that ``path`` would change, an architecture that the family cannot express, NaN in a
            weight.
    """
    path = check_output_folder(path)
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    origin = None if source is None else folders.find_folder(source)
    if origin is not None:
        check_apart(origin, path)
    source_config = None
    if origin is not None and (origin / folders.CONFIG).exists():
        source_config = folders.read_config_file(origin)
    leaves = _checked_leaves(params, config)
    dtypes = _dtypes(leaves, config, dtype, origin)
    exact = _exact_leaves(config)
    common = {str(found) for path, found in dtypes.items() if path not in exact}
    hf = export_config(
        config,
        source_config,
        dtype=common.pop() if len(common) == 1 else None,
        compression_config=compression_config,
        expert_substitution=expert_substitution,
    )
    _warn_of_odd_widths(config, dtypes)
    layout = stored_layout(config, origin)
    further, behind = _further_layers(config, hf, layout, origin, cut_further and lineage)
    leaves |= behind
    tensors = [*_plan_tensors(config, layout, dtypes), *further]
    hf, tensors = _enclosed(config, hf, tensors, origin)
    files = _sidecars(origin, config, extra_files)
    files[folders.CONFIG] = json.dumps(hf, indent=2, ensure_ascii=False) + "\n"
    files[MARKER] = json.dumps({"format": 1, **layout}) + "\n"
    shards = _plan_shards(tensors, max_shard_bytes)
    if not is_writer():
        deque(_assembled(shards, leaves), maxlen=0)  # what is gathered takes all processes
        return barrier("save_hf")
    nbytes = sum(tensor.nbytes for tensor in tensors)
    with replacing_folder(path, nbytes) as temporary:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(data)
        _write_shards(temporary, shards, leaves)
    barrier("save_hf")


def _further_layers(
    config: ModelConfig,
    hf: dict[str, Any],
    layout: Mapping[str, Any],
    origin: Path | None,
    lineage: Lineage | None | Literal[False],
) -> tuple[list[_Tensor], dict[tuple, Any]]:
    """Tensors of the source's layers behind the last one, and leaves that they are made of.

    They are carried where the model has the source's architecture, or cut by ``lineage``. Else
    their experts would be others than ``hf`` describes: they are left out, ``hf`` is edited to
    announce none, and a warning says so.
    """
    if origin is None or not (origin / folders.CONFIG).exists():
        return [], {}
    source_config = folders.read_config_file(origin)
    here = folders.has_weights(origin)
    infos = folders.read_tensor_infos(origin) if here else {}
    found = further_tensors(source_config, infos)
    if not found:
        if not here and find_family(config.family).further_layers:  # small files alone
            hf.update({name: 0 for name in FURTHER_LAYERS if hf.get(name)})
        return [], {}
    source = model_config(source_config)
    if config == source:
        return _carried(found), {}
    if lineage:
        _check_stock(config, _FURTHER_CUT)
        given = read_further(source, origin, infos)
        whole = with_further(lineage, given.config)
        leaves, beside = cut_alike(whole, given, infos)
        dtypes = {path: leaf.dtype for path, leaf in leaves.items()}
        return [*_plan_tensors(whole.config, layout, dtypes), *_carried(beside)], leaves
    hf.update({name: 0 for name in FURTHER_LAYERS if name in hf})
    warnings.warn(
        f"the {len(found)} tensors of layers for multi-token prediction behind layer "
        f"{config.num_layers - 1} are left out: their experts are not cut; config.json announces "
        "none",
        stacklevel=3,
    )
    return [], {}


def _carried(infos: Mapping[str, TensorInfo]) -> list[_Tensor]:
    return [_Tensor(key, info.shape, info.dtype, carried=info) for key, info in infos.items()]


def _enclosed(
    config: ModelConfig, hf: dict[str, Any], tensors: list[_Tensor], origin: Path | None
) -> tuple[dict[str, Any], list[_Tensor]]:
    """The file and the tensors of a text model in their place within the source, if it has one."""
    if origin is None or not (origin / folders.CONFIG).exists():
        return hf, tensors
    whole = folders.read_json(folders.file_inside(origin, folders.CONFIG))
    prefix = text_prefix(whole)
    if not prefix:
        return hf, tensors
    _check_stock(config, f"{whole['model_type']}: its text model")
    inside = [replace(tensor, key=prefix + tensor.key) for tensor in tensors]
    return with_text_part(whole, hf), [*inside, *_carried(folders.tensors_beside(origin))]


def _check_stock(config: ModelConfig, what: str) -> None:
    if needs_modeling_file(config):
        raise ValueError(
            f"{what} must be one of the stock class; novices, and layers or experts that differ, "
            "have no place in it"
        )


def check_source(
    source: str | Path, result: ModelConfig | None = None, cut_further: bool = False
) -> None:
    """Raises what ``save_hf`` would raise of a ``source``, so that it is known before long work.

    Args:
        result: what it will be asked to save.
        cut_further: as for ``save_hf``.

    Raises:
        FileNotFoundError, ValueError, OSError: no such folder, an unsupported ``config.json``,
            damaged headers of weights, links that lead out, files that cannot be read, a result
            that has no place in the source.
    """
    origin = folders.find_folder(source)
    folders.sidecar_files(origin)
    if (origin / folders.CONFIG).exists():
        stored_layout(read_config(origin), origin)
        whole = folders.read_json(folders.file_inside(origin, folders.CONFIG))
        if text_prefix(whole) and result is not None:
            _check_stock(result, f"{whole['model_type']}: its text model")
    if cut_further and result is not None:
        _check_stock(result, _FURTHER_CUT)
        read_further(read_config(origin), origin, folders.read_tensor_infos(origin))


def _dtypes(
    leaves: Mapping[tuple, Any], config: ModelConfig, dtype: Any, origin: Path | None
) -> dict[tuple, np.dtype]:
    """The dtype in which each leaf is stored."""
    if isinstance(dtype, str) and dtype == "source":
        if origin is not None and folders.has_weights(origin):
            return stored_dtypes(config, origin)
        dtype = None
    target = None if dtype is None else np.dtype(dtype)
    exact = _exact_leaves(config)
    dtypes = {
        path: target if target is not None and path not in exact else np.dtype(array.dtype)
        for path, array in leaves.items()
    }
    for path, found in dtypes.items():
        if found not in NAMES:
            raise ValueError(
                f"dtype of {path_name(path)} must be one of {[*map(str, NAMES)]}, got {found}"
            )
    return dtypes


def _exact_leaves(config: ModelConfig) -> set[tuple]:
    """Paths of what is stored in its own dtype whatever the others are."""
    return {path for path, leaf in leaves_with_path(abstract_params(config)) if leaf.exact}


def _checked_leaves(params: Mapping[str, Any], config: ModelConfig) -> dict[tuple, Any]:
    given = dict(leaves_with_path(params))
    expected = dict(leaves_with_path(abstract_params(config)))
    for path in sorted(given.keys() ^ expected.keys(), key=path_name):
        what = "is missing" if path in expected else "does not belong to this architecture"
        raise ValueError(f"params: {path_name(path)} {what}")
    for path, leaf in expected.items():
        if tuple(given[path].shape) != leaf.shape:
            raise ValueError(
                f"params: {path_name(path)} must have shape {leaf.shape}, got {given[path].shape}"
            )
    return given


def _warn_of_odd_widths(config: ModelConfig, dtypes: Mapping[tuple, np.dtype]) -> None:
    """torch's grouped matmul, the default of the stock classes, wants rows of 16-byte multiples."""
    if needs_modeling_file(config):
        return
    for i in config.moe_layers:
        width = config.moe(i).expert_width
        itemsize = dtypes[("layers", i, "moe", "experts", "gate")].itemsize
        if width * itemsize % 16:
            warnings.warn(
                f"expert width {width} is not a multiple of {16 // itemsize}: transformers needs "
                'experts_implementation="eager" to run this checkpoint',
                stacklevel=3,
            )
            return


def stored_layout(config: ModelConfig, origin: Path | None) -> dict[str, Any]:
    """How a model derived from ``origin`` is stored: as its weights, or its marker file, say.

    Returns:
        ``layout``, a name in the family's row, and ``tied_head``, whether an output head that is
        tied to the embedding is stored all the same.
    """
    row = find_family(config.family)
    default = row.default_layout
    layout, with_head = default, False
    if origin is not None and folders.has_weights(origin):
        keys = folders.read_tensor_infos(origin).keys()
        layout = detect_layout(row, config, keys)
        head = tied_head(row, config, layout)
        with_head = head is not None and head.key in keys
    elif origin is not None and (origin / MARKER).exists():
        marker = folders.read_json(folders.file_inside(origin, MARKER))
        layout = marker.get("layout", default)
        with_head = bool(marker.get("tied_head")) and config.tied_embeddings
    # Experts that differ in kind have no stacked form on disk, and the modelling file knows none.
    if needs_modeling_file(config):
        layout = row.own_layout
    elif layout == row.own_layout:  # of a source that needed the file
        layout = default
    return {"layout": layout if layout in row.layouts else default, "tied_head": with_head}


def _plan_tensors(
    config: ModelConfig, layout: Mapping[str, Any], dtypes: Mapping[tuple, np.dtype]
) -> list[_Tensor]:
    row = find_family(config.family)
    pieces = [piece for piece in expand(row, config, layout["layout"]) if piece.path in dtypes]
    head = tied_head(row, config, layout["layout"])
    if layout["tied_head"] and head is not None and head.path in dtypes:
        pieces.append(head)
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.key, []).append(piece)
    tensors = []
    for key, parts in groups.items():
        kinds = {dtypes[part.path] for part in parts}
        if len(kinds) > 1:
            raise ValueError(f"leaves stored together in {key} must share a dtype, got {kinds}")
        tensors.append(_Tensor(key, parts[0].key_shape, kinds.pop(), tuple(parts)))
    return tensors


def _plan_shards(tensors: list[_Tensor], max_bytes: float) -> list[list[_Tensor]]:
    """Consecutive tensors of at most ``max_bytes`` together, or a single larger one.

    Wider dtypes come first within a file, so that every tensor is aligned.
    """
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def _write_shards(folder: Path, shards: list[list[_Tensor]], leaves: Mapping[tuple, Any]) -> None:
    count = len(shards)
    weight_map = {}
    arrays = made_ahead(_assembled(shards, leaves))
    for i, shard in enumerate(shards):
        name = folders.SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        header = [(tensor.key, tensor.shape, tensor.dtype) for tensor in shard]
        write_file(folder / name, header, islice(arrays, len(shard)))
        weight_map.update({tensor.key: name for tensor in shard})
    if count > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / folders.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _assembled(shards: list[list[_Tensor]], leaves: Mapping[tuple, Any]) -> Iterator[np.ndarray]:
    """The tensors one by one; a leaf is fetched to the host once, and kept until its last use."""
    tensors = [tensor for shard in shards for tensor in shard]
    uses = Counter(piece.path for tensor in tensors for piece in tensor.pieces)
    host: dict[tuple, np.ndarray] = {}
    reader = TensorReader()
    for tensor in tensors:
        if tensor.carried is not None:
            yield np.array(reader.read(tensor.carried))
            reader.release_pages()
            continue
        array = np.zeros(tensor.shape, tensor.dtype)  # of novices no piece may be left
        for piece in tensor.pieces:
            if piece.path not in host:
                host[piece.path] = gather(leaves[piece.path])
            piece.write(host[piece.path], array)
            uses[piece.path] -= 1
            if not uses[piece.path]:
                del host[piece.path]
        if not all_finite(array):
            raise ValueError(f"weights must be finite, got NaN or infinity in {tensor.key}")
        yield array


def made_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Passes items on, of which each is made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _sidecars(
    origin: Path | None, config: ModelConfig, extra: Mapping[str, str | bytes] | None
) -> dict[str, str | bytes]:
    files: dict[str, str | bytes] = {}
    if origin is not None:
        sidecars = folders.sidecar_files(origin)
        files = {name: file.read_bytes() for name, file in sidecars.items()}
        files.pop(MARKER, None)
        files.pop(MODELING_FILE, None)
    for name, content in (extra or {}).items():
        if Path(name).name != name or name in (folders.CONFIG, MARKER) or "safetensors" in name:
            raise ValueError(f"extra_files: must be plain names of other files, got {name!r}")
        files[name] = content
    if needs_modeling_file(config):
        files[MODELING_FILE] = modeling_file(find_family(config.family))
    return files
