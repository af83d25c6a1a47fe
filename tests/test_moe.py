"""Routers against transformers on torch; padding, novices and the rows that experts see."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from moe_jax.config import MoeConfig
from moe_jax.kinds import SoftmaxRouter, SparseMixerRouter
from moe_jax.model import BlockOptions
from moe_jax.model.moe import moe_layer
from moe_jax.model.router import route
from moe_jax.ops.expert_mlp import TAPS

TOKENS, EXPERTS, WIDTH, EXPERT_WIDTH = 40, 6, 8, 12
JITTER = 0.2
SPARSEMIXER = SparseMixerRouter(jitter=JITTER)
HEUN_SMALL = 0.3333

layer = jax.jit(moe_layer, static_argnums=(1, 2))


def random_logits(tokens=TOKENS, seed=0):
    return np.random.default_rng(seed).normal(1, 0.3, (tokens, EXPERTS)).astype(np.float32)


def weighted_sum(logits, cotangent, rng):
    ids, weights = route(logits, 2, SPARSEMIXER, rng)
    return (weights * cotangent).sum(), (ids, weights)


def torch_route(logits, cotangent, training):
    logits = torch.tensor(logits, requires_grad=True)
    weights, ids = sparsemixer(logits, JITTER, training)
    (weights * torch.tensor(cotangent)).sum().backward()
    return ids.numpy(), weights.detach().numpy(), logits.grad.numpy()


@pytest.fixture
def same_samples(monkeypatch):
    """Makes torch draw what ``route`` draws from the returned key."""
    rng = jax.random.key(7)
    exponentials, uniforms = [], []
    for slot in range(2):
        sample_key, heun_key = jax.random.split(jax.random.fold_in(rng, slot))
        gumbel = jax.random.gumbel(sample_key, (TOKENS, EXPERTS))
        full = jax.random.bernoulli(heun_key, 0.25, (TOKENS,))
        exponentials.append(torch.tensor(np.exp(-np.asarray(gumbel))))
        uniforms.append(torch.tensor(np.asarray(full, np.float32))[:, None])
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: exponentials.pop(0))
    monkeypatch.setattr(torch, "rand_like", lambda like: uniforms.pop(0))
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self: self)
    return rng


def compare_routes(rng):
    logits = random_logits()
    cotangent = np.random.default_rng(1).normal(size=(TOKENS, 2)).astype(np.float32)
    gradient, (ids, weights) = jax.grad(weighted_sum, has_aux=True)(
        jnp.asarray(logits), cotangent, rng
    )
    expected = torch_route(logits, cotangent, rng is not None)
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_allclose(weights, expected[1], atol=1e-6)
    np.testing.assert_allclose(gradient, expected[2], atol=1e-5)
    return np.asarray(weights)


def test_sparsemixer_in_eval_mode():
    weights = compare_routes(None)
    assert (weights == 1).any()
    assert (weights < 1).any()


def test_sparsemixer_in_train_mode_with_the_same_samples(same_samples):
    weights = compare_routes(same_samples)
    assert (weights > 0).any()


def test_sparsemixer_samples_from_the_softmax_of_close_experts():
    draws = 40_000
    logits = np.array([1.0, 0.9, 0.8, 0.7, 0.2, -1.0], np.float32)
    ids, weights = route(jnp.tile(logits, (draws, 1)), 2, SPARSEMIXER, jax.random.key(0))
    close = (1.0 - logits) / np.maximum(np.abs(logits), 1.0) <= 2 * JITTER
    expected = np.where(close, np.exp(logits), 0)
    expected /= expected.sum()
    frequency = np.bincount(ids[:, 0], minlength=EXPERTS) / draws
    np.testing.assert_allclose(frequency, expected, atol=0.01)
    assert (ids[:, 0] != ids[:, 1]).all()
    scale = np.asarray(weights[:, 0]) / expected[ids[:, 0]]
    best = np.asarray(ids[:, 0]) == 0
    np.testing.assert_allclose(scale[best], 1, rtol=1e-5)
    assert set(np.round(scale[~best], 4)) == {np.float32(HEUN_SMALL), np.float32(1)}
    assert abs((scale[~best] > 0.9).mean() - 0.25) < 0.02


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("k", [1, 3, EXPERTS])
def test_softmax_top_k(k, renormalize):
    logits = random_logits()
    ids, weights = route(jnp.asarray(logits), k, SoftmaxRouter(renormalize=renormalize))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    order = np.argsort(-logits, -1)[:, :k]
    expected = np.take_along_axis(probabilities, order, -1)
    if renormalize:
        expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_equal_logits_take_the_lower_ids():
    ids, _ = route(jnp.zeros((2, EXPERTS)), 3, SoftmaxRouter())
    np.testing.assert_array_equal(ids, [[0, 1, 2]] * 2)


def random_layer(novices=(), seed=0):
    rng = np.random.default_rng(seed)
    moe = MoeConfig(EXPERTS, 2, EXPERT_WIDTH, novices)
    kept = EXPERTS - len(novices)
    shapes = {
        "router": {"kernel": (WIDTH, EXPERTS)},
        "experts": {
            "gate": (kept, WIDTH, EXPERT_WIDTH),
            "up": (kept, WIDTH, EXPERT_WIDTH),
            "down": (kept, EXPERT_WIDTH, WIDTH),
        },
    }
    if novices:
        shapes["novices"] = {"constant": (len(novices), WIDTH)}
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return moe, params, jnp.asarray(rng.normal(size=(TOKENS, WIDTH)), jnp.float32)


def expected_output(moe, params, x, ids, weights):
    """One (token, slot) pair at a time, in float64."""
    x, weights = np.asarray(x, np.float64), np.asarray(weights)
    experts = {name: np.asarray(w, np.float64) for name, w in params["experts"].items()}
    y = np.zeros_like(x)
    for t, row in enumerate(np.asarray(ids)):
        for slot, e in enumerate(row):
            if e in moe.novice_ids:
                output = params["novices"]["constant"][moe.novice_ids.index(e)]
            else:
                stored = moe.expert_ids.index(e)
                gate = x[t] @ experts["gate"][stored]
                hidden = gate / (1 + np.exp(-gate)) * (x[t] @ experts["up"][stored])
                output = hidden @ experts["down"][stored]
            y[t] += weights[t, slot] * np.asarray(output)
    return y


@pytest.mark.parametrize("novices", [(), (1,), (0, 2, 3, 4, 5)], ids=str)
def test_layer_equals_one_pair_at_a_time(novices):
    moe, params, x = random_layer(novices)
    y, aux = layer(params, moe, SoftmaxRouter(renormalize=True), x)
    expected = expected_output(moe, params, x, aux["expert_ids"], aux["weights"])
    np.testing.assert_allclose(y, expected, atol=1e-4, rtol=1e-4)


def test_tokens_on_novices_are_no_rows_of_any_expert():
    moe, params, x = random_layer((1, 4))
    _, aux = layer(params, moe, SoftmaxRouter(), x)
    ids = np.asarray(aux["expert_ids"])
    expected = [(ids == e).sum() for e in moe.expert_ids]
    np.testing.assert_array_equal(aux["group_sizes"], expected)
    behind = int(aux["group_sizes"].sum())
    assert behind == (~np.isin(ids, moe.novice_ids)).sum() < ids.size
    assert not np.asarray(aux["output"])[behind:].any()
    assert not np.asarray(aux["hidden"])[behind:].any()


def test_padding_reaches_no_expert_and_no_novice():
    moe, params, x = random_layer((1,))
    valid = np.arange(TOKENS) % 3 > 0
    y, aux = layer(params, moe, SoftmaxRouter(), x, jnp.asarray(valid))
    everyone, _ = layer(params, moe, SoftmaxRouter(), x)
    assert not np.asarray(y)[~valid].any()
    np.testing.assert_allclose(np.asarray(y)[valid], np.asarray(everyone)[valid], atol=1e-5)
    ids = np.asarray(aux["expert_ids"])[valid]
    assert int(aux["group_sizes"].sum()) == (ids != 1).sum()
    rows = np.asarray(aux["row_token"])[: int(aux["group_sizes"].sum())]
    assert valid[rows].all()


def test_taps_are_the_sorted_rows():
    moe, params, x = random_layer()
    y, aux = layer(params, moe, SoftmaxRouter(), x)
    aux = {name: np.asarray(value) for name, value in aux.items()}
    order = np.argsort(aux["expert_ids"].reshape(-1), kind="stable")
    np.testing.assert_array_equal(aux["row_token"], order // 2)
    np.testing.assert_array_equal(aux["row_weight"], aux["weights"].reshape(-1)[order])
    total = np.zeros_like(y)
    np.add.at(total, aux["row_token"], aux["row_weight"][:, None] * aux["output"])
    np.testing.assert_allclose(y, total, atol=1e-5, rtol=1e-5)
    expert = np.repeat(np.arange(EXPERTS), aux["group_sizes"])
    down = np.asarray(params["experts"]["down"])
    again = np.einsum("mf,mfd->md", aux["hidden"], down[expert])
    np.testing.assert_allclose(aux["output"], again, atol=1e-4, rtol=1e-4)


def test_taps_that_are_not_kept_are_absent():
    moe, params, x = random_layer()
    y, aux = layer(params, moe, SoftmaxRouter(), x, options=BlockOptions())
    assert "hidden" not in aux
    assert "output" not in aux
    np.testing.assert_array_equal(y, layer(params, moe, SoftmaxRouter(), x)[0])


def test_mask_of_ones_changes_nothing_and_has_the_taylor_gradient():
    moe, params, x = random_layer()
    plain, aux = layer(params, moe, SoftmaxRouter(), x)
    ones = jnp.ones((EXPERTS, EXPERT_WIDTH))

    def loss(mask):
        y, _ = layer(params, moe, SoftmaxRouter(), x, options=BlockOptions(TAPS, neuron_mask=mask))
        return jnp.sin(y).sum(), y

    gradient, y = jax.grad(loss, has_aux=True)(ones)
    np.testing.assert_array_equal(y, plain)
    # sum over tokens of h * dL/dh, one row at a time.
    dy = np.cos(plain)[aux["row_token"]] * np.asarray(aux["row_weight"])[:, None]
    expert = np.repeat(np.arange(EXPERTS), aux["group_sizes"])
    dhidden = np.einsum("md,mfd->mf", dy, np.asarray(params["experts"]["down"])[expert])
    expected = np.zeros((EXPERTS, EXPERT_WIDTH))
    np.add.at(expected, expert, dhidden * np.asarray(aux["hidden"]))
    np.testing.assert_allclose(gradient, expected, atol=1e-3, rtol=1e-3)


def test_input_jitter_only_in_train_mode():
    moe, params, x = random_layer()
    router = SoftmaxRouter(input_jitter=0.1)
    calm, _ = layer(params, moe, router, x)
    np.testing.assert_array_equal(calm, layer(params, moe, SoftmaxRouter(), x)[0])
    _, shaken = layer(params, moe, router, x, options=BlockOptions(TAPS, rng=jax.random.key(0)))
    _, plain = layer(params, moe, SoftmaxRouter(), x)
    assert np.abs(shaken["router_logits"] - plain["router_logits"]).max() > 1e-3
    ones = jnp.ones_like(x)
    identity = params | {"router": {"kernel": jnp.eye(WIDTH, EXPERTS)}}
    _, aux = layer(identity, moe, router, ones, options=BlockOptions(TAPS, rng=jax.random.key(0)))
    assert np.abs(aux["router_logits"] - 1).max() <= 0.1 + 1e-6
