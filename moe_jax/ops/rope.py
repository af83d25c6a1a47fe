"""Rotary position embeddings (arXiv 2104.09864), plain and LongRoPE (arXiv 2402.13753)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.config import DefaultRope, Llama3Rope, LongRope, RopeConfig


def rope_tables(
    rope: RopeConfig, positions: Int[Array, "B S"], lengths: Int[Array, "B S"], head_dim: int
) -> tuple[Float[Array, "B S H"], Float[Array, "B S H"]]:
    """cos and sin of every position, in float32, scales included.

    Args:
        positions: of the tokens, each within its own sequence.
        lengths: tokens of the sequence that each token belongs to. LongRoPE looks at these rather
            than at the longest of the batch, as transformers does, so that neither padding nor
            another sequence of the batch decides how a sequence is turned.
    """
    # Computed in float32 throughout, like torch's: float64 would round other bits.
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    frequency = jnp.asarray(1.0 / np.float32(rope.theta) ** exponent)
    frequency, scale = SCALINGS[rope.kind](rope, frequency, lengths[..., None])
    angle = positions[..., None].astype(jnp.float32) * frequency
    angle = jnp.concatenate([angle, angle], -1)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def _longrope(rope: LongRope, frequency: Array, lengths: Array) -> tuple[Array, Array]:
    beyond = lengths > rope.original_positions
    scale = jnp.where(beyond, rope.long_scale, rope.short_scale)
    short = jnp.asarray(rope.short_factor, jnp.float32)
    long = jnp.asarray(rope.long_factor, jnp.float32)
    factor = jnp.where(beyond, long, short) if rope.switch_factor else short
    return frequency / factor, scale


def _llama3(rope: Llama3Rope, frequency: Array, lengths: Array) -> tuple[Array, float]:
    del lengths
    wavelength = 2 * np.pi / frequency
    turns = rope.original_positions / wavelength  # in the original context
    divided = frequency / rope.factor
    low, high = rope.low_freq_factor, rope.high_freq_factor
    share = (turns - low) / (high - low)
    smoothed = (1 - share) * divided + share * frequency
    between = jnp.where(turns > high, frequency, smoothed)
    return jnp.where(turns < low, divided, between), 1.0


# By kind: (rope, frequencies [H / 2], lengths [B, S, 1]) -> frequencies that broadcast to
# [B, S, H / 2], and the multiplier of cos and sin.
SCALINGS: Mapping[str, Callable[..., tuple[Array, Any]]] = {
    DefaultRope.kind: lambda rope, frequency, lengths: (frequency, 1.0),
    LongRope.kind: _longrope,
    Llama3Rope.kind: _llama3,
}


def apply_rope(
    x: Float[Array, "B S N H"], cos: Float[Array, "B S H"], sin: Float[Array, "B S H"]
) -> Float[Array, "B S N H"]:
    """Rotates the two halves of each head against each other."""
    # Halves, not neighbours: Hugging Face checkpoints of the Llama line store heads permuted so.
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    turned = jnp.concatenate([-second, first], -1)
    rotated = x.astype(jnp.float32) * cos[:, :, None] + turned * sin[:, :, None]
    return rotated.astype(x.dtype)
