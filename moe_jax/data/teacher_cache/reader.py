"""Reading a cache of the teacher's predictions as a training stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from moe_jax.data.teacher_cache.index import INDEX, CacheFacts, Index, WrittenFile
from moe_jax.data.training import Batch, BatchSource
from moe_jax.identity import file_sha256

_COMMAND = "python -m moe_jax.cache_teacher with the same configuration"


def open_teacher_cache(
    folder: str | Path, *, expected: Mapping[str, Any] | None = None, verify: bool = True
) -> TeacherCache:
    """A finished cache, after everything about it is checked.

    Args:
        folder: what ``python -m moe_jax.cache_teacher`` wrote.
        expected: names of ``CacheFacts`` -> values, such as those of ``text_facts``. A cache may
            have a larger ``k`` than expected.
        verify: hash all files, which reads the whole cache once (about a second per GB); False
            checks sizes and numbers of records only.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not finished, not a cache, or of another version; a file that is missing,
            truncated or damaged; other facts than expected.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no such teacher cache: {folder}")
    if not (folder / INDEX).exists():
        raise ValueError(
            f"teacher cache {folder} is not finished ({INDEX} is missing); {_COMMAND} goes on with "
            "it"
        )
    index = Index.read(folder / INDEX)
    cache = TeacherCache(folder, index.facts, index.kept_mass)
    wanted = dict(expected or {})
    cache.check_top_k(wanted.pop("k", 1))
    index.check(folder, wanted)
    for entry in index.files:
        _check_file(folder / entry.name, entry, verify)
    return cache


def _check_file(file: Path, entry: WrittenFile, verify: bool) -> None:
    cure = f"delete it, and {_COMMAND} makes it again"
    if not file.is_file():
        raise ValueError(f"teacher cache: missing file {file}; {_COMMAND} makes it again")
    size = file.stat().st_size
    if size != entry.bytes:
        raise ValueError(f"{file} must have {entry.bytes} bytes, got {size}; {cure}")
    if verify and file_sha256(file) != entry.sha256:
        raise ValueError(f"{file} is damaged: its sha256 is not the one in {INDEX}; {cure}")
    try:
        reader = ArrayRecordReader(str(file))
        records = reader.num_records()
        reader.close()
    except RuntimeError as error:
        raise ValueError(f"{file} is damaged: {error}; {cure}") from error
    if records != entry.rows:
        raise ValueError(f"{file} must hold {entry.rows} records, got {records}; {cure}")


@dataclass(frozen=True)
class TeacherCache:
    """A stream like ``training_dataset``'s, with the teacher's predictions beside its tokens.

    Attributes:
        folder: where it lies.
        facts: what it holds.
        kept_mass: the mean over positions of the sum of the k probabilities.
    """

    folder: Path
    facts: CacheFacts
    kept_mass: float

    def dataset(self, start: int | None = None, batch_size: int | None = None) -> grain.IterDataset:
        """The batches that ``training_dataset`` gives with the same arguments, until they end.

        Args:
            start: batches of the *stream* to leave out at the beginning, as in
                ``training_dataset``, whatever the cache itself leaves out. None: all that the
                cache leaves out.
            batch_size: rows of each; None: what the cache was made with.

        Returns:
            Elements ``{"tokens", "segment_ids": Int32[B, S], "teacher_ids":
            Int32[..., S, K], "teacher_log_probs": Float32[..., S, K]}``.

        Raises:
            ValueError: not one batch.
        """
        self.check_length(1, start, batch_size)
        size = batch_size or self.facts.batch_size
        files = [str(self.folder / part.name) for part in self.facts.parts]
        records = grain.sources.ArrayRecordDataSource(files)
        first, number = self._first_row(start, size), self.num_batches(start, size)
        return BatchSource(records, self._decoded, first, number, size).dataset()

    def _decoded(self, records: Sequence[bytes]) -> Batch:
        rows = np.frombuffer(b"".join(records), self.facts.row_dtype)
        kinds = {"teacher_log_probs": np.float32}
        names = self.facts.row_dtype.names or ()
        return {name: rows[name].astype(kinds.get(name, np.int32)) for name in names}

    def num_batches(self, start: int | None = None, batch_size: int | None = None) -> int:
        """How many batches ``dataset`` yields with these arguments."""
        size = batch_size or self.facts.batch_size
        first = self._first_row(start, size)
        return (self.facts.num_rows - first) // size if 0 <= first < self.facts.num_rows else 0

    def check_length(
        self, batches: int, start: int | None = None, batch_size: int | None = None
    ) -> None:
        """Raises ValueError if ``dataset`` yields fewer than ``batches`` with these arguments."""
        facts, size = self.facts, batch_size or self.facts.batch_size
        found = self.num_batches(start, size)
        if found < batches:
            before = facts.start * facts.batch_size
            raise ValueError(
                f"teacher cache {self.folder} must hold {batches} batches of {size} rows"
                f"{'' if start is None else f' from batch {start} of the stream on'}, got {found}: "
                f"it has rows {before} to {before + facts.num_rows} of the stream; make one with "
                "other steps or start"
            )

    def check_top_k(self, k: int) -> None:
        """Raises ValueError if fewer than ``k`` predictions per position are stored."""
        if self.facts.k < k:
            raise ValueError(
                f"teacher cache {self.folder} does not fit: k must be at least {k}, "
                f"got {self.facts.k}"
            )

    def _first_row(self, start: int | None, batch_size: int) -> int:
        """The record that batch ``start`` of the stream begins with; negative: before the cache."""
        if start is None:
            return 0
        return start * batch_size - self.facts.start * self.facts.batch_size
