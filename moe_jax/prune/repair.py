"""Down-projections that make up for the neurons that a plan removes."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax.config import MoeConfig
from moe_jax.prune.leaves import placed_like
from moe_jax.repair import over_experts, repaired_down
from moe_jax.statistics import Stats


def second_moments(moe: MoeConfig, layer: int, stats: Stats | None) -> Float[np.ndarray, "E F F"]:
    """Of every stored expert's activations; raises ValueError if the statistics have none."""
    if stats is None or "hidden_gram" not in stats.layers.get(layer, {}):
        raise ValueError(
            f"plan layer {layer}: repair needs statistics with second moments; pass stats from "
            "calibrate(..., second_moments=True)"
        )
    grams = stats.layers[layer]["hidden_gram"]
    size = moe.expert_width + 1
    if grams.shape != (moe.num_experts, size, size):
        raise ValueError(
            f"statistics of layer {layer} must be of this model, with second moments "
            f"{(moe.num_experts, size, size)}, got {grams.shape}"
        )
    return grams[list(moe.expert_ids), :-1, :-1]


def repair_down(
    down: Float[Array, "E F D"], kept: Sequence[Sequence[int]], grams: Float[np.ndarray, "E F F"]
) -> Float[Array, "E F D"]:
    """The down rows ``kept`` of each expert after repair; the others are zero."""
    mask = np.zeros(down.shape[:2], bool)
    for row, neurons in zip(mask, kept, strict=True):
        row[list(neurons)] = True
    repaired = over_experts(repaired_down, grams, down.astype(jnp.float32), jnp.asarray(mask))
    return placed_like(repaired.astype(down.dtype), down)
