"""Every backend against one NumPy reference, forward and backward; the fused experts likewise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from moe_jax.config import Clamp
from moe_jax.ops.expert_mlp import TAPS, expert_mlp
from moe_jax.ops.expert_rows import ExpertRows, Experts
from moe_jax.ops.grouped_matmul import (
    BACKENDS,
    block_lengths,
    block_rows,
    fold_blocks,
    grouped_matmul,
    row_groups,
)

ROWS, GROUPS, WIDTH, OUT = 70, 4, 6, 5

# Few shapes, so that few programs are compiled; the sizes of the groups vary.
group_sizes = st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS).map(
    lambda sizes: np.diff(np.minimum(np.cumsum([0, *sizes]), ROWS)).astype(np.int32)
)
every_backend = pytest.mark.parametrize("backend", sorted(BACKENDS))
cases = pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([20, 0, 33, 17], id="empty group"),
        pytest.param([0, 0, 70, 0], id="all in one"),
        pytest.param([0, 0, 0, 0], id="no rows"),
        pytest.param([3, 40, 1, 2], id="rows past the sum"),
    ],
)


@functools.partial(jax.jit, static_argnames="backend")
def product_and_gradients(x, w, dy, sizes, backend):
    y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend), x, w)
    return (y, *vjp(dy))


def reference(x, w, dy, sizes):
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros((x.shape[0], w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    end = 0
    for e, size in enumerate(sizes):
        rows = slice(end, end + size)
        end += size
        y[rows], dx[rows] = x[rows] @ w[e], dy[rows] @ w[e].T
        dw[e] = x[rows].T @ dy[rows]
    return y, dx, dw


def random_inputs(seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((ROWS, WIDTH), (GROUPS, WIDTH, OUT), (ROWS, OUT))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def check_backend(backend, sizes, seed=0):
    sizes = np.asarray(sizes, np.int32)
    inputs = random_inputs(seed)
    got = product_and_gradients(*inputs, sizes, backend)
    for name, ours, expected in zip(("y", "dx", "dw"), got, reference(*inputs, sizes), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5, err_msg=f"{backend} {name}")
    assert not np.asarray(got[0])[sizes.sum() :].any()


@every_backend
@cases
def test_backend_equals_reference(backend, sizes):
    check_backend(backend, sizes)


@settings(max_examples=40, deadline=None)
@given(sizes=group_sizes, seed=st.integers(0, 99))
def test_any_sizes(sizes, seed):
    for backend in sorted(BACKENDS):
        check_backend(backend, sizes, seed)


@pytest.mark.parametrize("backend", ["blocked", "batched"])
def test_groups_of_many_blocks(backend):
    rng = np.random.default_rng(0)
    rows, groups = 1500, 3
    assert block_lengths(rows, groups) == (256, 64)
    sizes = np.array([900, 1, 500], np.int32)
    x, w, dy = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((rows, 8), (groups, 8, 4), (rows, 4))
    )
    got = product_and_gradients(x, w, dy, sizes, backend)
    for ours, expected in zip(got, reference(x, w, dy, sizes), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-4)


@every_backend
def test_bfloat16_accumulates_in_float32(backend):
    x = jnp.ones((16, 1000), jnp.bfloat16)
    w = jnp.ones((1, 1000, 8), jnp.bfloat16)
    y = grouped_matmul(x, w, jnp.array([16]), backend)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), 1000)


@given(rows=st.integers(1, 10**6), groups=st.integers(1, 512))
def test_blocks_are_no_longer_than_a_mean_group(rows, groups):
    block = block_rows(rows, groups)
    assert block in (16, 32, 64, 128)
    assert block == 16 or block < rows / groups
    assert set(block_lengths(rows, groups)) <= {64, 2 * block}


@jax.jit
def visits(start, size):
    def visit(first, length, counts):
        row = first + jnp.arange(length)
        return counts.at[row].add((row < start + size).astype(jnp.int32))

    return fold_blocks(start, size, (64, 16), visit, jnp.zeros(500, jnp.int32))


@settings(max_examples=50, deadline=None)
@given(start=st.integers(0, 50), size=st.integers(0, 300))
def test_blocks_cover_the_rows_once(start, size):
    expected = np.zeros(500, np.int32)
    expected[start : start + size] = 1
    np.testing.assert_array_equal(visits(start, size), expected)


def test_row_groups():
    groups = row_groups(jnp.array([2, 0, 1]), 5)
    np.testing.assert_array_equal(groups, [0, 0, 2, 3, 3])


@pytest.mark.parametrize(
    ("x", "w", "sizes", "backend", "message"),
    [
        ((4, 3), (2, 5, 6), (2,), "auto", r"\(4, 3\) and \(2, 5, 6\)"),
        ((4, 3), (3, 6), (2,), "auto", "must be"),
        ((4, 3), (2, 3, 6), (3,), "auto", r"group_sizes must be \[2\]"),
        ((4, 3), (2, 3, 6), (2,), "fastest", "'fastest'"),
    ],
)
def test_bad_arguments(x, w, sizes, backend, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(jnp.ones(x), jnp.ones(w), jnp.ones(sizes, jnp.int32), backend)


def routed(rng, tokens, k, groups, share):
    """Sorted rows of random distinct experts; about ``1 - share`` of the slots belong to none."""
    ids = np.stack([rng.permutation(groups)[:k] for _ in range(tokens)])
    ids[rng.random((tokens, k)) > share] = groups
    order = np.argsort(ids.reshape(-1), kind="stable").astype(np.int32)
    position = np.argsort(order).astype(np.int32).reshape(tokens, k)
    sizes = np.bincount(ids.reshape(-1), minlength=groups + 1)[:-1].astype(np.int32)
    return ids, ExpertRows(*(jnp.asarray(a) for a in (order, position, sizes)))


@functools.partial(jax.jit, static_argnames=("clamp", "backend", "taps"))
def mlp_and_gradients(x, weights, experts, mask, rows, clamp, backend, taps):
    def loss(x, weights, experts, mask):
        keep = TAPS if taps else ()
        y, kept = expert_mlp(
            x, weights, (experts,), rows, mask, clamp=clamp, keep=keep, backend=backend
        )
        total = (jnp.sin(y) * jnp.arange(y.shape[1])).sum()
        if taps:
            total += (kept["hidden"] ** 2).sum() + (kept["output"] ** 3).sum()
        return total, (y, kept)

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(x, weights, experts, mask)


@pytest.mark.parametrize("clamp", [None, Clamp(1.5, 1.7)], ids=["silu", "clamped"])
@pytest.mark.parametrize("taps", [False, True], ids=["sums only", "with taps"])
def test_fused_experts_equal_dense_reference(taps, clamp):
    for share in (1.0, 0.7, 0.0):
        check_fused(share, taps, clamp)


def check_fused(share, taps, clamp):
    """Experts that clamp have biases, too."""
    rng = np.random.default_rng(int(share * 10))
    tokens, k, groups, d, f = 40, 3, 5, 6, 4
    ids, rows = routed(rng, tokens, k, groups, share)
    x, weights = rng.normal(size=(tokens, d)), rng.random((tokens, k))
    biases = [] if clamp is None else [(groups, f)] * 2
    shapes = ((groups, d, f), (groups, d, f), (groups, f, d), *biases)
    experts = [rng.normal(size=shape) for shape in shapes]
    mask = rng.random((groups, f))
    x, weights, mask = (jnp.asarray(a, jnp.float32) for a in (x, weights, mask))
    experts = Experts(*(jnp.asarray(w, jnp.float32) for w in experts))
    arguments = (x, weights, experts, mask, rows)
    (_, values), gradients = mlp_and_gradients(*arguments, clamp, "blocked", taps)
    (_, expected_values), expected = mlp_and_gradients(*arguments, clamp, "dense", taps)
    for ours, theirs in zip(
        jax.tree.leaves((values, gradients)),
        jax.tree.leaves((expected_values, expected)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)
    y = np.zeros((tokens, d))
    for t in range(tokens):
        for slot in range(k):
            e = ids[t, slot]
            if e < groups:
                gate = np.asarray(x[t], np.float64) @ experts.gate[e]
                up, gain = x[t] @ experts.up[e], 1.0
                if clamp is not None:
                    gain = clamp.alpha
                    gate = np.minimum(gate + experts.gate_bias[e], clamp.limit)
                    up = 1 + np.clip(up + experts.up_bias[e], -clamp.limit, clamp.limit)
                hidden = gate / (1 + np.exp(-gain * gate)) * up * mask[e]
                y[t] += weights[t, slot] * (hidden @ experts.down[e])
    np.testing.assert_allclose(values[0], y, atol=1e-4)


def test_fused_gradient_equals_finite_differences():
    rng = np.random.default_rng(3)
    _, rows = routed(rng, 12, 2, 3, 0.8)
    experts = Experts(
        *(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 4, 5), (3, 4, 5), (3, 5, 4)))
    )
    x = jnp.asarray(rng.normal(size=(12, 4)), jnp.float32)
    weights, mask = jnp.full((12, 2), 0.5), jnp.ones((3, 5))

    def function(x, weights, experts, mask):
        return expert_mlp(x, weights, (experts,), rows, mask, backend="blocked")

    arguments = (x, weights, experts, mask)
    check_grads(
        jax.jit(function), arguments, order=1, modes=["rev"], atol=0.02, rtol=0.02, eps=1e-2
    )
