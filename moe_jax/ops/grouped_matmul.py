"""Matrix products of consecutive row groups with one matrix per group.

One contract, several backends. Rows ``sum(group_sizes[:e]) ... sum(group_sizes[:e + 1])`` of
``x`` are multiplied with ``w[e]``; rows past the sum of the sizes are zero in the result. Groups
may be empty. Products accumulate in float32 and come back in ``x.dtype``.

``dense``    every group's matrix on every row, then a selection: the reference, for tests only.
``blocked``  a loop over groups, and in it over blocks of the group's rows. A ragged last block
             writes zeros into the rows behind the group, which the next group overwrites. Empty
             groups and unused rows cost nothing. Default for float32 on CPU.
``batched``  every group padded to whole blocks and one batched product over all blocks, each with
             a copy of its group's matrix. Default on GPU, and for bfloat16 on CPU, where XLA
             lowers batched (not looped) bfloat16 products to matrix instructions.
``ragged``   ``jax.lax.ragged_dot``. Default on TPU. On CPU it computes every group on every row.

What ``auto`` stands for is settled when a program is lowered, by the platform that it is for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

DEFAULT_BLOCK = 128
_SMALLEST_BLOCK = 16

# XLA's float32 products on CPU add up in the order of the contraction, one term after the other,
# if they have at least this many rows, a multiple of this many columns and at most 512 terms.
# Padding to it, which costs little, makes terms that are zero the same as terms that are not there.
LOOP_BLOCK = 64


def grouped_matmul(
    x: Float[Array, "M D"],
    w: Float[Array, "E D F"],
    group_sizes: Int[Array, " E"],
    backend: str = "auto",
) -> Float[Array, "M F"]:
    """Multiplies each group of rows with its own matrix (see the module for the contract).

    Args:
        x: rows, sorted by group.
        group_sizes: rows of each group; their sum must not exceed M.

    Returns:
        The products, in ``x.dtype``; differentiable in ``x`` and ``w``.

    Raises:
        ValueError: shapes do not fit, or there is no such backend.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x must be [M, D] and w [E, D, F], got {x.shape} and {w.shape}")
    if group_sizes.shape != (w.shape[0],):
        raise ValueError(f"group_sizes must be [{w.shape[0]}], got {group_sizes.shape}")
    return _product(backend, jnp.asarray(x), jnp.asarray(w), jnp.asarray(group_sizes))


def grouped_outer(
    x: Float[Array, "M D"],
    y: Float[Array, "M F"],
    group_sizes: Int[Array, " E"],
    backend: str = "auto",
) -> Float[Array, "E D F"]:
    """``x_e^T y_e`` of each group's rows, in float32; zeros for an empty group.

    A column of ones in ``x`` gives each group's sums of ``y``; ``y = x`` its second moments. Rows
    past the sum of the sizes are ignored.
    """
    ways = {name: implementation.outer for name, implementation in BACKENDS.items()}
    return run_backend(backend, ways, x.dtype, x, y, group_sizes)


def run_backend(backend: str, ways: Mapping[str, Callable], dtype: Any, *arguments: Any) -> Any:
    """``ways[backend](*arguments)``, or for ``auto`` the way that suits the lowered platform.

    JAX traces all that it may be, so whoever calls this gives the gradient of the whole: of a
    choice, each way would be handed what all others keep for theirs.

    Args:
        ways: by backend.
        dtype: of the rows.

    Raises:
        ValueError: there is no such backend.
    """
    if backend == "auto":
        on_cpu = {"cpu": ways["blocked"]} if dtype == jnp.float32 else {}
        return jax.lax.platform_dependent(
            *arguments, **on_cpu, tpu=ways["ragged"], default=ways["batched"]
        )
    if backend not in ways:
        raise ValueError(f"backend must be 'auto' or one of {sorted(ways)}, got {backend!r}")
    return ways[backend](*arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(backend, x, w, group_sizes):
    ways = {name: implementation.product for name, implementation in BACKENDS.items()}
    return run_backend(backend, ways, x.dtype, x, w, group_sizes)


def _product_fwd(backend, x, w, group_sizes):
    return _product(backend, x, w, group_sizes), (x, w, group_sizes)


def _product_bwd(backend, saved, dy):
    x, w, group_sizes = saved
    dx = _product(backend, dy, w.swapaxes(1, 2), group_sizes)
    return dx, grouped_outer(x, dy, group_sizes, backend).astype(w.dtype), None


_product.defvjp(_product_fwd, _product_bwd)


def block_rows(rows: int, groups: int) -> int:
    """Rows of a block: about half a mean group at most, so that ragged ends waste little work."""
    mean = max(1, rows // groups)
    block = _SMALLEST_BLOCK
    while block < DEFAULT_BLOCK and block * 2 < mean:
        block *= 2
    return block


def _dense_product(x, w, group_sizes):
    every = jnp.einsum("md,edf->emf", x, w, preferred_element_type=jnp.float32)
    member = _members(group_sizes, x.shape[0])
    return jnp.einsum("emf,em->mf", every, member).astype(x.dtype)


def _dense_outer(x, y, group_sizes):
    member = _members(group_sizes, x.shape[0])
    return jnp.einsum("em,md,mf->edf", member, x, y, preferred_element_type=jnp.float32)


def _members(group_sizes, rows):
    group = row_groups(group_sizes, rows)
    return (jnp.arange(group_sizes.shape[0])[:, None] == group).astype(jnp.float32)


def _ragged_product(x, w, group_sizes):
    product = jax.lax.ragged_dot(
        x, w, group_sizes.astype(jnp.int32), preferred_element_type=jnp.float32
    )
    return jnp.where(_covered(x, group_sizes), product, 0).astype(x.dtype)


def _ragged_outer(x, y, group_sizes):
    rows_summed = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return jax.lax.ragged_dot_general(
        jnp.where(_covered(x, group_sizes), x, 0),
        y,
        group_sizes.astype(jnp.int32),
        rows_summed,
        preferred_element_type=jnp.float32,
    )


def _covered(x, group_sizes):
    return (jnp.arange(x.shape[0]) < group_sizes.sum())[:, None]


def row_groups(group_sizes: Int[Array, " E"], rows: int) -> Int[Array, " M"]:
    """The group of every row; E for the rows past the last group."""
    return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows), side="right")


def of_rows(
    of_groups: Float[Array, "E X"], group_sizes: Int[Array, " E"], rows: int
) -> Float[Array, "M X"]:
    """What belongs to the group of every row; zeros for the rows past the last group."""
    return jnp.pad(of_groups, ((0, 1), (0, 0)))[row_groups(group_sizes, rows)]


def block_lengths(rows: int, groups: int) -> tuple[int, ...]:
    """Rows of the blocks of a loop: long ones, then short ones so that ragged ends waste little."""
    block = block_rows(rows, groups)
    return (2 * block, LOOP_BLOCK) if block >= LOOP_BLOCK else (LOOP_BLOCK,)


def zeros_for(group_sizes: Int[Array, " E"], shape: tuple[int, ...], dtype) -> Array:
    """Zeros for a loop over these groups to write into, made when their sizes are known.

    Of plain zeros XLA makes one array for all loops of a program, and at its start a copy for each:
    those of all layers then live at once.
    """
    return jnp.broadcast_to(jnp.minimum(group_sizes[0], 0).astype(dtype), shape)


def fold_groups(group_sizes: Int[Array, " E"], visit: Callable, carry):
    """``carry = visit(group, carry)`` over the groups that have rows, in their order."""
    occupied = jnp.argsort(group_sizes == 0, stable=True)
    count = (group_sizes > 0).sum()
    return jax.lax.fori_loop(0, count, lambda i, carry: visit(occupied[i], carry), carry)


def fold_blocks(start, size, lengths: tuple[int, ...], visit: Callable, carry):
    """``carry = visit(first_row, length, carry)`` over ``size`` rows from ``start`` on.

    ``length`` is static: as many blocks of ``lengths[0]`` as fit, then of the next, and so on;
    the last block may reach beyond the rows.
    """
    for n, length in enumerate(lengths):
        is_last = n == len(lengths) - 1
        count = (size + length - 1) // length if is_last else size // length

        def step(i, carry, start=start, length=length):
            return visit(start + i * length, length, carry)

        carry = jax.lax.fori_loop(0, count, step, carry)
        start, size = start + count * length, size - count * length
    return carry


def pad_columns(matrix):
    """Zeros behind the last axis, up to a multiple of ``LOOP_BLOCK``."""
    return jnp.pad(matrix, [(0, 0)] * (matrix.ndim - 1) + [(0, -matrix.shape[-1] % LOOP_BLOCK)])


def _loop_product(x, w, group_sizes):
    rows = x.shape[0]
    lengths = block_lengths(rows, w.shape[0])
    starts = jnp.cumsum(group_sizes) - group_sizes

    def visit_group(e, out):
        # Taken here, once per group: XLA copies what a loop slices before it multiplies it.
        matrix = w[e]
        end = starts[e] + group_sizes[e]

        def visit_block(first, length, out):
            row = first + jnp.arange(length)
            piece = jnp.where((row < end)[:, None], x[jnp.minimum(row, rows - 1)], 0)
            product = jnp.dot(piece, matrix, preferred_element_type=jnp.float32)
            return jax.lax.dynamic_update_slice_in_dim(out, product.astype(x.dtype), first, 0)

        return fold_blocks(starts[e], group_sizes[e], lengths, visit_block, out)

    out = zeros_for(group_sizes, (rows + lengths[0], w.shape[2]), x.dtype)
    return fold_groups(group_sizes, visit_group, out)[:rows]


def _loop_outer(x, y, group_sizes):
    rows, groups = x.shape[0], group_sizes.shape[0]
    lengths = block_lengths(rows, groups)
    starts = jnp.cumsum(group_sizes) - group_sizes

    def visit_group(e, out):
        end = starts[e] + group_sizes[e]

        def visit_block(first, length, total):
            row = first + jnp.arange(length)
            safe = jnp.minimum(row, rows - 1)
            left = jnp.where((row < end)[:, None], x[safe], 0)
            return total + jnp.dot(left.T, y[safe], preferred_element_type=jnp.float32)

        zero = jnp.zeros((x.shape[1], y.shape[1]), jnp.float32)
        total = fold_blocks(starts[e], group_sizes[e], lengths, visit_block, zero)
        return out.at[e].set(total)

    out = zeros_for(group_sizes, (groups, x.shape[1], y.shape[1]), jnp.float32)
    return fold_groups(group_sizes, visit_group, out)


def _blocks_of_rows(group_sizes, rows):
    """Rows of each block [N, block], which of them belong to it, its group, each row's slot."""
    groups = group_sizes.shape[0]
    block = block_rows(rows, groups)
    index = jnp.arange(rows // block + groups)
    blocks = (group_sizes + block - 1) // block
    block_ends, row_ends = jnp.cumsum(blocks), jnp.cumsum(group_sizes)
    group = jnp.minimum(jnp.searchsorted(block_ends, index, side="right"), groups - 1)
    first = (row_ends - group_sizes)[group] + (index - block_ends[group] + blocks[group]) * block
    row = first[:, None] + jnp.arange(block)
    inside = (row < row_ends[group][:, None]) & (index < block_ends[-1])[:, None]
    # Rows past the last group take slot 0 here; the caller zeroes them.
    slot = (
        jnp.zeros(rows, jnp.int32)
        .at[jnp.where(inside, row, rows)]
        .set(jnp.arange(index.size * block, dtype=jnp.int32).reshape(row.shape), mode="drop")
    )
    return jnp.minimum(row, rows - 1), inside, group, slot


def _batched_product(x, w, group_sizes):
    rows = x.shape[0]
    row, _, group, slot = _blocks_of_rows(group_sizes, rows)
    product = jnp.einsum("bmd,bdf->bmf", x[row], w[group], preferred_element_type=jnp.float32)
    out = product.astype(x.dtype).reshape(-1, w.shape[2])[slot]
    return jnp.where(_covered(x, group_sizes), out, 0)


def _batched_outer(x, y, group_sizes):
    row, inside, group, _ = _blocks_of_rows(group_sizes, x.shape[0])
    left = jnp.where(inside[..., None], x[row], 0)
    outer = jnp.einsum("bmd,bmf->bdf", left, y[row], preferred_element_type=jnp.float32)
    # A product with the one-hot block owners: XLA's scatter-add runs on one CPU thread.
    owner = jax.nn.one_hot(group, group_sizes.shape[0], axis=0, dtype=jnp.float32)
    return jnp.einsum("eb,bdf->edf", owner, outer)


class _Backend(NamedTuple):
    product: Callable[..., Array]
    outer: Callable[..., Array]


BACKENDS = {
    "dense": _Backend(_dense_product, _dense_outer),
    "blocked": _Backend(_loop_product, _loop_outer),
    "batched": _Backend(_batched_product, _batched_outer),
    "ragged": _Backend(_ragged_product, _ragged_outer),
}
