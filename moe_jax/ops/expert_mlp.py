"""Routed gated feed-forward networks: every token through its own K experts.

``y_t = sum_k weight_tk * down_e(silu(gate_e x_t) * up_e x_t)`` with ``e = expert of (t, k)``. The
(token, slot) pairs are sorted by expert, so that the rows of one expert are consecutive.

The ``blocked`` backend of ``grouped_matmul`` has a fused form here: one loop over blocks of rows
which gathers a block's tokens, runs all three products while the block is in cache, and adds it to
the tokens' sums. Every other backend composes three calls of ``grouped_matmul``.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float, Int

from moe_jax.ops.grouped_matmul import (
    block_lengths,
    default_backend,
    fold_blocks,
    fold_groups,
    grouped_matmul,
    pad_columns,
    row_groups,
)

# What each row can return beside the sums over rows.
TAPS = ("hidden", "output")


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


class Experts(NamedTuple):
    """Stacked weights: ``gate`` and ``up`` Float[E, D, F], ``down`` Float[E, F, D]."""

    gate: Array
    up: Array
    down: Array


def expert_mlp(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    experts: Experts,
    rows: ExpertRows,
    neuron_mask: Float[Array, "E F"] | None = None,
    *,
    keep: tuple[str, ...] = TAPS,
    backend: str = "auto",
) -> tuple[Float[Array, "T D"], dict[str, Array]]:
    """Weighted sum of each token's experts.

    Args:
        x: tokens.
        weights: of the token's slots. Slots whose row is past the sum of the group sizes add
            nothing.
        experts: stacked weights, in ``x.dtype``.
        rows: which rows belong to which expert.
        neuron_mask: multiplied into the hidden activations of each expert.
        keep: names in ``TAPS`` to return as well. Writing them is not free, and XLA does not
            remove from a loop what is not used behind it.
        backend: see ``grouped_matmul``.

    Returns:
        The sums, and by name ``hidden [M, F]``, the hidden activations of each row, and
        ``output [M, D]``, its unweighted output; all differentiable in ``x``, ``weights``,
        ``experts`` and ``neuron_mask``.

    Raises:
        ValueError: there is no such backend.
    """
    x, weights, experts, rows = jax.tree.map(jnp.asarray, (x, weights, experts, rows))
    if (default_backend(x.dtype) if backend == "auto" else backend) == "blocked":
        return _fused(keep, x, weights, experts, neuron_mask, rows)
    x_rows = _rows_of_tokens(x, rows)
    sizes = rows.group_sizes
    gated = grouped_matmul(x_rows, experts.gate, sizes, backend)
    upped = grouped_matmul(x_rows, experts.up, sizes, backend)
    hidden = _activate(gated, upped, neuron_mask, rows)
    output = grouped_matmul(hidden, experts.down, sizes, backend)
    made = {"hidden": hidden, "output": output}
    return _combine(output, weights, rows), {name: made[name] for name in keep}


def _activate(gated, upped, neuron_mask, rows):
    hidden = jax.nn.silu(gated) * upped
    if neuron_mask is None:
        return hidden
    group = row_groups(rows.group_sizes, hidden.shape[0])
    return hidden * neuron_mask[jnp.minimum(group, neuron_mask.shape[0] - 1)].astype(hidden.dtype)


@jax.custom_vjp
def _rows_of_tokens(x, rows):
    """``x[token]``, whose gradient is K gathers and a sum rather than a scatter."""
    return x[rows.token]


_rows_of_tokens.defvjp(
    lambda x, rows: (x[rows.token], rows),
    lambda rows, gradient: (_sum_over_slots(gradient, rows), None),
)


def _sum_over_slots(by_row, rows, weights=None):
    """Sum over k of the rows of each token's slots, times ``weights [T, K]``, in float32.

    One gather per slot, not one of all pairs: XLA fuses these with the sum, and a [T, K, D]
    array is never made.
    """
    total = jnp.zeros((rows.position.shape[0], by_row.shape[1]), jnp.float32)
    for k in range(rows.position.shape[1]):
        term = by_row[rows.position[:, k]].astype(jnp.float32)
        total += term if weights is None else term * weights[:, k, None]
    return total.astype(by_row.dtype)


@jax.custom_vjp
def _combine(output, weights, rows):
    return _sum_over_slots(output, rows, weights)


def _combine_fwd(output, weights, rows):
    return _combine(output, weights, rows), (output, weights, rows)


def _combine_bwd(saved, dy):
    output, weights, rows = saved
    row_weight = weights.reshape(-1)[rows.order].astype(dy.dtype)
    by_slot = [(output[position].astype(jnp.float32) * dy).sum(-1) for position in rows.position.T]
    return dy[rows.token] * row_weight[:, None], jnp.stack(by_slot, -1), None


_combine.defvjp(_combine_fwd, _combine_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(keep, x, weights, experts, neuron_mask, rows):
    return _loop_forward(x, weights, experts, neuron_mask, rows, keep)


def _padded_experts(experts, e):
    """``gate`` beside ``up`` [D, 2 F + padding] and ``down`` [F, D + padding] of expert ``e``.

    Made once per expert and not in the loop over its rows: XLA copies what a loop slices, and the
    padding goes into the same copy. See ``LOOP_BLOCK`` for its reason: with it, neurons that are
    masked give the same bits as neurons that have been removed, up to 512 of them.
    """
    gate, up, down = (matrices[e] for matrices in experts)
    return pad_columns(jnp.concatenate([gate, up], 1)), pad_columns(down)


def _loop_forward(x, weights, experts, neuron_mask, rows, keep):
    """The weighted sums, and what ``keep`` names: taps, or ``gated`` and ``upped``, by row.

    Rows past the sum of the group sizes are zero.
    """
    num_experts, width, expert_width = experts.gate.shape
    num_rows = rows.order.shape[0]
    lengths = block_lengths(num_rows, num_experts)
    token = jnp.pad(rows.token, (0, lengths[0]))
    row_weight = jnp.pad(weights.reshape(-1)[rows.order], (0, lengths[0]))
    starts = jnp.cumsum(rows.group_sizes) - rows.group_sizes

    def visit_expert(e, carry):
        gate_up, down = _padded_experts(experts, e)
        mask = None if neuron_mask is None else neuron_mask[e].astype(x.dtype)
        end = starts[e] + rows.group_sizes[e]

        def visit_block(first, length, carry):
            y, kept = carry
            block_token = jax.lax.dynamic_slice_in_dim(token, first, length)
            scale = jax.lax.dynamic_slice_in_dim(row_weight, first, length)[:, None]
            both = x[block_token] @ gate_up
            gated, upped = both[:, :expert_width], both[:, expert_width : 2 * expert_width]
            hidden = jax.nn.silu(gated) * upped
            if mask is not None:
                hidden = hidden * mask
            # The ragged end adds nothing, and writes zeros into rows that the next expert
            # overwrites.
            hidden = jnp.where((first + jnp.arange(length) < end)[:, None], hidden, 0)
            output = (hidden @ down)[:, :width]
            made = {"hidden": hidden, "output": output, "gated": gated, "upped": upped}
            return y.at[block_token].add(output * scale, mode="promise_in_bounds"), {
                name: jax.lax.dynamic_update_slice_in_dim(array, made[name], first, 0)
                for name, array in kept.items()
            }

        return fold_blocks(starts[e], rows.group_sizes[e], lengths, visit_block, carry)

    y = jnp.zeros(x.shape, jnp.float32)
    kept = {
        name: jnp.zeros(
            (num_rows + lengths[0], width if name == "output" else expert_width), x.dtype
        )
        for name in keep
    }
    y, kept = fold_groups(rows.group_sizes, visit_expert, (y, kept))
    return y.astype(x.dtype), {name: array[:num_rows] for name, array in kept.items()}


def _fused_fwd(keep, *primals):
    x, weights, experts, neuron_mask, rows = jax.tree.map(
        lambda primal: primal.value,
        primals,
        is_leaf=lambda node: isinstance(node, CustomVJPPrimal),
    )
    saved = ("gated", "upped")
    y, kept = _loop_forward(x, weights, experts, neuron_mask, rows, (*saved, *keep))
    taps = {name: kept[name] for name in keep}
    return (y, taps), (x, weights, experts, neuron_mask, rows, *(kept[name] for name in saved))


def _fused_bwd(keep, saved, gradients):
    x, weights, experts, neuron_mask, rows, gated_rows, upped_rows = saved
    num_experts, _, expert_width = experts.gate.shape
    num_rows = rows.order.shape[0]
    lengths = block_lengths(num_rows, num_experts)
    dy, taps = gradients
    dy, dhidden, doutput = (
        None if isinstance(gradient, SymbolicZero) else gradient
        for gradient in (dy, taps.get("hidden"), taps.get("output"))
    )
    if dy is None:
        dy = jnp.zeros_like(x)
    token = rows.token
    row_weight = weights.reshape(-1)[rows.order].astype(x.dtype)
    starts = jnp.cumsum(rows.group_sizes) - rows.group_sizes

    def visit_expert(e, arrays):
        gate, up, down = experts.gate[e], experts.up[e], experts.down[e]
        mask = None if neuron_mask is None else neuron_mask[e].astype(x.dtype)
        end = starts[e] + rows.group_sizes[e]

        def visit_block(first, length, carry):
            dx, dweight, dgate, dup, ddown, dmask = carry
            row = first + jnp.arange(length)
            inside = (row < end)[:, None]
            row = jnp.minimum(row, num_rows - 1)
            block_token, scale = token[row], row_weight[row][:, None]
            piece, dy_block = x[block_token], dy[block_token]
            gated, upped = gated_rows[row], upped_rows[row]
            sigmoid = jax.nn.sigmoid(gated)
            active = jnp.where(inside, gated * sigmoid * upped, 0)
            hidden = active if mask is None else active * mask
            by_weight = dy_block @ down.T
            doutput_block = dy_block * scale
            dhidden_block = by_weight * scale
            if doutput is not None:
                doutput_block += doutput[row]
                dhidden_block += doutput[row] @ down.T
            if dhidden is not None:
                dhidden_block += dhidden[row]
            dactive = dhidden_block if mask is None else dhidden_block * mask
            dactive = jnp.where(inside, dactive, 0)
            dupped = dactive * gated * sigmoid
            dgated = dactive * upped * sigmoid * (1 + gated * (1 - sigmoid))
            dx_block = dgated @ gate.T + dupped @ up.T
            return (
                dx.at[block_token].add(dx_block, mode="promise_in_bounds"),
                jax.lax.dynamic_update_slice_in_dim(
                    dweight, (by_weight * hidden).sum(-1), first, 0
                ),
                dgate + piece.T @ dgated,
                dup + piece.T @ dupped,
                ddown + hidden.T @ doutput_block,
                dmask + (dhidden_block * active).sum(0),
            )

        by_row, by_expert = arrays[:2], arrays[2:]
        zeros = tuple(jnp.zeros(array.shape[1:], array.dtype) for array in by_expert)
        new = fold_blocks(starts[e], rows.group_sizes[e], lengths, visit_block, (*by_row, *zeros))
        return (
            *new[:2],
            *(array.at[e].set(part) for array, part in zip(by_expert, new[2:], strict=True)),
        )

    arrays = (
        jnp.zeros(x.shape, jnp.float32),
        jnp.zeros(num_rows + lengths[0], x.dtype),
        *(jnp.zeros(leaf.shape, x.dtype) for leaf in experts),
        jnp.zeros((num_experts, expert_width), x.dtype),
    )
    dx, dweight, dgate, dup, ddown, dmask = fold_groups(rows.group_sizes, visit_expert, arrays)
    return (
        dx.astype(x.dtype),
        dweight[:num_rows][rows.position].astype(weights.dtype),
        Experts(dgate, dup, ddown),
        None if neuron_mask is None else dmask.astype(neuron_mask.dtype),
        None,
    )


_fused.defvjp(_fused_fwd, _fused_bwd, symbolic_zeros=True)
