"""Output projections of attention that make up for the heads that a plan removes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax.config import LayerConfig
from moe_jax.prune.leaves import placed_like
from moe_jax.prune.measured import measured
from moe_jax.repair import repaired_down
from moe_jax.statistics import Stats


def kept_heads(layer: LayerConfig, groups: Sequence[int]) -> np.ndarray:
    """The query heads of these key/value heads, ascending if they are."""
    by_group = np.arange(layer.num_heads).reshape(layer.num_kv_heads, -1)
    return by_group[np.array(groups)].reshape(-1)


def attention_moments(
    layer: LayerConfig, head_dim: int, i: int, stats: Stats | None
) -> Float[np.ndarray, "NH1 NH1"]:
    """Second moments of what the output projection of layer ``i`` reads and, last, the constant 1.

    Raises:
        ValueError: the statistics have none, or are of another model.
    """
    size = layer.num_heads * head_dim + 1
    need = (
        "repair of attention needs statistics with its second moments; pass stats from "
        "calibrate(..., attention_moments=True)"
    )
    return measured(stats.attention if stats else None, i, "mixed_gram", (size, size), need)


def repair_attention(
    weights: dict[str, Any],
    layer: LayerConfig,
    groups: Sequence[int],
    gram: Float[np.ndarray, "NH1 NH1"],
) -> dict[str, Any]:
    """A layer's attention whose output projection does without the heads of other groups.

    Attention adds ``y = sum_n m_n W_n + b`` to the stream, linear in the mixed heads ``m``: so the
    rows of the heads that stay (and the bias, if there is one) take over what they can of the
    others' by least squares, as an expert's do (see ``repair.repaired_down``).

    Args:
        weights: of attention, all heads; they come back whole, with zeros in the projections of
            heads that go.
        layer: how many heads there are.
        groups: key/value heads that stay.
        gram: second moments of the mixed heads, from ``attention_moments``.
    """
    out = weights["out"]
    kernel: Float[Array, "N H D"] = out["kernel"]
    heads, head_dim, width = kernel.shape
    kept = np.zeros((heads, head_dim), bool)
    kept[kept_heads(layer, groups)] = True
    rows = kernel.reshape(-1, width).astype(jnp.float32)
    mask = kept.reshape(-1)
    if "bias" in out:
        rows = jnp.concatenate([rows, out["bias"][None].astype(jnp.float32)])
        mask = np.append(mask, True)
    repaired = repaired_down(gram[: len(mask), : len(mask)], rows, jnp.asarray(mask))
    new = repaired[: heads * head_dim].reshape(kernel.shape).astype(kernel.dtype)
    changed = {"kernel": placed_like(new, kernel)}
    if "bias" in out:
        bias = out["bias"]
        changed["bias"] = placed_like(repaired[-1].astype(bias.dtype), bias)
    return {**weights, "out": {**out, **changed}}
