"""Down-projections and constants that make up for the neurons that a plan removes."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax.config import MoeConfig
from moe_jax.prune.leaves import placed_like
from moe_jax.prune.measured import measured
from moe_jax.repair import over_experts, repaired_down
from moe_jax.statistics import Stats


def second_moments(moe: MoeConfig, layer: int, stats: Stats | None) -> Float[np.ndarray, "E F1 F1"]:
    """Of every stored expert's activations and, last, the constant 1.

    Raises:
        ValueError: the statistics have none, or are of another model.
    """
    size = moe.expert_width + 1
    need = (
        "repair needs statistics with second moments; pass stats from "
        "calibrate(..., second_moments=True)"
    )
    shape = (moe.num_experts, size, size)
    grams = measured(stats.layers if stats else None, layer, "hidden_gram", shape, need)
    return grams[list(moe.expert_ids)]


def stream_gaps(
    moe: MoeConfig, layer: int, stats: Stats | None
) -> Float[np.ndarray, "E F1 D"] | None:
    """What pulls every stored expert towards the original's stream; None if not measured."""
    if stats is None or "hidden_gap" not in stats.layers.get(layer, {}):
        return None
    return stats.layers[layer]["hidden_gap"][list(moe.expert_ids)]


def repair_experts(
    down: Float[Array, "E F D"],
    bias: Float[Array, "E D"] | None,
    kept: Sequence[Sequence[int]],
    grams: Float[np.ndarray, "E F1 F1"],
    gaps: Float[np.ndarray, "E F1 D"] | None = None,
) -> tuple[Float[Array, "E F D"], Float[Array, "E D"] | None]:
    """Down rows ``kept`` of each expert and, if it has one, its constant, after repair.

    Other down rows are zero. A constant always stays: it takes over what it can as well. ``gaps``
    (from ``stream_gaps``) are closed as far as it goes, too.
    """
    mask = np.zeros(down.shape[:2], bool)
    for row, neurons in zip(mask, kept, strict=True):
        row[list(neurons)] = True
    weights = down.astype(jnp.float32)
    if bias is None:
        more = () if gaps is None else (jnp.asarray(gaps[:, :-1]),)
        repaired = over_experts(_repaired, grams[:, :-1, :-1], weights, jnp.asarray(mask), *more)
        return placed_like(repaired.astype(down.dtype), down), None
    weights = jnp.concatenate([weights, bias[:, None].astype(jnp.float32)], 1)
    mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=True)
    more = () if gaps is None else (jnp.asarray(gaps),)
    repaired = over_experts(_repaired, grams, weights, jnp.asarray(mask), *more)
    repaired = repaired.astype(down.dtype)
    return placed_like(repaired[:, :-1], down), placed_like(repaired[:, -1], bias)


def _repaired(gram, down, kept, gap=None):
    return repaired_down(gram, down, kept, gap=gap)


def compensated_bias(
    down: Float[Array, "E F D"],
    bias: Float[Array, "E D"],
    kept: Sequence[Sequence[int]],
    means: Float[np.ndarray, "E F"],
) -> Float[Array, "E D"]:
    """``bias`` plus the mean of what the neurons that go added (FLAP, arXiv 2312.11983)."""
    lost = np.array(means, np.float32)
    for row, neurons in zip(lost, kept, strict=True):
        row[list(neurons)] = 0
    added = jnp.einsum("ef,efd->ed", lost, down.astype(jnp.float32), precision="highest")
    return placed_like((bias.astype(jnp.float32) + added).astype(bias.dtype), bias)
