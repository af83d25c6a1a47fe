"""Blocks of rows against the library's masked attention: values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.attention import cached_attention, causal_attention


def masked_attention(query, key, value, segment_ids=None, window=None):
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=True, local_window_size=local
    )


@pytest.mark.parametrize(
    ("length", "window", "groups", "documents"),
    [
        (1, None, 4, False),
        (64, None, 1, True),
        (150, None, 2, True),
        (150, 1, 4, False),
        (150, 9, 2, True),
        (150, 70, 1, True),
        (100, 500, 4, True),
    ],
)
def test_blocks_equal_masked(length, window, groups, documents):
    """To rounding: values are of order one, and sums run over at most 150 of them."""
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=(2, length, heads, 8)), jnp.float32)
        for heads in (4, groups, groups)
    )
    segment_ids = jnp.asarray(np.sort(rng.integers(0, 3, (2, length)))) if documents else None

    def run(attention):
        def total(*inputs):
            y = attention(*inputs, segment_ids, window)
            return jnp.square(y).sum(), y

        (_, y), gradient = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(query, key, value)
        return y, *gradient

    for mine, theirs in zip(run(causal_attention), run(masked_attention), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=2e-5)


def test_a_gradient_keeps_the_inputs_and_no_softmax():
    shape = (1, 256, 2, 4)
    inputs = [jnp.ones(shape)] * 3
    _, pull_back = jax.vjp(jax.jit(causal_attention), *inputs)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pull_back))
    softmax = 2 * 256 * 256 // 2
    assert kept < 8 * jnp.ones(shape).size < softmax


def test_softmax_is_float32_whatever_the_inputs():
    """As in the library: only the inputs' own rounding separates the two."""
    rng = np.random.default_rng(1)
    exact = [jnp.asarray(rng.normal(size=(1, 80, 2, 16)), jnp.bfloat16) for _ in range(3)]
    mine, theirs = causal_attention(*exact), masked_attention(*exact)
    assert mine.dtype == jnp.bfloat16
    # One bfloat16 rounding of weights and of the result each.
    np.testing.assert_allclose(
        mine.astype(np.float32), theirs.astype(np.float32), rtol=2**-6, atol=2**-7
    )


@pytest.mark.parametrize("window", [None, 9])
def test_sinks_take_their_share_of_every_row(window):
    """Against a softmax with one more column; values, gradients, and a row from a cache."""
    rng = np.random.default_rng(2)
    length, groups = 150, 2
    query, key, value = (
        jnp.asarray(rng.normal(size=(2, length, heads, 8)), jnp.float32)
        for heads in (4, groups, groups)
    )
    sinks = jnp.asarray(2 * rng.normal(size=4), jnp.float32)

    def reference(query, key, value, sinks):
        key, value = (jnp.repeat(array, 2, 2) for array in (key, value))
        logits = jnp.einsum("bthd,bshd->bhts", query, key) / 8**0.5
        behind = np.subtract.outer(np.arange(length), np.arange(length))
        sees = (behind >= 0) & (behind < (window or length))
        column = jnp.broadcast_to(sinks[:, None, None], (2, 4, length, 1))
        logits = jnp.concatenate([jnp.where(sees, logits, -jnp.inf), column], -1)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits)[..., :-1], value)

    def run(attention):
        def total(*inputs):
            y = attention(*inputs)
            return jnp.square(y).sum(), y

        (_, y), found = jax.value_and_grad(total, range(4), has_aux=True)(query, key, value, sinks)
        return y, *found

    def ours(query, key, value, sinks):
        return causal_attention(query, key, value, None, window, sinks)

    expected = run(reference)
    for mine, theirs in zip(run(ours), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=2e-5)
    last = jnp.full(2, length - 1)
    cached = cached_attention(query[:, -1], key, value, last, window, sinks)
    np.testing.assert_allclose(cached, expected[0][:, -1], rtol=1e-4, atol=2e-5)
