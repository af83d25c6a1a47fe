"""Mean and sum of squared deviations of consecutive row groups."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.ops.grouped_matmul import fold_blocks, fold_groups, row_groups

_BLOCK = 64


class Moments(NamedTuple):
    """Of each group's rows, in float32: ``sum x / n``, ``sum (x - mean)^2``, ``sum weight x``."""

    mean: Float[Array, "E D"]
    m2: Float[Array, "E D"]
    weighted: Float[Array, "E D"]


def grouped_moments(
    arrays: tuple[Float[Array, "M _"], ...],
    group_sizes: Int[Array, " E"],
    weights: Float[Array, " M"],
    loop: bool | None = None,
) -> tuple[Moments, ...]:
    """Moments of each group of rows of each array; zeros for an empty group.

    Args:
        arrays: rows sorted by group; rows past the sum of the sizes are ignored.
        weights: of the rows in the weighted sums.
        loop: merge block by block (Chan, Golub and LeVeque 1979), reading each array once: the
            default on CPU, where visiting groups takes longer than the sums, so that several arrays
            in one call cost little more than one. Otherwise products with the one-hot groups: the
            default elsewhere.

    Returns:
        The moments of each array; neither way subtracts large sums from each other.
    """
    if loop is None:
        return jax.lax.platform_dependent(
            arrays, group_sizes, weights, cpu=_by_blocks, default=_by_products
        )
    return (_by_blocks if loop else _by_products)(arrays, group_sizes, weights)


def merge_moments(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Moments of a union: counts ``[...]``, means and squared deviations ``[..., D]`` (Chan)."""
    total = jnp.maximum(count_a + count_b, 1)
    share = (count_b / total)[..., None]
    delta = mean_b - mean_a
    mean = mean_a + delta * share
    return mean, m2_a + m2_b + jnp.square(delta) * count_a[..., None] * share


def _by_blocks(arrays, group_sizes, weights):
    rows = len(weights)
    block = min(_BLOCK, rows)
    starts = jnp.cumsum(group_sizes) - group_sizes

    def visit_group(e, totals):
        end = starts[e] + group_sizes[e]

        def visit_block(first, length, carry):
            count, group = carry
            # The last block of all starts earlier rather than reach past the rows.
            start = jnp.minimum(first, rows - length)
            row = start + jnp.arange(length)
            inside = ((row >= first) & (row < end))[:, None]
            n = jnp.minimum(end - first, length).astype(jnp.float32)
            weight = jax.lax.dynamic_slice_in_dim(weights, start, length)[:, None]
            merged = []
            for x, old in zip(arrays, group, strict=True):
                piece = jax.lax.dynamic_slice_in_dim(x, start, length).astype(jnp.float32)
                mean = jnp.where(inside, piece, 0).sum(0) / n
                m2 = jnp.where(inside, jnp.square(piece - mean), 0).sum(0)
                weighted = old.weighted + jnp.where(inside, piece * weight, 0).sum(0)
                mean, m2 = merge_moments(count, old.mean, old.m2, n, mean, m2)
                merged.append(Moments(mean, m2, weighted))
            return count + n, tuple(merged)

        nothing = tuple(_zero_moments(x.shape[1:]) for x in arrays)
        carry = (jnp.zeros(()), nothing)
        _, group = fold_blocks(starts[e], group_sizes[e], (block,), visit_block, carry)
        return jax.tree.map(lambda total, new: total.at[e].set(new), totals, group)

    zeros = tuple(_zero_moments((len(group_sizes), x.shape[1])) for x in arrays)
    return fold_groups(group_sizes, visit_group, zeros)


def _zero_moments(shape: tuple[int, ...]) -> Moments:
    return Moments(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(shape))


def _by_products(arrays, group_sizes, weights):
    group = row_groups(group_sizes, len(weights))
    member = jax.nn.one_hot(group, len(group_sizes), axis=0, dtype=jnp.float32)
    exact = jax.lax.Precision.HIGHEST

    def moments(x):
        x = x.astype(jnp.float32)
        mean = jnp.dot(member, x, precision=exact) / jnp.maximum(group_sizes, 1)[:, None]
        deviation = jnp.square(x - mean[jnp.minimum(group, len(group_sizes) - 1)])
        return Moments(
            mean,
            jnp.dot(member, deviation, precision=exact),
            jnp.dot(member * weights, x, precision=exact),
        )

    return tuple(moments(x) for x in arrays)
