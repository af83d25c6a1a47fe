"""Export: shards planned from shapes, written tensor by tensor, in a folder that appears whole."""

from __future__ import annotations

import json
import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.files import MARKER, check_apart, check_output_folder, replacing_folder
from moe_jax.hf import folder as folders
from moe_jax.hf.config_export import export_config, needs_modeling_file
from moe_jax.hf.families import find_family
from moe_jax.hf.further_layers import check_further, check_stock
from moe_jax.hf.modeling_file import MODELING_FILE, modeling_file
from moe_jax.hf.nested import text_prefix, with_text_part
from moe_jax.hf.reader import read_config, stored_dtypes
from moe_jax.hf.safetensors_file import NAMES
from moe_jax.hf.shards import PackingError, Tensor, assembled, plan_shards, write_shards
from moe_jax.hf.source import Source, stored_layout
from moe_jax.hf.storage import Packing
from moe_jax.hf.stored_weights import Exported, carried_tensors, exported, stored_weights
from moe_jax.lineage import Lineage
from moe_jax.params import abstract_params, leaves_with_path, path_name
from moe_jax.processes import barrier, is_writer


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
    packing: Packing = "keep",
    cut_further: bool = False,
) -> Exported:
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
        lineage: where the model comes from in ``source``, if that is packed (see ``packed``): with
            it, weights whose numbers are the source's (all of them, where nothing but experts,
            layers or whole blocks went) keep their packed bytes, and ``quantization_config``
            stays. ``Lineage.of(config)`` is that of a model as it was loaded. Without it, or where
            any packed tensor cannot stay, weights are written in 16 bits.
        packing: ``source`` packs what cannot stay as it is by the source's scheme again.
        cut_further: cut the source's layers for predicting further tokens as the last layer was,
            which takes ``lineage``; else they stay where the model is the source's, or are left
            out.

    Returns:
        What was written.

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
    origin = Source.at(None if source is None else folders.find_folder(source))
    if origin.folder is not None:
        check_apart(origin.folder, path)
    leaves = _checked_leaves(params, config)
    dtypes = _dtypes(leaves, config, dtype, origin)
    packed = _packing_of(packing, dtype)
    weights = stored_weights(leaves, dtypes, config, origin, lineage, packed, cut_further)
    hf = export_config(
        config,
        origin.hf,
        dtype=_common(dtypes, config),
        compression_config=compression_config,
        expert_substitution=expert_substitution,
        quantization_config=weights.storage.scheme,
    )
    _warn_of_odd_widths(config, dtypes)
    hf, tensors = _enclosed(config, hf, weights.tensors(config, hf, origin), origin.folder)
    files = {
        **_sidecars(origin.folder, config, extra_files),
        folders.CONFIG: json.dumps(hf, indent=2, ensure_ascii=False) + "\n",
        MARKER: json.dumps({"format": 1, **weights.layout}) + "\n",
    }
    shards = plan_shards(tensors, max_shard_bytes)
    return _write(path, files, shards, weights.leaves, exported(tensors, weights.storage))


def _packing_of(packing: Packing, dtype: Any) -> Packing | None:
    """How weights are packed; None where another dtype than the source's was asked for."""
    if dtype is None or (isinstance(dtype, str) and dtype == "source"):
        return packing
    if packing == "source":
        raise ValueError(f"packing 'source' takes the source's dtypes, got dtype {dtype!r}")
    return None


def _common(dtypes: Mapping[tuple, np.dtype], config: ModelConfig) -> str | None:
    """The one dtype of all weights but those that are stored in their own; None: there are more."""
    exact = _exact_leaves(config)
    common = {str(found) for path, found in dtypes.items() if path not in exact}
    return common.pop() if len(common) == 1 else None


def _write(
    path: Path,
    files: Mapping[str, str | bytes],
    shards: list[list[Tensor]],
    leaves: Mapping[tuple, Any],
    planned: Exported,
) -> Exported:
    """Writes a folder, by one of the processes; returns what it holds."""
    error = PackingError()
    if is_writer():
        with replacing_folder(path, planned.nbytes) as temporary:
            for name, content in files.items():
                data = content.encode() if isinstance(content, str) else content
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (temporary / name).write_bytes(data)
            write_shards(temporary, shards, leaves, error)
    else:
        deque(assembled(shards, leaves, error), maxlen=0)  # what is gathered takes all processes
    barrier("save_hf")
    return replace(planned, errors=error.facts(), worst=error.worst)


def _enclosed(
    config: ModelConfig, hf: dict[str, Any], tensors: list[Tensor], origin: Path | None
) -> tuple[dict[str, Any], list[Tensor]]:
    """The file and the tensors of a text model in their place within the source, if it has one."""
    if origin is None or not (origin / folders.CONFIG).exists():
        return hf, tensors
    whole = folders.read_json(folders.file_inside(origin, folders.CONFIG))
    prefix = text_prefix(whole)
    if not prefix:
        return hf, tensors
    check_stock(config, _text_model(whole))
    beside = folders.tensors_beside(origin)
    packed = [key for key, info in beside.items() if info.dtype not in NAMES]
    if packed and "quantization_config" not in hf:
        raise ValueError(
            f"{origin}: {packed[0]}, which lies beside the text model, is packed, and the result, "
            "whose weights are not, cannot say so; dequantise the checkpoint first"
        )
    inside = [replace(tensor, key=prefix + tensor.key) for tensor in tensors]
    return with_text_part(whole, hf), [*inside, *carried_tensors(beside)]


def _text_model(whole: Mapping[str, Any]) -> str:
    return f"{whole['model_type']}: its text model"


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
            check_stock(result, _text_model(whole))
        if cut_further and result is not None:
            infos = folders.read_tensor_infos(origin) if folders.has_weights(origin) else {}
            check_further(result, folders.read_config_file(origin), infos)


def _dtypes(
    leaves: Mapping[tuple, Any], config: ModelConfig, dtype: Any, origin: Source
) -> dict[tuple, np.dtype]:
    """The dtype in which each leaf is stored."""
    if isinstance(dtype, str) and dtype == "source":
        if origin.hf is not None and origin.infos:
            return stored_dtypes(config, origin.hf, origin.infos)
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
