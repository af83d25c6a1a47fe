"""Routed feed-forward networks as one loop over blocks of rows: the ``blocked`` backend, fused.

It gathers a block's tokens, runs all three products while the block is in cache, and adds it to the
tokens' sums.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.ops.expert_rows import Experts, Inputs, Kept, Pulls, by_bucket, gated_product, widened
from moe_jax.ops.grouped_matmul import (
    LOOP_BLOCK,
    block_lengths,
    fold_blocks,
    fold_groups,
    pad_columns,
    zeros_for,
)


def _products_of(experts, e):
    """The products of expert ``e``: of tokens to ``gated`` and ``upped``, and of those to outputs.

    Matrices are taken here, once per expert and not in the loop over its rows: XLA copies what a
    loop slices. Where they must be padded (see ``LOOP_BLOCK`` for the reason: with it, neurons that
    are masked give the same bits as neurons that have been removed, up to 512 of them), that goes
    into the same copy, ``gate`` beside ``up``, and one product gives both.
    """
    gate, up, down, *biases = jax.tree.leaves(jax.tree.map(lambda stacked: stacked[e], experts))
    width, model_width = down.shape
    padded_down = pad_columns(down)

    def to_output(hidden):
        return (hidden @ padded_down)[:, :model_width]

    whole = width % LOOP_BLOCK == 0
    gate_up = None if whole else pad_columns(jnp.concatenate([gate, up], 1))

    def to_hidden(tokens):
        if gate_up is None:
            products = tokens @ gate, tokens @ up
        else:
            both = tokens @ gate_up
            products = both[:, :width], both[:, width : 2 * width]
        return tuple(map(jnp.add, products, biases)) if biases else products

    return to_hidden, to_output


def forward(keep, clamp, inputs: Inputs):
    """The weighted sums, and what ``keep`` names by row."""
    x, weights, experts, neuron_mask, rows = inputs
    width, widest = x.shape[1], experts[0].gate.shape[2]
    num_rows, num_experts = rows.order.shape[0], rows.group_sizes.shape[0]
    lengths = block_lengths(num_rows, num_experts)
    token = jnp.pad(rows.token, (0, lengths[0]))
    row_weight = jnp.pad(weights.reshape(-1)[rows.order], (0, lengths[0]))

    def visit_bucket(bucket, part, carry):
        starts = part.first_row + jnp.cumsum(part.group_sizes) - part.group_sizes

        def visit_expert(e, carry):
            to_hidden, to_output = _products_of(bucket, e)
            mask = None if part.neuron_mask is None else part.neuron_mask[e].astype(x.dtype)
            end = starts[e] + part.group_sizes[e]

            def visit_block(first, length, carry):
                y, kept = carry
                block_token = jax.lax.dynamic_slice_in_dim(token, first, length)
                scale = jax.lax.dynamic_slice_in_dim(row_weight, first, length)[:, None]
                gated, upped = to_hidden(x[block_token])
                hidden = gated_product(gated, upped, clamp)
                if mask is not None:
                    hidden = hidden * mask
                # The ragged end adds nothing, and writes zeros into rows that the next expert,
                # which is no wider, overwrites.
                hidden = jnp.where((first + jnp.arange(length) < end)[:, None], hidden, 0)
                output = to_output(hidden)
                made = {"hidden": hidden, "output": output, "gated": gated, "upped": upped}
                return y.at[block_token].add(output * scale, mode="promise_in_bounds"), {
                    name: jax.lax.dynamic_update_slice(array, made[name], (first, 0))
                    for name, array in kept.items()
                }

            return fold_blocks(starts[e], part.group_sizes[e], lengths, visit_block, carry)

        return fold_groups(part.group_sizes, visit_expert, carry)

    kept = {
        name: zeros_for(
            rows.group_sizes,
            (num_rows + lengths[0], width if name == "output" else widest),
            x.dtype,
        )
        for name in keep
    }
    carry = (zeros_for(rows.group_sizes, x.shape, jnp.float32), kept)
    parts = by_bucket(experts, rows.group_sizes, neuron_mask)
    for bucket, part in zip(experts, parts, strict=True):
        carry = visit_bucket(bucket, part, carry)
    y, kept = carry
    return y.astype(x.dtype), {name: array[:num_rows] for name, array in kept.items()}


def backward(clamp, inputs: Inputs, saved: Kept, pulls: Pulls):
    """Gradients of ``x``, ``weights``, ``experts`` and ``neuron_mask``."""
    (x, weights, experts, neuron_mask, rows), (dy, dhidden, doutput) = inputs, pulls
    num_rows, num_experts = rows.order.shape[0], rows.group_sizes.shape[0]
    lengths = block_lengths(num_rows, num_experts)
    token = rows.token
    row_weight = weights.reshape(-1)[rows.order].astype(x.dtype)

    def visit_bucket(bucket, part, by_row):
        expert_width = bucket.gate.shape[2]
        starts = part.first_row + jnp.cumsum(part.group_sizes) - part.group_sizes

        def visit_expert(e, arrays):
            gate, up, down = bucket.gate[e], bucket.up[e], bucket.down[e]
            mask = None if part.neuron_mask is None else part.neuron_mask[e].astype(x.dtype)
            end = starts[e] + part.group_sizes[e]

            def visit_block(first, length, carry):
                dx, dweight, dexpert, dmask = carry
                row = first + jnp.arange(length)
                inside = (row < end)[:, None]
                row = jnp.minimum(row, num_rows - 1)
                block_token, scale = token[row], row_weight[row][:, None]
                piece, dy_block = x[block_token], dy[block_token]
                gated, upped = (array[row, :expert_width] for array in saved)
                active, pull = jax.vjp(lambda g, u: gated_product(g, u, clamp), gated, upped)
                active = jnp.where(inside, active, 0)
                hidden = active if mask is None else active * mask
                by_weight = dy_block @ down.T
                doutput_block = dy_block * scale
                dhidden_block = by_weight * scale
                if doutput is not None:
                    doutput_block += doutput[row]
                    dhidden_block += doutput[row] @ down.T
                if dhidden is not None:
                    dhidden_block += dhidden[row, :expert_width]
                dactive = dhidden_block if mask is None else dhidden_block * mask
                dgated, dupped = pull(jnp.where(inside, dactive, 0))
                added = Experts(piece.T @ dgated, piece.T @ dupped, hidden.T @ doutput_block)
                if bucket.gate_bias is not None:
                    added = added._replace(gate_bias=dgated.sum(0), up_bias=dupped.sum(0))
                dx_block = dgated @ gate.T + dupped @ up.T
                return (
                    dx.at[block_token].add(dx_block, mode="promise_in_bounds"),
                    jax.lax.dynamic_update_slice_in_dim(
                        dweight, (by_weight * hidden).sum(-1), first, 0
                    ),
                    jax.tree.map(jnp.add, dexpert, added),
                    dmask + (dhidden_block * active).sum(0),
                )

            by_row, by_expert = arrays[:2], arrays[2:]
            zeros = jax.tree.map(lambda array: jnp.zeros(array.shape[1:], array.dtype), by_expert)
            new = fold_blocks(
                starts[e], part.group_sizes[e], lengths, visit_block, (*by_row, *zeros)
            )
            set_row = jax.tree.map(lambda array, row: array.at[e].set(row), by_expert, new[2:])
            return (*new[:2], *set_row)

        zeros = jax.tree.map(lambda leaf: zeros_for(rows.group_sizes, leaf.shape, x.dtype), bucket)
        dmask = jnp.zeros((len(bucket.gate), expert_width), x.dtype)
        return fold_groups(part.group_sizes, visit_expert, (*by_row, zeros, dmask))

    by_row = (
        zeros_for(rows.group_sizes, x.shape, jnp.float32),
        jnp.zeros(num_rows + lengths[0], x.dtype),
    )
    dexperts, dmasks = [], []
    parts = by_bucket(experts, rows.group_sizes, neuron_mask)
    for bucket, part in zip(experts, parts, strict=True):
        *by_row, dexpert, dmask = visit_bucket(bucket, part, tuple(by_row))
        dexperts.append(dexpert)
        dmasks.append(widened(dmask, part.widest))
    dx, dweight = by_row
    return (
        dx.astype(x.dtype),
        dweight[:num_rows][rows.position],
        tuple(dexperts),
        None if neuron_mask is None else jnp.concatenate(dmasks),
    )
