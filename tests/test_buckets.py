"""Experts of different widths: the same as experts of one width whose last neurons are zero."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_config, tiny_model

from moe_jax.config import LayerConfig, MoeConfig
from moe_jax.kinds import SoftmaxRouter
from moe_jax.model import BlockOptions
from moe_jax.model.moe import moe_layer
from moe_jax.ops.expert_mlp import TAPS
from moe_jax.ops.grouped_matmul import BACKENDS
from moe_jax.params import (
    abstract_params,
    count_params,
    expert_leaves,
    split_experts,
    stack_experts,
)

TOKENS, WIDTH = 50, 10
WIDTHS = (8, 0, 24, 8, 16, 24, 16)
MOE = MoeConfig(len(WIDTHS), 2, 24, novice_ids=(1,), expert_widths=WIDTHS, expert_bias=True)
ONE_WIDTH = dataclasses.replace(MOE, expert_widths=())
MODEL = dataclasses.replace(tiny_config(), width=WIDTH, layers=(LayerConfig(2, 2, MOE),))
BUCKETS = abstract_params(MODEL)["layers"][0]["moe"]["experts"]
EXPERTS = expert_leaves(MODEL, 0)


def random_layer(seed=0):
    """Weights of the stacked form whose rows are in the order of the buckets, and its input."""
    rng = np.random.default_rng(seed)
    kept = len(MOE.expert_ids)
    normal = lambda *shape: jnp.asarray(0.4 * rng.normal(size=shape), jnp.float32)  # noqa: E731
    stacked = {
        "gate": normal(kept, WIDTH, 24),
        "up": normal(kept, WIDTH, 24),
        "down": normal(kept, 24, WIDTH),
    }
    stacked = stack_experts(
        split_experts(stacked, BUCKETS), EXPERTS
    )  # zeros past each expert's width
    params = {
        "router": {"kernel": normal(WIDTH, len(WIDTHS))},
        "experts": stacked,
        "expert_bias": normal(kept, WIDTH),
        "novices": {"constant": normal(1, WIDTH)},
    }
    return params, normal(TOKENS, WIDTH), jnp.asarray(rng.random(TOKENS) < 0.8)


@functools.partial(jax.jit, static_argnames=("moe", "backend"))
def loss_and_gradients(params, moe, x, valid, mask, backend):
    def loss(params, x, mask):
        options = BlockOptions(TAPS, backend, mask)
        y, aux = moe_layer(params, moe, SoftmaxRouter(), x, valid, options)
        total = (jnp.sin(y) * jnp.arange(y.shape[1])).sum()
        total += (aux["hidden"] ** 2).sum() + (aux["output"] ** 3).sum()
        return total, (y, aux)

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(params, x, mask)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_buckets_equal_experts_padded_with_zeros(backend):
    params, x, valid = random_layer()
    mask = jnp.asarray(np.random.default_rng(1).random((len(MOE.expert_ids), 24)), jnp.float32)
    bucketed = {**params, "experts": split_experts(params["experts"], BUCKETS)}
    (_, (y, aux)), (weights, dx, dmask) = loss_and_gradients(bucketed, MOE, x, valid, mask, backend)
    # The stacked form stores experts by id, so that its rows come in another order.
    by_id = np.argsort(MOE.expert_ids)
    padded = {
        **params,
        "experts": {name: leaf[by_id] for name, leaf in params["experts"].items()},
        "expert_bias": params["expert_bias"][by_id],
    }
    (_, (y2, aux2)), (weights2, dx2, dmask2) = loss_and_gradients(
        padded, ONE_WIDTH, x, valid, mask[by_id], backend
    )
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-4)
    close(y, y2)
    close(dx, dx2)
    for tap in ("hidden", "output"):
        close(aux[tap][aux["row"]], aux2[tap][aux2["row"]])
    inside = np.arange(24) < np.array([WIDTHS[e] for e in MOE.expert_ids])[:, None]
    close(np.where(inside, dmask, 0), np.where(inside, dmask2[np.argsort(by_id)], 0))
    close(weights["expert_bias"], weights2["expert_bias"][np.argsort(by_id)])
    for name, leaf in stack_experts(weights["experts"], EXPERTS).items():
        other = weights2["experts"][name][np.argsort(by_id)]
        shown = inside[:, :, None] if name == "down" else inside[:, None, :]
        close(leaf, np.where(shown, other, 0))


def test_bias_and_widths_in_float64():
    params, x, _ = random_layer()
    y, aux = moe_layer(
        {**params, "experts": split_experts(params["experts"], BUCKETS)}, MOE, SoftmaxRouter(), x
    )
    experts = {name: np.asarray(leaf, np.float64) for name, leaf in params["experts"].items()}
    expected = np.zeros((TOKENS, WIDTH))
    for t in range(TOKENS):
        for e, weight in zip(aux["expert_ids"][t], aux["weights"][t], strict=True):
            if e == 1:
                value = np.asarray(params["novices"]["constant"][0], np.float64)
            else:
                row = MOE.expert_ids.index(int(e))
                gated = np.asarray(x[t], np.float64) @ experts["gate"][row]
                hidden = gated / (1 + np.exp(-gated)) * (x[t] @ experts["up"][row])
                value = hidden @ experts["down"][row] + params["expert_bias"][row]
            expected[t] += float(weight) * value
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_split_and_stack_are_inverse():
    params, _, _ = random_layer()
    again = stack_experts(split_experts(params["experts"], BUCKETS), EXPERTS)
    jax.tree.map(np.testing.assert_array_equal, again, params["experts"])
    assert split_experts(params["experts"], EXPERTS) is params["experts"]


def test_stored_order_and_counts():
    assert MOE.expert_ids == (2, 5, 4, 6, 0, 3)
    assert [bucket.width for bucket in MOE.buckets] == [24, 16, 8]
    _, config = tiny_model()
    moe = config.moe(0)
    widths = tuple([moe.expert_width] + [4] * (moe.num_experts - 1))
    other = config.replace_moe(0, expert_widths=widths, expert_bias=True)
    before, after = count_params(config), count_params(other)
    lost = 3 * config.width * (moe.expert_width - 4) * (moe.num_experts - 1)
    biases = config.width * moe.num_experts
    assert after.total == before.total - lost + biases
    k = moe.experts_per_token
    assert after.active == before.active - 3 * config.width * (moe.expert_width - 4) * (k - 1) + (
        config.width * k
    )


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((8, 0, 24, 8, 16, 24), "must be 7 numbers"),
        ((8, 8, 24, 8, 16, 24, 16), "0 for the novices"),
        ((8, 0, 20, 8, 16, 20, 16), "reach expert_width = 24"),
        ((24, 0, 24, 24, 24, 24, 24), "must differ"),
        ((8, 0, 24, -8, 16, 24, 16), "positive"),
    ],
)
def test_impossible_widths(widths, message):
    _, config = tiny_model()
    with pytest.raises(ValueError, match=message):
        config.replace_moe(0, num_experts=7, expert_width=24, novice_ids=(1,), expert_widths=widths)
