"""The training stream: tokenised once, shuffled, packed, mixed and batched by random access."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from tqdm import tqdm

from moe_jax.data.documents import Files, expand_files, fingerprint, read_documents
from moe_jax.data.tokenizer import (
    between,
    boundary_tokens,
    bounded_batches,
    encode_documents,
    largest_token_id,
)
from moe_jax.settings import TrainingConfig, check_bounds
from moe_jax.tokens import check_token_ids

Batch = dict[str, np.ndarray]

_logger = logging.getLogger(__name__)
_STORE_FORMAT = 1


class TokenStore(NamedTuple):
    """Tokenised documents of one source.

    Attributes:
        tokens: UInt16 or UInt32 [sum of lengths], on disk; every document stands between its
            boundary tokens.
        offsets: Int64[documents + 1], where each document starts.
        facts: ``num_documents``, ``num_tokens``, ``num_bytes`` (UTF-8) and ``largest_token_id``.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    facts: dict[str, int]


def training_dataset(
    settings: TrainingConfig,
    tokenizer: Any,
    *,
    seed: int,
    start: int = 0,
    num_epochs: int | float | None = None,
    vocab_size: int | None = None,
) -> grain.IterDataset:
    """An endless or bounded stream of packed batches.

    1. Each source is tokenised once; later runs map the result from ``cache_dir``.
    2. Its documents are shuffled, anew in every epoch, joined and cut into rows of ``seq_len``
       tokens: no padding, and long documents go on in another row.
    3. Rows, not documents, are mixed by weight, so that a weight is a share of *tokens*.

    Every batch is a function of ``seed`` and its index, so resuming is exact and costs nothing:
    ``iterator.get_state()`` and ``set_state()``.

    Args:
        settings: ``files`` by weight (any positive scale), or weighed by their numbers of tokens;
            ``seq_len``, S; ``batch_size``, B; ``cache_dir``, where
            tokens are kept (default ``~/.cache/moe_jax/tokens``, ``$XDG_CACHE_HOME`` is
            honoured), in entries that are keyed by file contents and tokenizer.
        start: batches to leave out at the beginning: a later stage goes on where the last stopped.
        num_epochs: stop after this many times the rows of all sources together (with weights,
            some sources pass more often than others by then); None never stops.
        vocab_size: the model's; token ids are checked against it.

    Returns:
        Elements ``{"tokens": Int32[B, S], "segment_ids": Int32[...]}``. Segments
        number a row's documents 1, 2, ...; 0 is padding, found only if a source has less than
        ``seq_len`` tokens. Labels are the next tokens within a segment.

    Raises:
        FileNotFoundError: a source matches no file.
        ValueError: an argument out of its bounds, a token id not below ``vocab_size``, no text,
            or fewer rows than one batch.
    """
    seq_len, batch_size = settings.seq_len, settings.batch_size
    check_bounds("seq_len", seq_len, ">= 2")
    check_bounds("start", start, ">= 0")
    if num_epochs is not None:
        check_bounds("num_epochs", num_epochs, "(0, inf)")
    check_bounds("batch_size", batch_size, ">= 1")
    weighted = _weights(settings.files)
    for name in weighted:
        expand_files(name)
    cache = _cache_folder(settings.cache_dir)
    stores = [tokenized(name, tokenizer, cache) for name in weighted]
    check_token_ids(max(store.facts["largest_token_id"] for store in stores), vocab_size)

    rows = [PackedRows(store, seq_len, seed=(seed, i)) for i, store in enumerate(stores)]
    weights = [
        store.facts["num_tokens"] if weight is None else weight
        for store, weight in zip(stores, weighted.values(), strict=True)
    ]
    num_rows = sys.maxsize
    if num_epochs is not None:
        num_rows = round(num_epochs * sum(r.rows_per_epoch for r in rows))
    num_batches = num_rows // batch_size - start
    if num_batches < 1:
        raise ValueError(
            f"the sources must give at least one batch of batch_size = {batch_size} rows after "
            f"start = {start}, got {num_rows} rows of seq_len = {seq_len} in "
            f"num_epochs = {num_epochs}"
        )
    mixed = grain.MapDataset.mix([grain.MapDataset.source(r) for r in rows], weights)
    source = BatchSource(mixed, _stacked, start * batch_size, num_batches, batch_size)
    return source.dataset()


@dataclass(frozen=True)
class BatchSource:
    """Batches by number (a grain data source).

    Attributes:
        rows: anything with ``rows[i]``.
        collate: makes a batch of what these are.
        first_row: where the first batch begins.
        num_batches: in all.
        batch_size: rows of each.
    """

    rows: Any
    collate: Callable[[Sequence[Any]], Batch]
    first_row: int
    num_batches: int
    batch_size: int

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> Batch:
        start = self.first_row + index * self.batch_size
        return self.collate([self.rows[i] for i in range(start, start + self.batch_size)])

    def dataset(self) -> grain.IterDataset:
        """The batches as a stream, read ahead."""
        # Grain's defaults (16 threads, 500 elements) suit slow storage; rows are slices of local
        # files here, and the cores belong to the training step.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
        return grain.MapDataset.source(self).to_iter_dataset(options)


class PackedRows:
    """Random access to packed rows of one source, epoch after epoch (a grain data source).

    Row ``i`` lies in epoch ``i // rows_per_epoch``, which has a permutation of the documents of
    its own; documents in that order, joined, are cut every ``seq_len`` tokens. What is left at the
    end of an epoch is dropped: less than a row, and other documents each time.
    """

    def __init__(self, store: TokenStore, seq_len: int, seed: Sequence[int]) -> None:
        self._store = store
        self._lengths = np.diff(store.offsets)
        self._seq_len = seq_len
        self._seed = tuple(seed)
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.rows_per_epoch = max(1, store.facts["num_tokens"] // seq_len)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, row = divmod(index, self.rows_per_epoch)
        order, ends = self._order(epoch)
        tokens = np.zeros(self._seq_len, np.int32)
        segment_ids = np.zeros(self._seq_len, np.int32)
        start = row * self._seq_len
        stop = min(start + self._seq_len, int(ends[-1]))
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        for segment, position in enumerate(range(first, last + 1), 1):
            # The document covers [end - length, end) of the epoch; this row sees [low, high).
            document, end = order[position], ends[position]
            low = max(start, end - self._lengths[document])
            high = min(stop, end)
            shift = self._store.offsets[document + 1] - end
            tokens[low - start : high - start] = self._store.tokens[low + shift : high + shift]
            segment_ids[low - start : high - start] = segment
        return {"tokens": tokens, "segment_ids": segment_ids}

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents in the order of ``epoch``, and where each ends in it."""
        found = self._orders.get(epoch)
        if found is None:
            order = np.random.default_rng((*self._seed, epoch)).permutation(len(self._lengths))
            found = order, np.cumsum(self._lengths[order])
            # Reading ahead touches at most two epochs at a time.
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = found
        return found


def _stacked(rows: Sequence[Batch]) -> Batch:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def tokenized(files: Files, tokenizer: Any, cache_dir: str | Path) -> TokenStore:
    """Tokens of ``files``, from ``cache_dir`` if they are there, else made and put there.

    An entry is a folder that appears complete or not at all, so that a killed run leaves nothing
    half-written and processes that share the folder do not disturb each other.

    Raises:
        FileNotFoundError: a name matches nothing.
        ValueError: a broken file, or no text in it.
    """
    key = fingerprint(files, tokenizer, store_format=_STORE_FORMAT)
    folder = Path(cache_dir) / key[:32]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp", dir=folder.parent))
        try:
            _write_store(scratch, files, tokenizer)
            _publish(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    facts = json.loads((folder / "facts.json").read_text())
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    return TokenStore(tokens, np.load(folder / "offsets.npy"), facts)


def _write_store(folder: Path, files: Files, tokenizer: Any) -> None:
    start, end = boundary_tokens(tokenizer)
    dtype = np.dtype(np.uint16 if largest_token_id(tokenizer) < 2**16 else np.uint32)
    lengths: list[int] = []
    largest = num_bytes = 0
    with (
        open(folder / "tokens.npy", "wb") as file,
        tqdm(desc=f"tokenising {files}", unit="B", unit_scale=True, disable=None) as progress,
    ):
        _write_header(file, dtype, 0)
        read = read_documents(files, tokenizer=tokenizer)
        for documents in bounded_batches(read, lambda document: len(document.text)):
            encoded = encode_documents(tokenizer, [document.text for document in documents])
            for ids, document in zip(encoded, documents, strict=True):
                if len(ids):
                    whole = between([start], ids, [end], document.is_chat)
                    file.write(whole.astype(dtype).tobytes())
                    lengths.append(len(whole))
                    largest = max(largest, int(ids.max()))
            size = sum(len(document.text.encode()) for document in documents)
            num_bytes += size
            progress.update(size)
        # numpy leaves room in a header for its first dimension to grow.
        file.seek(0)
        _write_header(file, dtype, sum(lengths))
    if not lengths:
        raise ValueError(f"no tokens in {files}")
    np.save(folder / "offsets.npy", np.cumsum([0, *lengths]))
    facts = {
        "num_documents": len(lengths),
        "num_tokens": sum(lengths),
        "num_bytes": num_bytes,
        "largest_token_id": max(largest, start, end),
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=2))


def _write_header(file: Any, dtype: np.dtype, length: int) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def _publish(scratch: Path, folder: Path) -> None:
    try:
        os.rename(scratch, folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, with the same contents
            raise


def _cache_folder(cache_dir: str) -> Path:
    if cache_dir:
        return Path(cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(base).expanduser() / "moe_jax" / "tokens"
    _logger.info("tokens are kept in %s", folder)
    return folder


def _weights(sources: Mapping[str, float] | Sequence[str]) -> dict[str, float | None]:
    if isinstance(sources, (str, Path)):
        sources = [str(sources)]
    if not sources:
        raise ValueError("sources must name at least one file, got none")
    if not isinstance(sources, Mapping):
        return {str(name): None for name in sources}
    for name, weight in sources.items():
        check_bounds(f"weight of {name}", weight, "(0, inf)")
    return {str(name): float(weight) for name, weight in sources.items()}
