"""Held-out text per domain, cut so that every token is predicted exactly once."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_jax.data.documents import Document, domain_names, expand_files, read_documents
from moe_jax.data.tokenizer import between, boundary_tokens, encode_documents
from moe_jax.settings import EvaluationConfig, check_values
from moe_jax.tokens import check_token_ids

_Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class TextSize:
    """How much text a domain, or all domains together, have.

    Attributes:
        num_bytes: UTF-8 bytes of the text that the targets spell.
        num_tokens: number of targets.
        num_documents: number of documents.
    """

    num_bytes: int
    num_tokens: int
    num_documents: int

    def bits_per_byte(self, total_nll: float) -> float:
        """Bits per UTF-8 byte, given the sum over all targets of -ln p (nats)."""
        return total_nll / math.log(2) / self.num_bytes


@dataclass(frozen=True)
class EvaluationWindows:
    """Text of several domains, as batches that they share, for a held-out loss of each.

    Attributes:
        domains: by name, how much text there is.
        batches: each ``{"tokens", "targets", "segment_ids": Int32[B, S], "mask": Bool[B, S]}``.
            ``targets[b, s]`` follows ``tokens[b, s]``; the mask is True where there is one.
            Attention stays within a segment (1, 2, ... in a row; 0 is padding).
        owners: Int[number of batches * B], which of the domains each row belongs to; rows of
            padding alone count as the first one's.
    """

    domains: Mapping[str, TextSize]
    batches: Sequence[_Batch]
    owners: np.ndarray

    @property
    def total(self) -> TextSize:
        """Of all domains."""
        sizes = list(self.domains.values())
        return TextSize(
            sum(size.num_bytes for size in sizes),
            sum(size.num_tokens for size in sizes),
            sum(size.num_documents for size in sizes),
        )

    def by_domain(self, rows: Sequence[np.ndarray]) -> dict[str, float]:
        """Sums over the rows of each domain, in float64, of values [B] for each batch."""
        sums = np.bincount(self.owners, np.concatenate(rows), len(self.domains))
        return dict(zip(self.domains, sums.tolist(), strict=True))


def evaluation_windows(
    settings: EvaluationConfig, tokenizer: Any, *, vocab_size: int | None = None
) -> EvaluationWindows:
    """Cuts each file's text into windows for its loss under a model.

    1. A document is put after its boundary token and cut into windows of ``seq_len + 1`` tokens
       that overlap by one: the last target of a window is the first input of the next.
    2. A document's short last window shares its row with others of its domain, as segments, best
       fit first. Rows of all domains follow each other in the batches.

    Args:
        settings: files, each a domain that is named by its stem, and sizes. The last batch is
            filled up with padding.
        vocab_size: the model's; token ids are checked against it.

    Raises:
        FileNotFoundError: a name matches nothing.
        ValueError: a setting out of its bounds, a file without text, text in which the tokenizer
            finds no token, or a token id not below ``vocab_size``.
    """
    check_values(settings)
    seq_len, batch_size = settings.seq_len, settings.batch_size
    max_bytes = settings.max_bytes or None
    names = expand_files(settings.files)
    domains: dict[str, TextSize] = {}
    rows: list[list[np.ndarray]] = []
    owners: list[int] = []
    for domain, name in zip(domain_names(names), names, strict=True):
        texts = list(_limited(read_documents(name, tokenizer=tokenizer), max_bytes))
        if not texts:
            raise ValueError(f"max_bytes must hold a character of {name}, got {max_bytes}")
        documents = list(_encoded(texts, tokenizer))
        num_tokens = sum(len(document) - 1 for document in documents)
        if not num_tokens:
            raise ValueError(f"no tokens in {name}: the tokenizer finds none in its text")
        check_token_ids(max(int(document.max()) for document in documents), vocab_size)
        filled = _best_fit(_cut(documents, seq_len), seq_len)
        rows += filled
        owners += [len(domains)] * len(filled)
        num_bytes = sum(len(text.text.encode()) for text in texts)
        domains[domain] = TextSize(num_bytes, num_tokens, len(documents))
    missing = -len(rows) % batch_size
    batches = _batches(rows + [[]] * missing, seq_len, batch_size)
    return EvaluationWindows(domains, batches, np.array(owners + [0] * missing))


def _limited(documents: Iterator[Document], max_bytes: int | None) -> Iterator[Document]:
    """Documents up to ``max_bytes``; the one that passes them is cut, between characters."""
    left = max_bytes
    for document in documents:
        if left is None:
            yield document
            continue
        encoded = document.text.encode()[:left]
        if text := encoded.decode(errors="ignore"):
            yield document._replace(text=text)
        left -= len(encoded)
        if left <= 0:
            return


def _encoded(texts: Sequence[Document], tokenizer: Any) -> Iterator[np.ndarray]:
    start, _ = boundary_tokens(tokenizer)
    encoded = encode_documents(tokenizer, [text.text for text in texts])
    for ids, text in zip(encoded, texts, strict=True):
        yield between([start], ids, [], text.is_chat)


def _cut(documents: Sequence[np.ndarray], seq_len: int) -> list[np.ndarray]:
    return [
        document[i : i + seq_len + 1]
        for document in documents
        for i in range(0, len(document) - 1, seq_len)
    ]


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


def _batches(rows: list[list[np.ndarray]], seq_len: int, batch_size: int) -> list[_Batch]:
    tokens, targets, segment_ids = np.zeros((3, len(rows), seq_len), np.int32)
    for i, windows in enumerate(rows):
        ends = itertools.accumulate(len(window) - 1 for window in windows)
        for segment, (window, stop) in enumerate(zip(windows, ends, strict=True), 1):
            place = slice(stop - len(window) + 1, stop)
            tokens[i, place], targets[i, place] = window[:-1], window[1:]
            segment_ids[i, place] = segment
    mask = segment_ids > 0
    arrays = {"tokens": tokens, "targets": targets, "mask": mask, "segment_ids": segment_ids}
    return [
        {key: array[i : i + batch_size] for key, array in arrays.items()}
        for i in range(0, len(rows), batch_size)
    ]
