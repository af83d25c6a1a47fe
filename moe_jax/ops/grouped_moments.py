"""Mean and sum of squared deviations of consecutive row groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.ops.grouped_matmul import block_table, row_groups

_BLOCK = 128


def grouped_moments(
    x: Float[Array, "M D"], group_sizes: Int[Array, " E"], loop: bool | None = None
) -> tuple[Float[Array, "E D"], Float[Array, "E D"]]:
    """Mean and ``sum (x - mean)^2`` of each group of rows; zeros for an empty group.

    Args:
        x: rows sorted by group; rows past the sum of the sizes are ignored.
        group_sizes: rows of each group.
        loop: merge block by block (Chan, Golub and LeVeque 1979), reading ``x`` once: the default
            on CPU. Otherwise two products with the one-hot groups, which suits accelerators.

    Returns:
        Both in float32; neither way subtracts large sums from each other.
    """
    if loop is None:
        loop = jax.default_backend() == "cpu"
    return (_by_blocks if loop else _by_products)(x, group_sizes)


def merge_moments(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Moments of a union: counts ``[...]``, means and squared deviations ``[..., D]`` (Chan)."""
    total = jnp.maximum(count_a + count_b, 1)
    share = (count_b / total)[..., None]
    delta = mean_b - mean_a
    mean = mean_a + delta * share
    return mean, m2_a + m2_b + jnp.square(delta) * count_a[..., None] * share


def _by_blocks(x, group_sizes):
    groups, width = group_sizes.shape[0], x.shape[1]
    padded = jnp.pad(x, ((0, _BLOCK), (0, 0)))
    locate, blocks = block_table(group_sizes, _BLOCK)
    ends = jnp.cumsum(group_sizes)

    def step(i, carry):
        count, mean, m2 = carry
        group, start = locate(i)
        rows = jax.lax.dynamic_slice_in_dim(padded, start, _BLOCK).astype(jnp.float32)
        inside = (start + jnp.arange(_BLOCK) < ends[group])[:, None]
        n = jnp.minimum(ends[group] - start, _BLOCK).astype(jnp.float32)
        block_mean = jnp.where(inside, rows, 0).sum(0) / n
        block_m2 = jnp.where(inside, jnp.square(rows - block_mean), 0).sum(0)
        merged = merge_moments(count[group], mean[group], m2[group], n, block_mean, block_m2)
        return count.at[group].add(n), mean.at[group].set(merged[0]), m2.at[group].set(merged[1])

    zeros = jnp.zeros((groups, width), jnp.float32)
    _, mean, m2 = jax.lax.fori_loop(0, blocks, step, (jnp.zeros(groups), zeros, zeros))
    return mean, m2


def _by_products(x, group_sizes):
    x = x.astype(jnp.float32)
    group = row_groups(group_sizes, x.shape[0])
    member = jax.nn.one_hot(group, group_sizes.shape[0], axis=0, dtype=jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    mean = jnp.dot(member, x, precision=exact) / jnp.maximum(group_sizes, 1)[:, None]
    deviation = jnp.square(x - mean[jnp.minimum(group, group_sizes.shape[0] - 1)])
    return mean, jnp.dot(member, deviation, precision=exact)
