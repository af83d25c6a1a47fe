"""Routed gated feed-forward networks: every token through its own K experts.

``y_t = sum_k weight_tk * down_e(silu(gate_e x_t) * up_e x_t)`` with ``e = expert of (t, k)``, or
another product of the two where experts clamp them, see ``gated_product``. The (token, slot) pairs
are sorted by expert, so that the rows of one expert are consecutive.

The ``blocked`` backend of ``grouped_matmul`` has a fused form (``expert_loop``); every other one
composes three calls of ``grouped_matmul`` (``expert_products``). For the backward pass both keep
``gate x`` and ``up x`` of each row, and make the rest again.

Experts may differ in width. They then come in buckets of equal width, the widest first, and the
rows of a bucket's experts are consecutive too: nothing is padded to the widest but the arrays of
hidden activations that are kept, whose rows belong to experts of any width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float

from moe_jax.config import Clamp
from moe_jax.ops import expert_loop, expert_products
from moe_jax.ops.expert_rows import ExpertRows, Experts, Inputs, Kept, Pulls
from moe_jax.ops.grouped_matmul import BACKENDS, run_backend

# What each row can return beside the sums over rows.
TAPS = ("hidden", "output")


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
    return _routed(keep, clamp, backend, Inputs(x, weights, experts, neuron_mask, rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _routed(keep, clamp, backend, inputs):
    return _forward(keep, clamp, backend, inputs)


def _forward(keep, clamp, backend, inputs):
    """The weighted sums, and what ``keep`` names: taps, or ``gated`` and ``upped``, by row.

    Rows past the sum of the group sizes are zero.
    """
    ways = {
        name: functools.partial(expert_products.forward, keep, clamp, name) for name in BACKENDS
    }
    ways["blocked"] = functools.partial(expert_loop.forward, keep, clamp)
    return run_backend(backend, ways, inputs.x.dtype, inputs)


def _routed_fwd(keep, clamp, backend, inputs):
    inputs = jax.tree.map(
        lambda primal: primal.value, inputs, is_leaf=lambda node: isinstance(node, CustomVJPPrimal)
    )
    y, kept = _forward((*Kept._fields, *keep), clamp, backend, inputs)
    rows = Kept(*(kept[name] for name in Kept._fields))
    return (y, {name: kept[name] for name in keep}), (inputs, rows)


def _routed_bwd(keep, clamp, backend, saved, gradients):
    (inputs, kept), (dy, taps) = saved, gradients
    dy, dhidden, doutput = (
        None if isinstance(gradient, SymbolicZero) else gradient
        for gradient in (dy, taps.get("hidden"), taps.get("output"))
    )
    if dy is None:
        dy = jnp.zeros_like(inputs.x)
    ways: dict[str, Callable] = {
        name: functools.partial(expert_products.backward, clamp, name) for name in BACKENDS
    }
    ways["blocked"] = functools.partial(expert_loop.backward, clamp)
    pulls = Pulls(dy, dhidden, doutput)
    dx, dweights, dexperts, dmask = run_backend(backend, ways, inputs.x.dtype, inputs, kept, pulls)
    if inputs.neuron_mask is not None:
        dmask = dmask.astype(inputs.neuron_mask.dtype)
    # Rows are whole numbers: None for what has no gradient.
    rows: Any = None
    return (Inputs(dx, dweights.astype(inputs.weights.dtype), dexperts, dmask, rows),)


_routed.defvjp(_routed_fwd, _routed_bwd, symbolic_zeros=True)
