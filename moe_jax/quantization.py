"""Weights as a quantised checkpoint would give them back: rounded to nearest, in groups.

Nothing is stored so: it tells, beside a cut, what fewer bits would lose at the same bytes. A group
runs along the inputs of a matrix, as ``Q4_0`` and ``Q4_1`` of GGUF (groups of 32) and W4A16 (128)
have it, and has a 16-bit scale, with ``minimum`` a 16-bit offset too.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.config import ModelConfig
from moe_jax.params import Leaf, abstract_params, leaves_with_path
from moe_jax.settings import setting

# Norms, routers, embeddings and the head stay as they are, as quantisers leave them by default.
_PARTS = ("experts", "shared", "mlp", "attention")
_STACKED = "EL"  # axes along which a leaf holds matrices


@dataclass(frozen=True)
class Quantization:
    """How weights are rounded."""

    bits: int = setting(4, "Of a weight.", bounds="[2, 8]")
    group_size: int = setting(128, "Weights that share a scale.", bounds=">= 1")
    minimum: bool = setting(
        True,
        "Whether a group has an offset beside its scale (Q4_1), or not (Q4_0, whose largest "
        "magnitude is met exactly).",
    )
    parts: tuple[str, ...] = setting(
        _PARTS, f"Whose matrices are rounded, among {_PARTS}; the others stay."
    )

    @property
    def bytes_per_group(self) -> int:
        """Of what a group stores beside its weights."""
        return 4 if self.minimum else 2


def quantized(params: Any, config: ModelConfig, how: Quantization) -> Any:
    """``params`` with the matrices of ``how.parts`` rounded, in their own dtype.

    Raises:
        ValueError: a part that is none of those that can be.
    """
    unknown = sorted(set(how.parts) - set(_PARTS))
    if unknown:
        raise ValueError(f"quantize.parts must be among {_PARTS}, got {unknown}")

    def rounded(leaf: Leaf, weights: Array) -> Array:
        return _rounded(weights, _input_axes(leaf), how) if _applies(leaf, how) else weights

    return jax.tree.map(
        rounded, abstract_params(config), params, is_leaf=lambda node: isinstance(node, Leaf)
    )


def stored_bytes(config: ModelConfig, how: Quantization, item_bytes: int) -> int:
    """Bytes of a checkpoint with these weights: packed bits, scales, and all that stays.

    Args:
        item_bytes: of a weight that stays.
    """
    total = 0
    for _, leaf in leaves_with_path(abstract_params(config)):
        if not _applies(leaf, how):
            total += leaf.size * item_bytes
            continue
        first, last = _input_axes(leaf)
        inputs = math.prod(leaf.shape[first:last])
        rows = leaf.size // inputs
        groups = rows * -(-inputs // how.group_size)
        total += -(-leaf.size * how.bits // 8) + groups * how.bytes_per_group
    return total


def _applies(leaf: Leaf, how: Quantization) -> bool:
    return leaf.part in how.parts and leaf.decay and len(leaf.axes.strip(_STACKED)) > 1


def _input_axes(leaf: Leaf) -> tuple[int, int]:
    """First and last (exclusive) of the axes that a product sums over."""
    first = next(i for i, letter in enumerate(leaf.axes) if letter not in _STACKED)
    # What ends in the residual stream sums over all before it; else the first axis is the input.
    return first, len(leaf.axes) - 1 if leaf.axes[-1] == "D" else first + 1


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rounded(
    weights: Float[Array, "..."], inputs: tuple[int, int], how: Quantization
) -> Float[Array, "..."]:
    first, last = inputs
    stacked, summed, outputs = (
        math.prod(part)
        for part in (weights.shape[:first], weights.shape[first:last], weights.shape[last:])
    )
    matrix = weights.astype(jnp.float32).reshape(stacked, summed, outputs)
    padding = -summed % how.group_size
    # Copies of the last input: they change neither extreme of its group.
    matrix = jnp.pad(matrix, ((0, 0), (0, padding), (0, 0)), mode="edge")
    groups = matrix.reshape(stacked, -1, how.group_size, outputs)
    levels = 2**how.bits
    low: Array | float
    if how.minimum:
        low = groups.min(2, keepdims=True).astype(jnp.float16).astype(jnp.float32)
        scale = (groups.max(2, keepdims=True) - low) / (levels - 1)
        codes = (0, levels - 1)
    else:
        largest = jnp.take_along_axis(groups, jnp.abs(groups).argmax(2, keepdims=True), 2)
        low, scale = 0.0, largest / -(levels // 2)
        codes = (-(levels // 2), levels // 2 - 1)
    scale = scale.astype(jnp.float16).astype(jnp.float32)
    steps = jnp.where(scale == 0, 0, (groups - low) / jnp.where(scale == 0, 1, scale))
    found = jnp.clip(jnp.round(steps), *codes) * scale + low
    found = found.reshape(stacked, -1, outputs)[:, :summed]
    return found.reshape(weights.shape).astype(weights.dtype)
