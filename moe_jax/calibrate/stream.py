"""The residual stream of a text before each layer, in host memory or in files."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.files import check_space, named, remove_stale, temporary_sibling


class Stream:
    """``[N, B, S, D]`` before a layer: the stream of N batches.

    In memory there is one array, which every ``writing`` overwrites batch by batch. In a folder
    each is a memory-mapped file, whole or absent, so that a walk that was killed goes on where it
    was; those of earlier layers stay if ``keep``, and go with ``drop`` otherwise.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: Any, folder: Path | None = None, keep: bool = False
    ) -> None:
        self._shape, self._dtype = shape, np.dtype(dtype)
        self._folder, self.keep = folder, keep
        self._array = np.empty(shape, self._dtype) if folder is None else None

    @property
    def nbytes(self) -> int:
        """Of the stream before one layer."""
        return int(np.prod(self._shape)) * self._dtype.itemsize

    def has(self, layer: int) -> bool:
        """Whether a file holds the stream before ``layer``."""
        return self._folder is not None and self._file(layer).exists()

    def furthest(self, num_layers: int) -> int | None:
        """The last layer that a file holds the stream before; None: there is none."""
        return next((i for i in range(num_layers, -1, -1) if self.has(i)), None)

    def before(self, layer: int) -> np.ndarray:
        """The stream before ``layer``, as it was written."""
        if self._array is not None:
            return self._array
        array = np.memmap(self._file(layer), self._dtype, "r", shape=self._shape)
        _let_go(array)
        return np.asarray(array)

    @contextmanager
    def writing(self, layer: int) -> Iterator[np.ndarray]:
        """A buffer for the stream before ``layer``, which is there once the block has ended.

        Raises:
            OSError: there is no room for it.
        """
        if self._array is not None:
            yield self._array
            return
        file = self._file(layer)
        file.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(file)
        temporary = temporary_sibling(file)
        try:
            check_space(file, self.nbytes)
            with temporary.open("wb") as new:
                if hasattr(os, "posix_fallocate"):  # a map of a full disk would end the process
                    os.posix_fallocate(new.fileno(), 0, self.nbytes)
                new.truncate(self.nbytes)
            array = np.memmap(temporary, self._dtype, "r+", shape=self._shape)
            yield array
            array.flush()
            _let_go(array)
            temporary.replace(file)
        except OSError as error:
            raise named(error, file, self.nbytes) from error
        finally:
            temporary.unlink(missing_ok=True)

    def drop(self, layer: int) -> None:
        """Deletes the file of the stream before ``layer``, unless all are kept."""
        if self._folder is not None and not self.keep:
            self._file(layer).unlink(missing_ok=True)

    def remove(self) -> None:
        """Deletes all files."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, layer: int) -> Path:
        assert self._folder is not None  # a stream in memory has no files
        return self._folder / f"{layer}.stream"


def _let_go(array: np.memmap) -> None:
    """Lets the operating system take back the pages: what was written is in the file."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
