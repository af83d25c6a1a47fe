"""Routed gated feed-forward networks: every token through its own K experts.

``y_t = sum_k weight_tk * down_e(silu(gate_e x_t) * up_e x_t)`` with ``e = expert of (t, k)``, or
another product of the two where experts clamp them, see ``gated_product``. The (token, slot) pairs
are sorted by expert, so that the rows of one expert are consecutive.

The ``blocked`` backend of ``grouped_matmul`` has a fused form here: one loop over blocks of rows
which gathers a block's tokens, runs all three products while the block is in cache, and adds it to
the tokens' sums. Every other backend composes three calls of ``grouped_matmul``. For the backward
pass both keep ``gate x`` and ``up x`` of each row, and make the rest again.

Experts may differ in width. They then come in buckets of equal width, the widest first, and the
rows of a bucket's experts are consecutive too: nothing is padded to the widest but the arrays of
hidden activations that are kept, whose rows belong to experts of any width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float, Int

from moe_jax.config import Clamp
from moe_jax.ops.grouped_matmul import (
    BACKENDS,
    LOOP_BLOCK,
    block_lengths,
    fold_blocks,
    fold_groups,
    grouped_matmul,
    grouped_outer,
    of_rows,
    pad_columns,
    run_backend,
    zeros_for,
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


def expert_mlp(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    experts: tuple[Experts, ...],
    rows: ExpertRows,
    neuron_mask: Float[Array, "E F"] | None = None,
    *,
    clamp: Clamp | None = None,
    keep: tuple[str, ...] = TAPS,
    backend: str = "auto",
) -> tuple[Float[Array, "T D"], dict[str, Array]]:
    """Weighted sum of each token's experts.

    Args:
        weights: of the token's slots. Slots whose row is past the sum of the group sizes add
            nothing.
        experts: in ``x.dtype``, one bucket of each width, the widest first: E experts together.
        neuron_mask: multiplied into the hidden activations of each expert; F is the largest width.
        clamp: of hidden activations, see ``gated_product``.
        keep: names in ``TAPS`` to return as well. Writing them is not free, and XLA does not
            remove from a loop what is not used behind it.
        backend: see ``grouped_matmul``.

    Returns:
        The sums, and by name ``hidden [M, F]``, the hidden activations of each row, zeros past
        its expert's width, and ``output [M, D]``, its unweighted output; all differentiable in
        ``x``, ``weights``, ``experts`` and ``neuron_mask``.

    Raises:
        ValueError: there is no such backend.
    """
    x, weights, experts, rows = jax.tree.map(jnp.asarray, (x, weights, experts, rows))
    return _routed(keep, clamp, backend, x, weights, experts, neuron_mask, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _routed(keep, clamp, backend, x, weights, experts, neuron_mask, rows):
    return _forward(keep, clamp, backend, x, weights, experts, neuron_mask, rows)


def _forward(keep, clamp, backend, x, *others):
    """The weighted sums, and what ``keep`` names: taps, or ``gated`` and ``upped``, by row.

    Rows past the sum of the group sizes are zero.
    """
    ways = {name: functools.partial(_forward_by_products, keep, clamp, name) for name in BACKENDS}
    ways["blocked"] = functools.partial(_forward_by_loop, keep, clamp)
    return run_backend(backend, ways, x.dtype, x, *others)


def _routed_fwd(keep, clamp, backend, *primals):
    primals = jax.tree.map(
        lambda primal: primal.value, primals, is_leaf=lambda node: isinstance(node, CustomVJPPrimal)
    )
    saved = ("gated", "upped")
    y, kept = _forward((*saved, *keep), clamp, backend, *primals)
    return (y, {name: kept[name] for name in keep}), (*primals, *(kept[name] for name in saved))


def _routed_bwd(keep, clamp, backend, saved, gradients):
    x, weights, _, neuron_mask, *_ = saved
    dy, taps = gradients
    dy, dhidden, doutput = (
        None if isinstance(gradient, SymbolicZero) else gradient
        for gradient in (dy, taps.get("hidden"), taps.get("output"))
    )
    if dy is None:
        dy = jnp.zeros_like(x)
    ways: dict[str, Callable] = {
        name: functools.partial(_backward_by_products, clamp, name) for name in BACKENDS
    }
    ways["blocked"] = functools.partial(_backward_by_loop, clamp)
    dx, dweights, dexperts, dmask = run_backend(
        backend, ways, x.dtype, *saved, dy, dhidden, doutput
    )
    if neuron_mask is not None:
        dmask = dmask.astype(neuron_mask.dtype)
    return dx, dweights.astype(weights.dtype), dexperts, dmask, None


_routed.defvjp(_routed_fwd, _routed_bwd, symbolic_zeros=True)


class _Part(NamedTuple):
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


def _by_bucket(experts, group_sizes, neuron_mask) -> list[_Part]:
    widest, first, parts = experts[0].gate.shape[2], 0, []
    for bucket in experts:
        count, _, width = bucket.gate.shape
        own = slice(first, first + count)
        mask = None if neuron_mask is None else neuron_mask[own, :width]
        parts.append(_Part(group_sizes[:first].sum(), first, group_sizes[own], mask, widest))
        first += count
    return parts


# Jitted, so that what a platform does not use is traced once and not once a layer.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward_by_products(keep, clamp, backend, x, weights, experts, neuron_mask, rows):
    x_rows = x[rows.token]
    made = []
    parts = _by_bucket(experts, rows.group_sizes, neuron_mask)
    for bucket, part in zip(experts, parts, strict=True):
        own, sizes = part.to_front(x_rows), part.group_sizes
        gated = grouped_matmul(own, bucket.gate, sizes, backend)
        upped = grouped_matmul(own, bucket.up, sizes, backend)
        if bucket.gate_bias is not None:
            gated += of_rows(bucket.gate_bias, sizes, len(own))
            upped += of_rows(bucket.up_bias, sizes, len(own))
        hidden = part.masked(gated_product(gated, upped, clamp))
        output = grouped_matmul(hidden, bucket.down, sizes, backend)
        gated, upped, hidden = (_widened(array, part.widest) for array in (gated, upped, hidden))
        made.append([part.to_place(array) for array in (gated, upped, hidden, output)])
    gated, upped, hidden, output = (
        sum(arrays[1:], arrays[0]) for arrays in zip(*made, strict=True)
    )
    kept = {"gated": gated, "upped": upped, "hidden": hidden, "output": output}
    return _sum_over_slots(output, rows, weights), {name: kept[name] for name in keep}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward_by_products(
    clamp, backend, x, weights, experts, neuron_mask, rows, gated_rows, upped_rows, dy, dhidden,
    doutput,
):  # fmt: skip
    scale = weights.reshape(-1)[rows.order].astype(x.dtype)[:, None]
    x_rows, dy_rows = x[rows.token], dy[rows.token]
    doutput_rows = dy_rows * scale if doutput is None else dy_rows * scale + doutput
    dx_rows, dweight = jnp.zeros_like(x_rows), jnp.zeros(scale.shape)
    dexperts, dmasks = [], []
    parts = _by_bucket(experts, rows.group_sizes, neuron_mask)
    for bucket, part in zip(experts, parts, strict=True):
        multiply = functools.partial(grouped_matmul, group_sizes=part.group_sizes, backend=backend)
        outer = functools.partial(grouped_outer, group_sizes=part.group_sizes, backend=backend)
        width = bucket.gate.shape[2]
        gated, upped = (part.to_front(array)[:, :width] for array in (gated_rows, upped_rows))
        own, down = part.to_front(x_rows), bucket.down.swapaxes(1, 2)
        by_weight = multiply(part.to_front(dy_rows), down)
        own_scale, own_doutput = part.to_front(scale), part.to_front(doutput_rows)
        own_dhidden = by_weight * own_scale if doutput is None else multiply(own_doutput, down)
        if dhidden is not None:
            own_dhidden += part.to_front(dhidden)[:, :width]
        active, pull = jax.vjp(lambda g, u: gated_product(g, u, clamp), gated, upped)
        dgated, dupped = pull(part.masked(own_dhidden).astype(active.dtype))
        hidden = part.masked(active)
        dx_own = multiply(dgated, bucket.gate.swapaxes(1, 2))
        dx_own += multiply(dupped, bucket.up.swapaxes(1, 2))
        dx_rows += part.to_place(dx_own)
        dweight += part.to_place((by_weight * hidden.astype(jnp.float32)).sum(-1, keepdims=True))
        gradients = Experts(outer(own, dgated), outer(own, dupped), outer(hidden, own_doutput))
        ones = jnp.ones_like(scale)
        if bucket.gate_bias is not None:
            gradients = gradients._replace(
                gate_bias=outer(dgated, ones)[..., 0], up_bias=outer(dupped, ones)[..., 0]
            )
        dexperts.append(jax.tree.map(lambda gradient: gradient.astype(x.dtype), gradients))
        if neuron_mask is not None:
            dmasks.append(_widened(outer(own_dhidden * active, ones)[..., 0], part.widest))
    return (
        _sum_over_slots(dx_rows, rows),
        dweight[rows.position, 0],
        tuple(dexperts),
        None if neuron_mask is None else jnp.concatenate(dmasks),
    )


def _widened(array, width: int):
    """Zeros behind the last axis up to ``width``."""
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])])


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


def _forward_by_loop(keep, clamp, x, weights, experts, neuron_mask, rows):
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
    parts = _by_bucket(experts, rows.group_sizes, neuron_mask)
    for bucket, part in zip(experts, parts, strict=True):
        carry = visit_bucket(bucket, part, carry)
    y, kept = carry
    return y.astype(x.dtype), {name: array[:num_rows] for name, array in kept.items()}


def _backward_by_loop(
    clamp, x, weights, experts, neuron_mask, rows, gated_rows, upped_rows, dy, dhidden, doutput
):
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
                gated, upped = gated_rows[row, :expert_width], upped_rows[row, :expert_width]
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
    parts = _by_bucket(experts, rows.group_sizes, neuron_mask)
    for bucket, part in zip(experts, parts, strict=True):
        *by_row, dexpert, dmask = visit_bucket(bucket, part, tuple(by_row))
        dexperts.append(dexpert)
        dmasks.append(_widened(dmask, part.widest))
    dx, dweight = by_row
    return (
        dx.astype(x.dtype),
        dweight[:num_rows][rows.position],
        tuple(dexperts),
        None if neuron_mask is None else jnp.concatenate(dmasks),
    )
