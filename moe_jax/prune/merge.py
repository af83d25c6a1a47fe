"""Weighted means of experts whose neurons were brought into one order."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import linear_sum_assignment

from moe_jax.config import MoeConfig
from moe_jax.params import NEURON_AXIS
from moe_jax.plan import LayerPlan, Merge
from moe_jax.prune.leaves import put

Experts = Mapping[str, Array]
# The same in one expert's matrices: ``gate`` and ``up`` are [D, F], ``down`` is [F, D].
_NEURON_AXIS = {name: axis - 1 for name, axis in NEURON_AXIS.items()}


def merge_experts(weights: dict[str, Any], moe: MoeConfig, plan: LayerPlan) -> dict[str, Any]:
    """Puts each merged expert, and its router row, in the place of the one that stays.

    Means are taken in float32 and stored in the dtype of the weights. The others of each group
    are still there, to be taken out with their router rows.

    Args:
        weights: the layer's ``router``, stacked ``experts`` and perhaps ``expert_bias``, as in
            ``moe.moe_layer``.
        moe: its sizes.
        plan: with ``merges``.
    """
    row = {e: row for row, e in enumerate(moe.expert_ids)}
    merged = [
        _merged_expert(
            weights["experts"],
            [row[e] for e in (merge.kept, *merge.removed)],
            _shares(merge),
            plan.merge_align,
        )
        for merge in plan.merges
    ]
    places = np.array([row[merge.kept] for merge in plan.merges])
    experts = {
        name: put(leaf, places, jnp.stack([one[name] for one in merged]), 0)
        for name, leaf in weights["experts"].items()
    }
    router = weights["router"]
    if plan.merge_router == "mean":
        router = {**router, "kernel": _merged_rows(router["kernel"], plan.merges)}
    changed = {"experts": experts, "router": router}
    if moe.expert_bias:
        changed["expert_bias"] = _merged_rows(weights["expert_bias"].T, plan.merges, row).T
    return {**weights, **changed}


def neuron_order(overlap: Float[np.ndarray, "F F"]) -> Int[np.ndarray, " F"]:
    """Which neuron of another expert matches each neuron of the one that stays.

    The permutation that maximises the sum of inner products, by linear assignment (M-SMoE, arXiv
    2310.01334). It leaves the other expert's function as it is, and of all permutations brings its
    weights closest.

    Args:
        overlap: inner products of neurons, of the one that stays along the first axis; see
            ``neuron_overlap``.
    """
    return linear_sum_assignment(overlap, maximize=True)[1]


@jax.jit
def neuron_overlap(experts: Experts, kept: int, other: int) -> Float[Array, "F F"]:
    """``<gate, gate'> + <up, up'> + <down, down'>`` of the neurons of two rows of ``experts``."""
    pairs = [
        [jnp.moveaxis(_expert(leaf, row), _NEURON_AXIS[name], 0) for row in (kept, other)]
        for name, leaf in experts.items()
    ]
    first, second = (jnp.concatenate(parts, 1) for parts in zip(*pairs, strict=True))
    return jnp.dot(
        first,
        second.T,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _expert(leaf: Array, row) -> Array:
    """One expert's matrix. A gather, unlike a slice, needs no whole copy of sharded weights."""
    return jnp.take(leaf, row, 0)


def _shares(merge: Merge) -> list[float]:
    total = sum(merge.weights)
    return [weight / total for weight in merge.weights]


def _merged_expert(
    experts: Experts, rows: Sequence[int], shares: Sequence[float], align: bool
) -> dict[str, Array]:
    """The mean in the dtype of the weights; the first row lends its order of neurons."""
    order = np.arange(experts["gate"].shape[2])
    merged = {
        name: _weighted(leaf, rows[0], order, shares[0], name) for name, leaf in experts.items()
    }
    for row, share in zip(rows[1:], shares[1:], strict=True):
        if share == 0:
            continue
        if align:
            order = neuron_order(np.asarray(neuron_overlap(experts, rows[0], row), np.float64))
        for name, leaf in experts.items():
            merged[name] = merged[name] + _weighted(leaf, row, order, share, name)
    return {name: leaf.astype(experts[name].dtype) for name, leaf in merged.items()}


@functools.partial(jax.jit, static_argnames="name")
def _weighted(leaf: Array, row, order, share, name: str) -> Float[Array, "..."]:
    return share * jnp.take(_expert(leaf, row).astype(jnp.float32), order, _NEURON_AXIS[name])


def _merged_rows(
    kernel: Float[Array, "D E"], merges: Sequence[Merge], place: Mapping[int, int] | None = None
) -> Float[Array, "D E"]:
    """Weighted means of columns, which lie at an expert's id or, if given, at its ``place``."""
    columns = [
        [e if place is None else place[e] for e in (merge.kept, *merge.removed)] for merge in merges
    ]
    mix = np.zeros((kernel.shape[1], len(merges)), np.float32)
    for n, (merge, members) in enumerate(zip(merges, columns, strict=True)):
        mix[members, n] = _shares(merge)
    return put(kernel, np.array([members[0] for members in columns]), _jit_mix(kernel, mix), 1)


@jax.jit
def _jit_mix(kernel: Float[Array, "D E"], mix: Float[Array, "E G"]) -> Float[Array, "D G"]:
    return jnp.dot(kernel.astype(jnp.float32), mix, precision=jax.lax.Precision.HIGHEST)
