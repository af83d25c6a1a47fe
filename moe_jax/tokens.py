"""Token ids, checked where they come in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def token_ids(name: str, tokens: Any, vocab_size: int) -> Int[Array, "B S"]:
    """``tokens`` as an array, its ids checked unless ``jax.jit`` is tracing.

    An id outside the vocabulary would be clamped by the embedding, and give finite logits.

    Args:
        tokens: [B, S]: any array, also of another library, or nested lists.

    Raises:
        ValueError: another shape, numbers that are not integers, or ids outside [0, vocab_size).
    """
    if isinstance(tokens, jax.core.Tracer):
        return tokens
    if isinstance(tokens, jax.Array) and not tokens.is_fully_addressable:
        return tokens  # each host knows a part of them only
    # Not through jnp: 64 bits would be cut to 32 before they are looked at.
    ids = np.asarray(tokens)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name} must be integers [B, S], got {ids.dtype} {ids.shape}")
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        wrong = ids.max() if ids.min() >= 0 else ids.min()
        raise ValueError(f"{name} must be in [0, vocab_size = {vocab_size}), got {wrong}")
    return tokens if isinstance(tokens, jax.Array) else jnp.asarray(ids.astype(np.int32))


def check_token_ids(largest: int, vocab_size: int | None) -> None:
    """Raises ValueError if token id ``largest`` is not below ``vocab_size`` (None: no bound)."""
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"token ids must be below the model's vocab_size = {vocab_size}, got {largest}; "
            "the tokenizer belongs to another model"
        )
