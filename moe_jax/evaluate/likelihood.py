"""Log-likelihoods of continuations, in few compiled shapes and without logits nobody asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.metrics import progress_bar
from moe_jax.model import head_logits, head_params, hidden_states
from moe_jax.processes import on_mesh_of, one_ahead
from moe_jax.tokens import check_token_ids

BATCH_TOKENS = 4096
_SHORTEST = 32  # tokens of the smallest bucket
_LOGITS_BYTES = 64 * 2**20  # of float32 logits at a time
_MOST_POSITIONS = 1024  # whose logits are computed at a time

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Row:
    """One sequence to run, and the requests that it answers.

    Attributes:
        tokens: input ids; the last token of a continuation is only predicted.
        requests: (request, continuation's ids), which are predicted at the last positions.
    """

    tokens: tuple[int, ...]
    requests: tuple[tuple[int, tuple[int, ...]], ...]


def log_likelihoods(
    params: dict[str, Any],
    config: ModelConfig,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[tuple[float, bool]]:
    """ln p(continuation | context) of each pair, and whether greedy decoding gives it.

    1. Pairs that differ in their very last token alone (one-letter answers, say) share a row.
    2. Rows are sorted by length, longest first, and padded to ``bucket_lengths``: powers of two
       from 32, up to ``max_length``. A step has ``batch_tokens // length`` rows, so that at most
       two programs are compiled for each bucket, whatever the number of pairs: one that makes
       hidden states, and one that scores positions of them (shared by all buckets that divide
       ``batch_tokens``).
    3. Logits are made for continuations' positions only, in pieces of at most 64 MiB.

    What a pair yields does not depend on the others, but for rounding: a step never mixes
    sequences from the two sides of LongRoPE's switch.

    Args:
        pairs: token ids of context and continuation, at least one each. Contexts are cut on the
            left where both together, without the last token, exceed ``max_length``.
        max_length: tokens of context; None: ``config.max_positions``.
        batch_tokens: tokens of a step, padding included.

    Raises:
        ValueError: an empty context or continuation, one that ``max_length`` cannot hold, ids
            outside the vocabulary, or logits that are not finite.
    """
    limit = max_length or config.max_positions
    rows = _rows(pairs, limit)
    if not rows:
        return []
    check_token_ids(max(max(max(c), max(t)) for c, t in pairs), config.vocab_size)
    results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    batches = _batches(rows, bucket_lengths(config, limit), batch_tokens, config)
    started = ((batch, _start(params, config, batch, shape)) for batch, shape in batches)
    with progress_bar(len(pairs), "log-likelihoods", "requests") as progress:
        for batch, pieces in one_ahead(started):
            progress.update(_finish(batch, pieces, results))
    return results


def bucket_lengths(config: ModelConfig, max_length: int) -> list[int]:
    """Lengths to which sequences are padded, ascending: powers of two from 32 to ``max_length``.

    LongRoPE's ``original_positions`` is one of them, since padding beyond it would move the switch.
    """
    lengths = {max_length, config.rope.switch_length or max_length}
    length = _SHORTEST
    while length < max_length:
        lengths.add(length)
        length *= 2
    return sorted(length for length in lengths if length <= max_length)


def _rows(pairs, max_length: int) -> list[_Row]:
    grouped: dict[tuple[int, ...], list] = {}
    cut = 0
    for i, (context, continuation) in enumerate(pairs):
        if not len(context) or not 1 <= len(continuation) <= max_length:
            raise ValueError(
                f"a context must have tokens and a continuation 1 to {max_length}, got "
                f"{len(context)} and {len(continuation)} in pair {i}"
            )
        tokens = (*context, *continuation)[-(max_length + 1) : -1]
        cut += len(tokens) < len(context) + len(continuation) - 1
        grouped.setdefault(tokens, []).append((i, tuple(continuation)))
    if cut:
        _logger.warning("%d contexts were cut on the left to fit %d tokens", cut, max_length)
    rows = [_Row(tokens, tuple(requests)) for tokens, requests in grouped.items()]
    return sorted(rows, key=lambda row: (-len(row.tokens), row.tokens))


def _batches(
    rows: Sequence[_Row], buckets: Sequence[int], batch_tokens: int, config: ModelConfig
) -> Iterator[tuple[Sequence[_Row], tuple[int, int]]]:
    """Consecutive rows and the ``(B, S)`` of their step; the last step alone may lack rows."""
    switch = config.rope.switch_length
    start = 0
    while start < len(rows):
        longest = len(rows[start].tokens)
        length = next(bucket for bucket in buckets if bucket >= longest)
        size = max(1, batch_tokens // length)
        stop = min(start + size, len(rows))
        if switch is not None and longest > switch:
            while len(rows[stop - 1].tokens) <= switch:
                stop -= 1
        yield rows[start:stop], (size, length)
        start = stop


def _start(params, config: ModelConfig, batch: Sequence[_Row], shape: tuple[int, int]) -> list:
    """Starts a step; pieces of ``_score``, in the order of requests and their positions."""
    tokens, lengths = np.zeros(shape, np.int32), np.zeros(shape[0], np.int32)
    index: list[int] = []
    targets: list[int] = []
    for i, row in enumerate(batch):
        tokens[i, : len(row.tokens)] = row.tokens
        lengths[i] = len(row.tokens)
        end = i * shape[1] + len(row.tokens)
        for _, continuation in row.requests:
            index.extend(range(end - len(continuation), end))
            targets.extend(continuation)
    with on_mesh_of(params):
        states = _states(params, config, tokens, lengths)
    size = max(1, min(_MOST_POSITIONS, _LOGITS_BYTES // (4 * config.vocab_size)))
    pieces = []
    for start in range(0, len(index), size):
        queries = np.zeros((2, size), np.int32)
        part = np.array([index[start : start + size], targets[start : start + size]])
        queries[:, : part.shape[1]] = part
        pieces.append(_score(params, config, states, *queries))
    return pieces


def _finish(batch: Sequence[_Row], pieces: list, results: list[tuple[float, bool]]) -> int:
    """Writes a step's results; how many they are."""
    scores, greedy = (np.concatenate([np.asarray(p[i]) for p in pieces]) for i in (0, 1))
    start = done = 0
    for row in batch:
        for request, continuation in row.requests:
            here = slice(start, start + len(continuation))
            total = float(scores[here].astype(np.float64).sum())
            if not np.isfinite(total):
                raise ValueError(f"logits must be finite, got a log-likelihood of {total}")
            results[request] = total, bool(greedy[here].all())
            start = here.stop
            done += 1
    return done


@partial(jax.jit, static_argnames="config")
def _states(params, config, tokens, lengths):
    """Final hidden states of all positions, Float[B * S, D]."""
    segment_ids = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
    x, _ = hidden_states(params, config, tokens, segment_ids)
    return x.reshape(-1, x.shape[-1])


@partial(jax.jit, static_argnames="config")
def _score(params, config, states, index, targets):
    """ln p of ``targets`` after the positions ``index``, and whether each is the likeliest."""
    logits = head_logits(head_params(params, config), config, states[index])
    chosen = jnp.take_along_axis(logits, targets[:, None], -1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, -1), logits.argmax(-1) == targets
