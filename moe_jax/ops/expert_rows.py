"""What routed feed-forward networks work on: rows by expert, weights by width, their shares."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.config import Clamp
from moe_jax.ops.grouped_matmul import of_rows


class ExpertRows(NamedTuple):
    """The M = T * K (token, slot) pairs, sorted by expert.

    Attributes:
        order: Int[M], the pair ``t * K + k`` that lies in each row.
        position: Int[T, K], the row of each pair; the inverse of ``order``.
        group_sizes: Int[E], rows of each expert. Rows past their sum belong to none.
    """

    order: Array
    position: Array
    group_sizes: Array

    @property
    def token(self) -> Int[Array, " M"]:
        """The token of each row."""
        return self.order // self.position.shape[1]


def rows_of_groups(groups: Int[Array, "T K"], num_groups: int) -> ExpertRows:
    """The (token, slot) pairs sorted by group; those of group ``num_groups`` belong to none."""
    order = jnp.argsort(groups.reshape(-1), stable=True).astype(jnp.int32)
    position = (
        jnp.zeros_like(order)
        .at[order]
        .set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
    )
    sizes = jnp.bincount(groups.reshape(-1), length=num_groups + 1)[:-1].astype(jnp.int32)
    return ExpertRows(order, position.reshape(groups.shape), sizes)


class Experts(NamedTuple):
    """Stacked weights of one width.

    Attributes:
        gate, up: Float[E, D, F].
        down: Float[E, F, D].
        gate_bias, up_bias: Float[E, F]; None: there are none.
    """

    gate: Array
    up: Array
    down: Array
    gate_bias: Array | None = None
    up_bias: Array | None = None


def gated_product(
    gated: Float[Array, "*N F"], upped: Float[Array, "*N F"], clamp: Clamp | None = None
) -> Float[Array, "*N F"]:
    """Hidden activations: ``silu(gated) * upped``, or those of experts that clamp.

    Both are zero where both products are, so that neurons may be filled up with zeros.
    """
    if clamp is None:
        return jax.nn.silu(gated) * upped
    gated = jnp.minimum(gated, clamp.limit)
    upped = jnp.clip(upped, -clamp.limit, clamp.limit)
    return (upped + 1) * (gated * jax.nn.sigmoid(clamp.alpha * gated))


class Inputs(NamedTuple):
    """Arguments of ``expert_mlp`` that have gradients, and the rows."""

    x: Float[Array, "T D"]
    weights: Float[Array, "T K"]
    experts: tuple[Experts, ...]
    neuron_mask: Float[Array, "E F"] | None
    rows: ExpertRows


class Kept(NamedTuple):
    """Of each row ``gate x`` and ``up x``, kept for the backward pass."""

    gated: Float[Array, "M F"]
    upped: Float[Array, "M F"]


class Pulls(NamedTuple):
    """Gradients of the sums and, if anything reads them, of each row's taps."""

    y: Float[Array, "T D"]
    hidden: Float[Array, "M F"] | None
    output: Float[Array, "M D"] | None


class Part(NamedTuple):
    """One bucket's share of the rows and of the experts: ``first`` are its first of each."""

    first_row: Array
    first_expert: int
    group_sizes: Array
    neuron_mask: Array | None
    widest: int

    def to_front(self, by_row: Array) -> Array:
        """All rows, those of this bucket first."""
        return jnp.roll(by_row, -self.first_row, 0) if self.first_expert else by_row

    def to_place(self, by_row: Array) -> Array:
        """The inverse of ``to_front``."""
        return jnp.roll(by_row, self.first_row, 0) if self.first_expert else by_row

    def masked(self, hidden: Array) -> Array:
        """Hidden activations, this bucket's rows first, times the mask of each row's expert."""
        if self.neuron_mask is None:
            return hidden
        mask = of_rows(self.neuron_mask, self.group_sizes, len(hidden))
        return hidden * mask.astype(hidden.dtype)


def by_bucket(experts, group_sizes, neuron_mask) -> list[Part]:
    widest, first, parts = experts[0].gate.shape[2], 0, []
    for bucket in experts:
        count, _, width = bucket.gate.shape
        own = slice(first, first + count)
        mask = None if neuron_mask is None else neuron_mask[own, :width]
        parts.append(Part(group_sizes[:first].sum(), first, group_sizes[own], mask, widest))
        first += count
    return parts


def widened(array, width: int):
    """Zeros behind the last axis up to ``width``."""
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])])
