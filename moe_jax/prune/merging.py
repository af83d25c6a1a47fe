"""Weighted means of experts whose neurons were brought into one order."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import linear_sum_assignment

from moe_jax.config import MoeConfig
from moe_jax.params import Leaf, leaves_with_path
from moe_jax.plan import LayerPlan
from moe_jax.processes import gather
from moe_jax.prune.slicing import put


def merge_experts(leaves: Any, weights: Any, moe: MoeConfig, plan: LayerPlan) -> Any:
    """Puts each merged expert, and its router row, in the place of the one that stays.

    What carries the letter E is an expert's, what carries R a router row's. Means are taken in
    float32 and stored in the dtype of the weights. The others of each cluster are still there, to
    be taken out with their router rows.

    Args:
        leaves: the abstract tree of ``weights``.
        weights: of the layer's MoE part, with its experts stacked.
        moe: its sizes.
        plan: with ``merges``.
    """
    stored = {e: row for row, e in enumerate(moe.expert_ids)}
    clusters = [(merge.kept, *merge.removed) for merge in plan.merges]
    shares = [[w / sum(merge.weights) for w in merge.weights] for merge in plan.merges]
    rows = {"E": [[stored[e] for e in cluster] for cluster in clusters]}
    if plan.merge_router == "mean":
        rows["R"] = [list(cluster) for cluster in clusters]
    aligned = plan.merge_align
    orders = [
        _orders(leaves, weights, row, share) if aligned else [None] * len(row)
        for row, share in zip(rows["E"], shares, strict=True)
    ]

    def merged(leaf: Leaf, array: Array) -> Array:
        letter = next((letter for letter in rows if letter in leaf.axes), None)
        if letter is None:
            return array
        axis = leaf.axes.index(letter)
        means = [
            _mean(array, leaf.axes, axis, row, share, order)
            for row, share, order in zip(rows[letter], shares, orders, strict=True)
        ]
        places = np.array([row[0] for row in rows[letter]])
        return put(array, places, jnp.stack(means, axis), axis)

    return jax.tree.map(merged, leaves, weights)


def _mean(
    array: Array,
    axes: str,
    axis: int,
    rows: Sequence[int],
    shares: Sequence[float],
    orders: Sequence[np.ndarray | None],
) -> Float[Array, "..."]:
    """The mean of these entries along ``axis``, the neurons of each in its order."""
    neurons = axes.replace("E", "").find("F")
    total = None
    for row, share, order in zip(rows, shares, orders, strict=True):
        if total is not None and share == 0:  # 0 x NaN would not be nothing
            continue
        by_order = order if neurons >= 0 else None
        part = _weighted(array, row, by_order, share, axis, neurons)
        total = part if total is None else total + part
    assert total is not None  # a cluster has a member
    return total


def _orders(
    leaves: Any, weights: Any, rows: Sequence[int], shares: Sequence[float]
) -> list[np.ndarray | None]:
    """How the neurons of each expert of a cluster match those of the first; None: as they are."""
    carrying = [
        (array, leaf.axes)
        for (_, leaf), (_, array) in zip(
            leaves_with_path(leaves), leaves_with_path(weights), strict=True
        )
        if {"E", "F"} <= set(leaf.axes)
    ]
    arrays, axes = zip(*carrying, strict=True)
    return [
        neuron_order(gather(neuron_overlap(arrays, axes, rows[0], row)).astype(np.float64))
        if n and share
        else None
        for n, (row, share) in enumerate(zip(rows, shares, strict=True))
    ]


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


@functools.partial(jax.jit, static_argnames="axes")
def neuron_overlap(
    arrays: Sequence[Array], axes: Sequence[str], kept: int, other: int
) -> Float[Array, "F F"]:
    """Inner products of all that belongs to a neuron, between two experts.

    With the matrices of a gated expert ``<gate, gate'> + <up, up'> + <down, down'>``.

    Args:
        arrays: everything that has both experts and neurons.
        axes: the letters of each.
        kept, other: two rows of them.
    """

    def neurons(row) -> Float[Array, "F X"]:
        rows = [
            jnp.moveaxis(_expert(array, row, letters.index("E")), _neurons(letters), 0)
            for array, letters in zip(arrays, axes, strict=True)
        ]
        return jnp.concatenate([part.reshape(len(part), -1) for part in rows], 1)

    return jnp.dot(
        neurons(kept),
        neurons(other).T,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _neurons(axes: str) -> int:
    """Which axis of one expert's part runs over neurons."""
    return axes.replace("E", "").index("F")


def _expert(array: Array, row, axis: int) -> Array:
    """One entry along an axis. A gather, unlike a slice, needs no whole copy of sharded weights."""
    return jnp.take(array, row, axis)


@functools.partial(jax.jit, static_argnames=("axis", "neurons"))
def _weighted(array: Array, row, order, share, axis: int, neurons: int) -> Float[Array, "..."]:
    part = _expert(array, row, axis).astype(jnp.float32)
    return share * (part if order is None else jnp.take(part, order, neurons))
