"""Rotary position embeddings (arXiv 2104.09864), and the kinds of frequencies they come in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.kinds import DefaultRope, Llama3Rope, LongRope, RopeConfig, YarnRope


def rope_tables(
    rope: RopeConfig, positions: Int[Array, "B S"], lengths: Int[Array, "B S"], rope_dim: int
) -> tuple[Float[Array, "B S R"], Float[Array, "B S R"]]:
    """cos and sin of every position, in float32, scales included.

    Args:
        positions: of the tokens, each within its own sequence.
        lengths: tokens of the sequence that each token belongs to. LongRoPE looks at these rather
            than at the longest of the batch, as transformers does, so that neither padding nor
            another sequence of the batch decides how a sequence is turned.
        rope_dim: R, dimensions of a head that are turned.
    """
    # Computed in float32 throughout, like torch's: float64 would round other bits.
    exponent = np.arange(0, rope_dim, 2, dtype=np.float32) / rope_dim
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


def _yarn(rope: YarnRope, frequency: Array, lengths: Array) -> tuple[Array, float]:
    del lengths
    size = 2 * frequency.shape[0]

    def dimension(turns: float) -> float:
        """Where a frequency makes so many turns in the original context."""
        wavelength = rope.original_positions / (turns * 2 * math.pi)
        return size * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (np.arange(size // 2, dtype=np.float32) - low) / ((high - low) or 0.001)
    slow = np.clip(ramp, 0, 1).astype(np.float32)
    return frequency / rope.factor * slow + frequency * (1 - slow), rope.table_scale


# By kind: (rope, frequencies [R / 2], lengths [B, S, 1]) -> frequencies that broadcast to
# [B, S, R / 2], and the multiplier of cos and sin.
SCALINGS: Mapping[str, Callable[..., tuple[Array, Any]]] = {
    DefaultRope.kind: lambda rope, frequency, lengths: (frequency, 1.0),
    LongRope.kind: _longrope,
    Llama3Rope.kind: _llama3,
    YarnRope.kind: _yarn,
}


def apply_rope(
    x: Float[Array, "B S N H"],
    cos: Float[Array, "B S R"],
    sin: Float[Array, "B S R"],
    interleaved: bool = False,
) -> Float[Array, "B S N H"]:
    """Turns the first R dimensions of each head by their positions.

    Args:
        interleaved: neighbours are turned against each other; they come out as halves do, the
            even ones before the odd ones, which changes no product of a query and a key.
    """
    size = cos.shape[-1]
    turned, rest = x[..., :size].astype(jnp.float32), x[..., size:]
    # Halves, unless told otherwise: checkpoints of the Llama line store heads permuted so.
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        turned = jnp.concatenate([first, second], -1)
    else:
        first, second = jnp.split(turned, 2, -1)
    across = jnp.concatenate([-second, first], -1)
    rotated = (turned * cos[:, :, None] + across * sin[:, :, None]).astype(x.dtype)
    return jnp.concatenate([rotated, rest], -1) if rest.shape[-1] else rotated
