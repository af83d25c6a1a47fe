"""Routed feed-forward networks as three grouped products, on any backend of ``grouped_matmul``."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from moe_jax.ops.expert_rows import (
    Experts,
    Inputs,
    Kept,
    Pulls,
    by_bucket,
    gated_product,
    widened,
)
from moe_jax.ops.grouped_matmul import grouped_matmul, grouped_outer, of_rows


# Jitted, so that what a platform does not use is traced once and not once a layer.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def forward(keep, clamp, backend, inputs: Inputs):
    """The weighted sums, and what ``keep`` names by row."""
    x, weights, experts, neuron_mask, rows = inputs
    x_rows = x[rows.token]
    made = []
    parts = by_bucket(experts, rows.group_sizes, neuron_mask)
    for bucket, part in zip(experts, parts, strict=True):
        own, sizes = part.to_front(x_rows), part.group_sizes
        gated = grouped_matmul(own, bucket.gate, sizes, backend)
        upped = grouped_matmul(own, bucket.up, sizes, backend)
        if bucket.gate_bias is not None and bucket.up_bias is not None:
            gated += of_rows(bucket.gate_bias, sizes, len(own))
            upped += of_rows(bucket.up_bias, sizes, len(own))
        hidden = part.masked(gated_product(gated, upped, clamp))
        output = grouped_matmul(hidden, bucket.down, sizes, backend)
        gated, upped, hidden = (widened(array, part.widest) for array in (gated, upped, hidden))
        made.append([part.to_place(array) for array in (gated, upped, hidden, output)])
    gated, upped, hidden, output = (
        sum(arrays[1:], arrays[0]) for arrays in zip(*made, strict=True)
    )
    kept = {"gated": gated, "upped": upped, "hidden": hidden, "output": output}
    return _sum_over_slots(output, rows, weights), {name: kept[name] for name in keep}


@functools.partial(jax.jit, static_argnums=(0, 1))
def backward(clamp, backend, inputs: Inputs, kept: Kept, pulls: Pulls):
    """Gradients of ``x``, ``weights``, ``experts`` and ``neuron_mask``."""
    (x, weights, experts, neuron_mask, rows), (dy, dhidden, doutput) = inputs, pulls
    scale = weights.reshape(-1)[rows.order].astype(x.dtype)[:, None]
    x_rows, dy_rows = x[rows.token], dy[rows.token]
    doutput_rows = dy_rows * scale if doutput is None else dy_rows * scale + doutput
    dx_rows, dweight = jnp.zeros_like(x_rows), jnp.zeros(scale.shape)
    dexperts, dmasks = [], []
    parts = by_bucket(experts, rows.group_sizes, neuron_mask)
    for bucket, part in zip(experts, parts, strict=True):
        multiply = functools.partial(grouped_matmul, group_sizes=part.group_sizes, backend=backend)
        outer = functools.partial(grouped_outer, group_sizes=part.group_sizes, backend=backend)
        width = bucket.gate.shape[2]
        gated, upped = (part.to_front(array)[:, :width] for array in kept)
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
            dmasks.append(widened(outer(own_dhidden * active, ones)[..., 0], part.widest))
    return (
        _sum_over_slots(dx_rows, rows),
        dweight[rows.position, 0],
        tuple(dexperts),
        None if neuron_mask is None else jnp.concatenate(dmasks),
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
