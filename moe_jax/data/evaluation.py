"""Held-out text per domain, cut so that every token is predicted exactly once."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_jax.data.documents import Files, domain_names, expand_files, read_documents
from moe_jax.data.tokenizer import (
    boundary_tokens,
    check_token_ids,
    encode_documents,
)


@dataclass(frozen=True)
class EvaluationWindows:
    """One domain's text as batches for a held-out loss.

    Attributes:
        batches: each ``{"tokens", "targets", "segment_ids": Int32[B, S], "mask": Bool[B, S]}``.
            ``targets[b, s]`` follows ``tokens[b, s]``; the mask is True where there is one.
            Attention stays within a segment (1, 2, ... in a row; 0 is padding).
        num_bytes: UTF-8 bytes of the text that the targets spell.
        num_tokens: number of targets.
        num_documents: number of documents.
    """

    batches: list[dict[str, np.ndarray]]
    num_bytes: int
    num_tokens: int
    num_documents: int

    def bits_per_byte(self, total_nll: float) -> float:
        """Bits per UTF-8 byte, given the sum over all targets of -ln p (nats)."""
        return total_nll / math.log(2) / self.num_bytes


def evaluation_windows(
    files: Files,
    tokenizer: Any,
    *,
    seq_len: int,
    batch_size: int,
    max_bytes: int | None = None,
    vocab_size: int | None = None,
    text_key: str = "text",
) -> dict[str, EvaluationWindows]:
    """Cuts each file's text into windows for its loss under a model.

    1. A document is put after its boundary token and cut into windows of ``seq_len + 1`` tokens
       that overlap by one: the last target of a window is the first input of the next.
    2. A document's short last window shares its row with others, as segments, best fit first.

    Args:
        files: names or globs, as in ``read_documents``; each file is a domain, named by its stem.
        tokenizer: what ``load_tokenizer`` returns.
        seq_len: S, inputs per row.
        batch_size: B, rows per batch. The last batch of a domain is filled up with padding.
        max_bytes: use so many UTF-8 bytes of each file at most, from its beginning.
        vocab_size: the model's; token ids are checked against it.
        text_key: name of the JSON key or column that holds the text.

    Returns:
        Domain name -> ``EvaluationWindows``; all batches of all domains have one shape.

    Raises:
        FileNotFoundError: a name matches nothing.
        ValueError: an argument out of its bounds, a file without text, or a token id not below
            ``vocab_size``.
    """
    for name, value in (
        ("seq_len", seq_len),
        ("batch_size", batch_size),
        ("max_bytes", 1 if max_bytes is None else max_bytes),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    names = expand_files(files)
    return {
        domain: _domain_windows(
            name, tokenizer, seq_len, batch_size, max_bytes, vocab_size, text_key
        )
        for domain, name in zip(domain_names(names), names, strict=True)
    }


def _domain_windows(
    name: str,
    tokenizer: Any,
    seq_len: int,
    batch_size: int,
    max_bytes: int | None,
    vocab_size: int | None,
    text_key: str,
) -> EvaluationWindows:
    texts = list(_limited_texts(name, max_bytes, text_key))
    if not texts:
        raise ValueError(f"max_bytes must hold a character of {name}, got {max_bytes}")
    start, _ = boundary_tokens(tokenizer)
    documents = [
        np.concatenate(([start], ids)).astype(np.int32)
        for ids in encode_documents(tokenizer, texts)
    ]
    check_token_ids(max(int(document.max()) for document in documents), vocab_size)
    windows = [
        document[i : i + seq_len + 1]
        for document in documents
        for i in range(0, len(document) - 1, seq_len)
    ]
    return EvaluationWindows(
        batches=_batches(_best_fit(windows, seq_len), seq_len, batch_size),
        num_bytes=sum(len(text.encode()) for text in texts),
        num_tokens=sum(len(document) - 1 for document in documents),
        num_documents=len(documents),
    )


def _limited_texts(name: str, max_bytes: int | None, text_key: str) -> Iterator[str]:
    """Texts of one file; the one that passes ``max_bytes`` is cut, between characters."""
    left = max_bytes
    for document in read_documents(name, text_key=text_key):
        if left is None:
            yield document.text
            continue
        encoded = document.text.encode()[:left]
        text = encoded.decode(errors="ignore")
        if text:
            yield text
        left -= len(encoded)
        if left <= 0:
            return


def _best_fit(windows: list[np.ndarray], seq_len: int) -> list[list[np.ndarray]]:
    """Windows of 2..S+1 tokens per row of S inputs, longest first, each where it fits closest."""
    rows: list[list[np.ndarray]] = []
    spaces: list[tuple[int, int]] = []  # (inputs left, row), sorted
    for window in sorted(windows, key=len, reverse=True):
        length = len(window) - 1
        found = bisect.bisect_left(spaces, (length, 0))
        if found < len(spaces):
            space, row = spaces.pop(found)
        else:
            space, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(window)
        if space > length:
            bisect.insort(spaces, (space - length, row))
    return rows


def _batches(
    rows: list[list[np.ndarray]], seq_len: int, batch_size: int
) -> list[dict[str, np.ndarray]]:
    num_rows = -(-len(rows) // batch_size) * batch_size
    tokens, targets, segment_ids = np.zeros((3, num_rows, seq_len), np.int32)
    for i, windows in enumerate(rows):
        position = 0
        for segment, window in enumerate(windows, 1):
            stop = position + len(window) - 1
            tokens[i, position:stop] = window[:-1]
            targets[i, position:stop] = window[1:]
            segment_ids[i, position:stop] = segment
            position = stop
    arrays = {
        "tokens": tokens,
        "targets": targets,
        "mask": segment_ids > 0,
        "segment_ids": segment_ids,
    }
    return [
        {key: array[i : i + batch_size] for key, array in arrays.items()}
        for i in range(0, num_rows, batch_size)
    ]
