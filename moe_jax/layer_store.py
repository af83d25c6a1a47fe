"""Layers of a model as files, one each: what a walk over the layers leaves behind it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.files import replacing_file, write_json
from moe_jax.hf.safetensors_file import TensorInfo, TensorReader, read_header, write_file
from moe_jax.params import leaves_with_path, nest, path_name
from moe_jax.stored import StoredLeaf, aligned_empty


class LayerStore:
    """A folder of layers. A layer is there as a whole or not at all, with what is told of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, i: int) -> bool:
        return self._file(i).exists()

    def write(self, i: int, weights: dict[str, Any], about: Any = None) -> None:
        """Writes layer ``i``, and JSON that says something of it first.

        Raises:
            OSError: there is no room for it.
        """
        write_json(self._file(i).with_suffix(".json"), about)
        leaves = [(path, np.asarray(leaf)) for path, leaf in leaves_with_path(weights)]
        # Wider numbers first, so that every tensor is aligned.
        leaves.sort(key=lambda item: -item[1].dtype.itemsize)
        header = [(path_name(path), leaf.shape, leaf.dtype) for path, leaf in leaves]
        with replacing_file(self._file(i)) as temporary:
            write_file(temporary, header, (leaf for _, leaf in leaves))

    def about(self, i: int) -> Any:
        """What was said of layer ``i``."""
        return json.loads(self._file(i).with_suffix(".json").read_text(encoding="utf-8"))

    def layer(self, i: int) -> dict[str, Any]:
        """Layer ``i``, not read yet.

        Raises:
            FileNotFoundError, ValueError: there is none, or a damaged one.
        """
        reader = TensorReader()  # a new one: a file that was written again is another file
        tensors = read_header(self._file(i)).items()
        return nest({_path(name): _leaf(reader, info) for name, info in tensors})

    def layers(self, count: int) -> list[dict[str, Any]]:
        """The first ``count`` layers, not read yet."""
        return [self.layer(i) for i in range(count)]

    def _file(self, i: int) -> Path:
        return self.folder / f"layer-{i}.safetensors"


def _leaf(reader: TensorReader, info: TensorInfo) -> StoredLeaf:
    def read(window: tuple[slice, ...]) -> np.ndarray:
        part = reader.read(info)[window]
        array = aligned_empty(part.shape, part.dtype)
        array[...] = part
        reader.release_pages()
        return array

    return StoredLeaf(info.shape, info.dtype, read, partial(reader.prefetch, info))


def _path(name: str) -> tuple:
    """Inverse of ``path_name``."""
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))
