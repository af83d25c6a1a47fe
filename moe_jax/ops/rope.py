"""Rotary position embeddings (arXiv 2104.09864), plain and LongRoPE (arXiv 2402.13753)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.config import RopeConfig


def rope_tables(
    rope: RopeConfig, positions: Int[Array, "B S"], head_dim: int
) -> tuple[Float[Array, "B S H"], Float[Array, "B S H"]]:
    """cos and sin of every position, in float32, scales included.

    LongRoPE looks at the longest sequence of the batch, ``max(positions) + 1``: above
    ``original_positions`` all of the batch takes the long scale (and factors).
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    frequency = jnp.asarray(1.0 / np.float32(rope.theta) ** exponent)
    scale: float | Array = 1.0
    if rope.kind == "longrope":
        beyond = positions.max() + 1 > rope.original_positions
        scale = jnp.where(beyond, rope.long_scale, rope.short_scale)
        short = jnp.asarray(rope.short_factor, jnp.float32)
        long = jnp.asarray(rope.long_factor, jnp.float32)
        factor = jnp.where(beyond, long, short) if rope.switch_factor else short
        frequency = frequency / factor
    angle = positions[..., None].astype(jnp.float32) * frequency
    angle = jnp.concatenate([angle, angle], -1)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def apply_rope(
    x: Float[Array, "B S N H"], cos: Float[Array, "B S H"], sin: Float[Array, "B S H"]
) -> Float[Array, "B S N H"]:
    """Rotates the two halves of each head against each other."""
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    turned = jnp.concatenate([-second, first], -1)
    rotated = x.astype(jnp.float32) * cos[:, :, None] + turned * sin[:, :, None]
    return rotated.astype(x.dtype)
