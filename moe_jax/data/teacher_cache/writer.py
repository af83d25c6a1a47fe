"""Writing a cache of the teacher's predictions: file by file, each whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from moe_jax.data.teacher_cache.index import INDEX, UNFINISHED, CacheFacts, Index, Part, WrittenFile
from moe_jax.data.teacher_cache.reader import TeacherCache, open_teacher_cache
from moe_jax.files import LOCK, replacing_file
from moe_jax.identity import file_sha256

Batch = Mapping[str, Any]
# Grain reads single records; the library compresses them by itself.
_OPTIONS = "group_size:1"


class TeacherCacheWriter:
    """Makes a cache, or what is left of one whose making was killed.

    Args:
        folder: absent, empty, or a cache with the same facts.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: it holds a cache with other facts; names the first that differs.
    """

    def __init__(self, folder: str | Path, facts: CacheFacts) -> None:
        self.folder = check_cache_folder(folder)
        self.facts = facts
        self._files: dict[str, WrittenFile] = {}
        for name in (UNFINISHED, INDEX):
            if (self.folder / name).exists():
                index = Index.read(self.folder / name)
                index.check(self.folder, asdict(facts))
                self._files = {f.name: f for f in index.files if f.is_whole(self.folder)}

    @property
    def missing(self) -> list[Part]:
        """Files still to be written; none, the cache is finished."""
        return [part for part in self.facts.parts if part.name not in self._files]

    @property
    def first_batch(self) -> int:
        """Where writing begins, in batches after the cache's own first one."""
        row = self.missing[0].first_row if self.missing else self.facts.num_rows
        return row // self.facts.batch_size

    @property
    def bytes_left(self) -> int:
        """Size of the missing files before compression, which about halves them."""
        return sum(part.num_rows for part in self.missing) * self.facts.row_dtype.itemsize

    def write(
        self, batches: Iterable[Batch], predict: Callable[[Iterator[Batch]], Iterable[Batch]]
    ) -> TeacherCache:
        """Writes what is missing.

        Args:
            batches: the stream from ``first_batch`` on.
            predict: gives the same batches with ``teacher_ids`` Int[B, S, K] and
                ``teacher_log_probs`` Float[B, S, K].

        Raises:
            OSError: a file cannot be written; those before it stay.
            ValueError: the stream ends too early.
            FloatingPointError: a probability is not a number.
        """
        stream, first = iter(batches), self.first_batch * self.facts.batch_size
        if self.missing:
            self._write_index(UNFINISHED)
            (self.folder / INDEX).unlink(missing_ok=True)  # of a cache that lost a file
        for part in self.facts.parts:
            if part.first_row < first:
                continue
            own = itertools.islice(stream, part.num_rows // self.facts.batch_size)
            if part.name in self._files:
                deque(own, maxlen=0)
            else:
                file = _write_file(self.folder / part.name, part, predict(own), self.facts)
                self._files[part.name] = file
                self._write_index(UNFINISHED)
        if not (self.folder / INDEX).exists():
            self._write_index(INDEX)
        (self.folder / UNFINISHED).unlink(missing_ok=True)
        return open_teacher_cache(self.folder, verify=False)

    def _write_index(self, name: str) -> None:
        files = [self._files[p.name] for p in self.facts.parts if p.name in self._files]
        Index(self.facts, tuple(files)).write(self.folder / name)


def check_cache_folder(folder: str | Path) -> Path:
    """The folder, if a cache may be written there.

    Raises:
        FileExistsError: it is a file, or holds something that is not a cache's.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output must be a folder, got the file {folder}")
    names = [file.name for file in folder.iterdir()] if folder.exists() else []
    # A writer that was killed at once leaves its lock and a half-written index.
    foreign = any(n != LOCK and not n.startswith(f".{UNFINISHED}.writing-") for n in names)
    if foreign and INDEX not in names and UNFINISHED not in names:
        raise FileExistsError(
            f"output {folder} exists and is not a teacher cache ({INDEX} is missing); name another "
            "one or empty it"
        )
    return folder


def _write_file(file: Path, part: Part, batches: Iterable[Batch], facts: CacheFacts) -> WrittenFile:
    names = facts.row_dtype.names or ()
    count = positions = 0
    mass = 0.0
    with replacing_file(file) as temporary:
        with _as_os_errors(file):
            writer = ArrayRecordWriter(str(temporary), _OPTIONS)
        for batch in batches:
            rows = np.empty(facts.batch_size, facts.row_dtype)
            for name in names:
                rows[name] = np.asarray(batch[name])
            with _as_os_errors(file):
                for row in rows:
                    writer.write(row.tobytes())
            # Before rounding, and in float64: sums of many numbers near one.
            kept = np.exp(np.asarray(batch["teacher_log_probs"], np.float64)).sum(-1)
            kept = kept[rows["segment_ids"] > 0]
            count, positions, mass = count + len(rows), positions + kept.size, mass + kept.sum()
            if not math.isfinite(mass):
                raise FloatingPointError(
                    f"the teacher's probabilities must be finite, got {mass} among {count} rows "
                    f"for {file}"
                )
        with _as_os_errors(file):
            writer.close()
        if count != part.num_rows:
            raise ValueError(f"the stream must give {part.num_rows} rows for {file}, got {count}")
        size, digest = temporary.stat().st_size, file_sha256(temporary)
    return WrittenFile(file.name, count, size, digest, positions, float(mass))


@contextlib.contextmanager
def _as_os_errors(file: Path) -> Iterator[None]:
    """What the library raises on a full disk and the like, as what it is."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(errno.EIO, f"cannot write: {error}", str(file)) from error
