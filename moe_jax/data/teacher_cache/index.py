"""What a cache of the teacher's predictions holds, and all that decides it.

A cache is a folder. ``rows-00000.arrayrecord`` and those that follow hold the stream's rows in its
order, one record each: tokens [S], segment ids [S], the K most likely next tokens [S, K] (all
int32) and their log-probabilities [S, K], little-endian, one after the other. ``index.json`` says
what they are. It is written last: a folder without it is an unfinished cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from moe_jax.data.documents import chat_template_of, fingerprint
from moe_jax.data.tokenizer import tokenizer_digest
from moe_jax.files import write_json
from moe_jax.hf.folder import read_json
from moe_jax.identity import DIGITS, digest

# Names in a cache's folder; the second takes the first one's place until all files are there.
INDEX, UNFINISHED = "index.json", "unfinished.json"
# Raise the version when the records change, or the rows that ``training_dataset`` gives.
_FORMAT, _VERSION = "moe_jax teacher cache", 1
_LOG_PROB_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": "<f4"}


def text_facts(
    sources: Mapping[str, int | float] | Sequence[str],
    tokenizer: Any,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """All that decides the batches of ``training_dataset``; reads every source once.

    Returns:
        ``tokenizer`` (a digest), ``seq_len``, ``batch_size``, ``seed``, ``weights`` (None: by
        size), and ``text``: a digest of the sources' contents and of all the others.
    """
    names = [sources] if isinstance(sources, (str, Path)) else list(sources)
    facts = {
        "tokenizer": tokenizer_digest(tokenizer)[:DIGITS],
        "seq_len": seq_len,
        "batch_size": batch_size,
        "seed": seed,
        "weights": [float(w) for w in sources.values()] if isinstance(sources, Mapping) else None,
    }
    # Source by source: one glob that matches two files is another stream than two sources.
    template = filter(None, [chat_template_of(names, tokenizer)])
    return {**facts, "text": digest(facts, *map(fingerprint, names), *template)}


class Part(NamedTuple):
    """A file of a cache, whether it is there or not."""

    name: str
    first_row: int
    num_rows: int


@dataclass(frozen=True)
class CacheFacts:
    """What a cache holds, and all that decides it.

    Attributes:
        k: predictions per position.
        vocab_size: the teacher's.
        log_prob_dtype: how log-probabilities are stored: ``bfloat16`` (to 0.4% of their value) or
            ``float32``.
        teacher: ``identity.checkpoint_digest`` of its folder.
        compute_dtype: what it ran in.
        start: batches of the stream before the cache's first one.
        num_rows, rows_per_file: multiples of ``batch_size``.
        tokenizer, seq_len, batch_size, seed, weights, text: see ``text_facts``.
    """

    k: int
    vocab_size: int
    log_prob_dtype: str
    teacher: str
    compute_dtype: str
    start: int
    num_rows: int
    rows_per_file: int
    tokenizer: str
    seq_len: int
    batch_size: int
    seed: int
    weights: list[float] | None
    text: str

    def __post_init__(self) -> None:
        if self.log_prob_dtype not in _LOG_PROB_DTYPES:
            raise ValueError(
                f"log_prob_dtype must be one of {tuple(_LOG_PROB_DTYPES)}, "
                f"got {self.log_prob_dtype!r}"
            )
        if not 1 <= self.k <= self.vocab_size:
            raise ValueError(f"top_k must be in [1, vocab_size = {self.vocab_size}], got {self.k}")
        if self.start < 0:
            raise ValueError(f"start must be 0 or more batches, got {self.start}")
        for name in ("num_rows", "rows_per_file"):
            rows = getattr(self, name)
            if self.batch_size < 1 or rows < 1 or rows % self.batch_size:
                raise ValueError(
                    f"{name} must be a positive multiple of batch_size = {self.batch_size}, "
                    f"got {rows}"
                )

    @property
    def row_dtype(self) -> np.dtype:
        """One record."""
        predictions = (self.seq_len, self.k)
        return np.dtype(
            [
                ("tokens", "<i4", (self.seq_len,)),
                ("segment_ids", "<i4", (self.seq_len,)),
                ("teacher_ids", "<i4", predictions),
                ("teacher_log_probs", _LOG_PROB_DTYPES[self.log_prob_dtype], predictions),
            ]
        )

    @property
    def parts(self) -> list[Part]:
        """The files, in order."""
        return [
            Part(f"rows-{i:05}.arrayrecord", row, min(self.rows_per_file, self.num_rows - row))
            for i, row in enumerate(range(0, self.num_rows, self.rows_per_file))
        ]


class WrittenFile(NamedTuple):
    """A file that is there.

    Attributes:
        mass: the sum of the k probabilities over its ``positions`` that are not padding.
    """

    name: str
    rows: int
    bytes: int
    sha256: str
    positions: int
    mass: float

    def is_whole(self, folder: Path) -> bool:
        """Whether it has its size in ``folder``."""
        file = folder / self.name
        return file.is_file() and file.stat().st_size == self.bytes


@dataclass(frozen=True)
class Index:
    """The content of ``index.json``, or of ``unfinished.json`` before all files are there."""

    facts: CacheFacts
    files: tuple[WrittenFile, ...]

    @property
    def kept_mass(self) -> float:
        """The mean over positions of the sum of the k probabilities."""
        return sum(f.mass for f in self.files) / max(1, sum(f.positions for f in self.files))

    def write(self, file: Path) -> None:
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            **asdict(self.facts),
            "kept_mass": self.kept_mass,
            "files": [entry._asdict() for entry in self.files],
        }
        write_json(file, content)

    @classmethod
    def read(cls, file: Path) -> Index:
        """Raises ValueError if it is no index, one of another version, or damaged."""
        content = read_json(file)
        if content.get("format") != _FORMAT:
            raise ValueError(f"{file}: not the index of a teacher cache")
        if content.get("version") != _VERSION:
            raise ValueError(
                f"{file}: version must be {_VERSION}, got {content.get('version')!r}; make the "
                "cache again with this release of moe_jax"
            )
        try:
            facts = CacheFacts(**{field.name: content[field.name] for field in fields(CacheFacts)})
            index = cls(facts, tuple(WrittenFile(**entry) for entry in content["files"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: damaged: {error}") from error
        stated = {part.name: part.num_rows for part in facts.parts}
        found = {entry.name: entry.rows for entry in index.files}
        if not found.items() <= stated.items() or (file.name == INDEX and found != stated):
            raise ValueError(
                f"{file}: must state {facts.num_rows} rows in {len(stated)} files, "
                f"got {sum(found.values())} in {len(found)}"
            )
        return index

    def check(self, folder: Path, expected: Mapping[str, Any]) -> None:
        """Raises ValueError naming the first of the ``expected`` facts that is another one."""
        for name, value in expected.items():
            found = getattr(self.facts, name)
            if found != value:
                raise ValueError(
                    f"teacher cache {folder} does not fit: {name} must be {value!r}, got {found!r}"
                )
