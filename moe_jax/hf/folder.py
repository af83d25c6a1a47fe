"""A checkpoint folder: finding it, and what may be read in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_jax.hf.nested import text_part, text_prefix
from moe_jax.hf.packed import scheme_of, unpacked
from moe_jax.hf.safetensors_file import TensorInfo, read_header

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHT_SUFFIXES = (*_PICKLE_SUFFIXES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
_COMPUTED = "rotary_emb.inv_freq"
_MAX_SIDECAR_BYTES = 100_000_000
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Text and safetensors only. Code is fetched as text, because an export carries it along; nothing
# here runs it.
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"]
_CARD = "README.md"
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".svg", ".gif")


def find_folder(path_or_id: str | Path) -> Path:
    """The folder of a checkpoint: a path as it is, or the local copy of a hub repository.

    Raises:
        FileNotFoundError: no such folder, and not the id of a repository that can be reached.
        NotADirectoryError: the path is a file.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"a checkpoint must be a folder, got the file {folder}")
    if not isinstance(path_or_id, str) or not _HUB_ID.fullmatch(path_or_id):
        raise FileNotFoundError(f"no such checkpoint folder: {folder}")
    return _fetched("snapshot_download", path_or_id, allow_patterns=_HUB_FILES)


def find_config(path_or_id: str | Path) -> Path:
    """The ``config.json`` of a file, a folder or a hub id; of the last, that file alone is fetched.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path_or_id).expanduser()
    if path.is_file():
        return path
    if path.exists() or not isinstance(path_or_id, str) or not _HUB_ID.fullmatch(path_or_id):
        return file_inside(find_folder(path_or_id), CONFIG)
    return _fetched("hf_hub_download", path_or_id, filename=CONFIG)


def _fetched(download: str, hub_id: str, **what: Any) -> Path:
    """What a function of ``huggingface_hub`` downloads, or has downloaded before."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(getattr(huggingface_hub, download)(hub_id, **what))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{hub_id!r} is neither a local folder nor a Hugging Face repository that can be "
            f"reached from here (offline, misspelt or gated?): {error}"
        ) from error


def file_inside(folder: Path, name: str) -> Path:
    """``folder / name``, which must be a file of that very folder.

    Raises:
        ValueError: a name with folders in it, or a link that leads out.
        FileNotFoundError: no such file.
    """
    plain = isinstance(name, str) and name not in ("", ".", "..") and "\\" not in name
    if not plain or Path(name).name != name:
        raise ValueError(f"{folder}: file names must not leave the folder, got {name!r}")
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: missing file {name}")
    _check_inside(folder, file)
    return file


def _check_inside(folder: Path, file: Path) -> None:
    """Links may lead to the ``blobs`` beside a snapshot of the hub's cache, nowhere else."""
    root, target = folder.resolve(), file.resolve()
    blobs = root.parent.parent / "blobs"
    if root.parent.name == "snapshots" and target.parent == blobs:
        return
    if not target.is_relative_to(root):
        raise ValueError(f"{file}: links must not leave the folder, got {target}")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: not JSON, or not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: must be a JSON object, got {type(value).__name__}")
    return value


def read_config_file(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a checkpoint's text model; errors are those of ``file_inside``.

    See ``nested`` for what else there may be.
    """
    return text_part(read_json(file_inside(folder, CONFIG)))


def has_weights(folder: Path) -> bool:
    """Whether the folder holds safetensors weights under their standard names."""
    return (folder / SINGLE).exists() or (folder / INDEX).exists()


def sidecar_files(folder: Path) -> dict[str, Path]:
    """Tokenizer, templates, generation config, licence and whatever else is small and no weight.

    Folders inside, such as ``additional_chat_templates``, are among them unless they hold weights:
    those are another model's. The model card and its pictures are left out: their numbers are the
    original's.

    Returns:
        Files by their path in the folder, with ``/`` between its parts.

    Raises:
        ValueError: a link among them leads out of the folder.
        OSError: one of them cannot be read.
    """
    files = {}
    for file in sorted(_walk(folder, folder)):
        name = file.relative_to(folder).as_posix()
        small = file.stat().st_size <= _MAX_SIDECAR_BYTES
        if name not in (CONFIG, _CARD) and not file.name.endswith(_PICTURE_SUFFIXES) and small:
            _check_inside(folder, file)
            file.open("rb").close()
            files[name] = file
    return files


def _walk(folder: Path, top: Path) -> Iterator[Path]:
    """Files that are no weights, of ``folder`` and of folders in it that hold none."""
    entries = [entry for entry in folder.iterdir() if entry.name[0] != "."]
    weights = [e for e in entries if e.name.endswith((*_WEIGHT_SUFFIXES, ".index.json"))]
    if weights and folder != top:
        return
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink() and entry.name != "__pycache__":
            yield from _walk(entry, top)
        elif entry.is_file() and entry not in weights:
            yield entry


def read_tensor_infos(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint's text model, from headers alone; packed ones as they are read.

    Frequencies of rotary embeddings, which old files store, are left out: they follow from
    ``config.json``.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
        ValueError: pickle weights, a damaged file, an index and shards that disagree, or
            quantised weights that are not read.
    """
    hf = read_json(file_inside(folder, CONFIG)) if (folder / CONFIG).exists() else {}
    prefix, scheme = text_prefix(hf), scheme_of(text_part(hf), folder)
    infos = {
        key.removeprefix(prefix): info
        for key, info in _all_tensors(folder).items()
        if key.startswith(prefix) and not key.endswith(_COMPUTED)
    }
    return unpacked(infos, scheme)


def tensors_beside(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint that is none of its text model's; errors as there."""
    prefix = text_prefix(read_json(file_inside(folder, CONFIG)))
    return {key: info for key, info in _all_tensors(folder).items() if not key.startswith(prefix)}


def _all_tensors(folder: Path) -> dict[str, TensorInfo]:
    if (folder / SINGLE).exists() and (folder / INDEX).exists():
        raise ValueError(f"{folder}: must hold {SINGLE} or {INDEX}, got both")
    if (folder / SINGLE).exists():
        return read_header(file_inside(folder, SINGLE))
    if (folder / INDEX).exists():
        return _read_shards(folder)
    pickled = sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLE_SUFFIXES)
    if pickled:
        raise ValueError(
            f"{folder}: weights must be safetensors; pickle files can run code when they are "
            f"read: {pickled[:3]}"
        )
    raise FileNotFoundError(f"{folder}: no weights; {SINGLE} or {INDEX} expected")


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(file_inside(folder, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX}: weight_map must be an object of tensor names")
    files = {str(name): file_inside(folder, name) for name in weight_map.values()}
    infos: dict[str, TensorInfo] = {}
    for name, file in files.items():
        for key, info in read_header(file).items():
            if weight_map.get(key) != name:
                raise ValueError(
                    f"{folder / INDEX}: {key} lies in {name}, the index says {weight_map.get(key)}"
                )
            infos[key] = info
    absent = [key for key in weight_map if key not in infos]
    if absent:
        raise ValueError(
            f"{folder / INDEX}: {len(absent)} tensors are not in the files that it names, "
            f"first {absent[:3]}"
        )
    return infos
