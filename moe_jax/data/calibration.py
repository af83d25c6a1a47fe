"""Calibration batches: balanced over domains, seeded, one compiled shape."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_jax.data.documents import Document, expand_files, read_documents
from moe_jax.data.tokenizer import between, boundary_tokens, encode_documents
from moe_jax.settings import CalibrationConfig, check_values
from moe_jax.tokens import check_token_ids

_logger = logging.getLogger(__name__)

# Documents are drawn from this much of each file's beginning, so that a huge or endless source
# costs seconds, not hours.
_MAX_CHARACTERS_PER_FILE = 64_000_000
# Above what any tokenizer averages; spaces in code come closest.
_CHARACTERS_PER_TOKEN = 16
_DOCUMENTS_PER_CALL = 16


def calibration_batches(
    settings: CalibrationConfig, tokenizer: Any, *, seed: int = 0, vocab_size: int | None = None
) -> list[dict[str, np.ndarray]]:
    """Draws sequences for calibration, as many from each file as from the others, if they last.

    1. Each file's documents are shuffled.
    2. A document, after its boundary token, becomes a row: a random window of it if it is longer
       than ``seq_len``, else all of it and padding. With ``pack``, documents are joined with
       boundary tokens between them and cut into rows without padding.
    3. Rows are taken from the files in turn.

    Args:
        settings: files, chats among them, and sizes. The last batch is filled up with masked rows.
        vocab_size: the model's; token ids are checked against it.

    Returns:
        ``{"tokens": Int32[B, S], "mask": Bool[B, S]}`` per batch; the mask is False on padding. If
        there are fewer rows than ``num_sequences``, a warning says so.

    Raises:
        FileNotFoundError: a name matches nothing.
        ValueError: a setting out of its bounds, no text at all, or a token id not below
            ``vocab_size``.
    """
    check_values(settings)
    wanted = settings.num_sequences
    rng = np.random.default_rng(seed)
    names = expand_files(settings.files)
    names = [names[i] for i in rng.permutation(len(names))]
    streams = [
        _file_rows(name, stream_rng, tokenizer, settings)
        for name, stream_rng in zip(names, rng.spawn(len(names)), strict=True)
    ]
    rows = list(itertools.islice(_in_turn(streams), wanted))
    if not rows:
        raise ValueError(f"no tokens in {', '.join(names)}")
    check_token_ids(max(int(row.max()) for row in rows), vocab_size)
    if len(rows) < wanted:
        hint = "" if settings.pack else "; pack=True cuts long documents into several"
        found = f"{len(rows)} of the {wanted} calibration sequences wanted"
        _logger.warning("%s: no more text in %s%s", found, ", ".join(names), hint)
    return _batches(rows, settings.seq_len, settings.batch_size)


def _file_rows(
    name: str, rng: np.random.Generator, tokenizer: Any, settings: CalibrationConfig
) -> Iterator[np.ndarray]:
    """Rows Int32[N <= S] of one file; nothing is read before the first is asked for."""
    seq_len, wanted = settings.seq_len, settings.num_sequences
    num_characters = wanted * seq_len * _CHARACTERS_PER_TOKEN if settings.pack else 0
    drawn = _drawn(read_documents(name, tokenizer=tokenizer), rng, wanted, num_characters)
    documents = _encoded(drawn, tokenizer, settings.pack)
    if settings.pack:
        yield from _blocks(documents, seq_len)
        return
    for document in documents:
        start = rng.integers(max(1, len(document) - seq_len + 1))
        yield document[start : start + seq_len]


def _drawn(
    documents: Iterator[Document], rng: np.random.Generator, num_documents: int, num_characters: int
) -> list[Document]:
    """Documents of one file, shuffled: at least so many and with so many characters, if it can."""
    read: list[Document] = []
    size = 0
    for document in documents:
        read.append(document)
        size += len(document.text)
        if size >= _MAX_CHARACTERS_PER_FILE:
            break
    drawn: list[Document] = []
    for i in rng.permutation(len(read)):
        if len(drawn) >= num_documents and num_characters <= 0:
            break
        drawn.append(read[i])
        num_characters -= len(read[i].text)
    return drawn


def _encoded(documents: list[Document], tokenizer: Any, separated: bool) -> Iterator[np.ndarray]:
    """Documents after their boundary token; ``separated``: and before one that ends them.

    A row of its own holds a chat exactly as ``apply_chat_template`` gives it to the model in use.
    """
    start, end = boundary_tokens(tokenizer)
    after = [end] if separated and end != start else []
    for i in range(0, len(documents), _DOCUMENTS_PER_CALL):
        some = documents[i : i + _DOCUMENTS_PER_CALL]
        encoded = encode_documents(tokenizer, [document.text for document in some])
        for ids, document in zip(encoded, some, strict=True):
            before = [] if document.is_chat and not separated else [start]
            if len(ids):
                yield between(before, ids, after, document.is_chat)


def _blocks(documents: Iterator[np.ndarray], seq_len: int) -> Iterator[np.ndarray]:
    rest = np.zeros(0, np.int32)
    for document in documents:
        rest = np.concatenate([rest, document])
        while len(rest) >= seq_len:
            yield rest[:seq_len]
            rest = rest[seq_len:]
    if len(rest):
        yield rest


def _in_turn(streams: list[Iterator[np.ndarray]]) -> Iterator[np.ndarray]:
    while streams:
        alive = []
        for stream in streams:
            row = next(stream, None)
            if row is not None:
                alive.append(stream)
                yield row
        streams = alive


def _batches(rows: list[np.ndarray], seq_len: int, batch_size: int) -> list[dict[str, np.ndarray]]:
    num_rows = -(-len(rows) // batch_size) * batch_size
    tokens = np.zeros((num_rows, seq_len), np.int32)
    mask = np.zeros((num_rows, seq_len), np.bool_)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = True
    return [
        {"tokens": tokens[i : i + batch_size], "mask": mask[i : i + batch_size]}
        for i in range(0, num_rows, batch_size)
    ]
