"""Experts of a layer as one stack, whatever their widths, and back in buckets of equal width."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from moe_jax.config import MoeConfig

# Which axis of a projection runs over hidden neurons.
NEURON_AXIS = {"gate": 2, "up": 2, "down": 1}


def stack_experts(experts: Any, moe: MoeConfig) -> dict[str, Array]:
    """All experts as ``gate, up [E_kept, D, F]`` and ``down [E_kept, F, D]``, in stored order.

    Args:
        experts: as in ``params``: such a dict already, or one of each of ``moe.buckets``, whose
            experts are filled up to ``moe.expert_width`` with zeros. Zero neurons add nothing.
        moe: the layer.
    """
    if not moe.expert_widths:
        return experts
    return {
        name: jnp.concatenate([_widened(part[name], axis, moe.expert_width) for part in experts])
        for name, axis in NEURON_AXIS.items()
    }


def split_experts(stacked: dict[str, Array], moe: MoeConfig) -> Any:
    """Inverse of ``stack_experts``: what lies past an expert's width is dropped."""
    if not moe.expert_widths:
        return stacked
    buckets, first = [], 0
    for width, ids in moe.buckets:
        own = slice(first, first + len(ids))
        buckets.append(
            {
                name: leaf[own, :width] if NEURON_AXIS[name] == 1 else leaf[own, :, :width]
                for name, leaf in stacked.items()
            }
        )
        first = own.stop
    return buckets


def _widened(leaf: Array, axis: int, width: int) -> Array:
    padding = [(0, 0)] * leaf.ndim
    padding[axis] = (0, width - leaf.shape[axis])
    return jnp.pad(leaf, padding)
