"""Costs of neurons, experts and key/value groups token by token, against finite differences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_config, token_batches

from moe_jax.calibrate import calibrate
from moe_jax.config import MoeConfig, SharedExpert
from moe_jax.losses import next_token_labels
from moe_jax.model import forward, init_params

TAPS = ("hidden", "row_token", "row_weight", "group_sizes", "shared_hidden", "mixed")
# Of the loss, which float32 gives to about 1e-6: central differences of this step are right to a
# few parts in a thousand of the largest. Larger ones move a token to other experts.
STEP = 5e-3
TOLERANCE = 0.02


def _model(gated: bool):
    config = tiny_config("qwen3_moe")
    layers = list(config.layers)
    moe = layers[0].feed_forward
    assert isinstance(moe, MoeConfig)
    shared = dataclasses.replace(moe, shared=SharedExpert(5, gated))
    layers[0] = dataclasses.replace(layers[0], num_heads=4, num_kv_heads=2, feed_forward=shared)
    config = dataclasses.replace(config, layers=tuple(layers))
    return init_params(config, jax.random.key(3)), config


@functools.partial(jax.jit, static_argnums=1)
def _run(params, config, tokens, segments, attention_offset, feed_forward_offset):
    offsets = {"attention_offsets": attention_offset, "feed_forward_offsets": feed_forward_offset}
    logits, aux = forward(params, config, tokens, segments, TAPS, **offsets)
    return logits, aux["layers"]


def _loss(params, config, tokens, mask, attention_offsets=None, feed_forward_offsets=None):
    """Summed cross-entropy of a batch, in float64 behind the logits."""
    segments = jnp.asarray(mask, jnp.int32)
    nothing = jnp.zeros((*tokens.shape, config.width))
    zeros = dict.fromkeys(range(config.num_layers), nothing)
    offsets = (zeros | (attention_offsets or {}), zeros | (feed_forward_offsets or {}))
    logits, layers = _run(params, config, tokens, segments, *offsets)
    labels, counted = next_token_labels(tokens, segments)
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, np.asarray(labels)[..., None], -1)[..., 0]
    return -float(picked[np.asarray(counted)].sum()), layers


def _slope(run, part: str, layer: int, token: int, direction: np.ndarray, shape) -> float:
    """The loss's change if so much is added at one token of a layer's part, by differences."""
    offset = np.zeros(shape, np.float32)
    offset[0, token] = STEP * direction
    ends = [run(**{part: {layer: jnp.asarray(sign * offset)}})[0] for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * STEP)


@pytest.mark.parametrize("gated", [True, False])
def test_token_squares_are_sums_of_squared_slopes(gated):
    params, config = _model(gated)
    batch = token_batches(1, batch=1, length=6, seed=2)[0]
    batch["mask"][:, 5:] = False
    stats = calibrate(params, config, [batch], importance=("lm",))

    def run(**offsets):
        return _loss(params, config, batch["tokens"], batch["mask"], **offsets)

    _, layers = run()
    shape = (*batch["tokens"].shape, config.width)
    aux, weights = layers[0], params["layers"][0]
    down = np.asarray(weights["moe"]["experts"]["down"], np.float64)
    expert = np.repeat(np.arange(len(down)), np.asarray(aux["group_sizes"]))
    neurons, experts = np.zeros(down.shape[:2]), np.zeros(len(down))
    gradients = np.zeros(down.shape[:2])
    for row, e in enumerate(expert):
        token, weight = int(aux["row_token"][row]), float(aux["row_weight"][row])
        hidden = np.asarray(aux["hidden"][row], np.float64)
        slopes = [
            _slope(run, "feed_forward_offsets", 0, token, weight * h * w, shape)
            for h, w in zip(hidden, down[e], strict=True)
        ]
        neurons[e] += np.square(slopes)
        gradients[e] += np.square(np.divide(slopes, hidden))
        whole = weight * hidden @ down[e]
        experts[e] += _slope(run, "feed_forward_offsets", 0, token, whole, shape) ** 2
    shared_down = np.asarray(weights["moe"]["shared"]["down"], np.float64)
    shared_hidden = np.asarray(aux["shared_hidden"][0, :5], np.float64)
    shared = np.zeros(shared_hidden.shape)
    for token, j in np.ndindex(shared.shape):
        added = shared_hidden[token, j] * shared_down[j]
        shared[token, j] = _slope(run, "feed_forward_offsets", 0, token, added, shape)
    expected = {
        "token_square": neurons,
        "gradient_square": gradients,
        "expert_token_square": experts,
        "shared_token_square": np.square(shared).sum(0, keepdims=True),
        "shared_gradient_square": np.square(shared / shared_hidden).sum(0, keepdims=True),
        "shared_batch_abs": np.abs(shared.sum(0, keepdims=True)),
        "shared_sequence_square": np.square(shared.sum(0, keepdims=True)),
    }
    for name, values in expected.items():
        found = stats.layers[0][f"lm.{name}"]
        np.testing.assert_allclose(found, values, rtol=0, atol=TOLERANCE * values.max())
    for i, layer in enumerate(config.layers):
        mixed = np.asarray(layers[i]["mixed"][0], np.float64)
        out = np.asarray(params["layers"][i]["attention"]["out"]["kernel"], np.float64)
        groups = np.zeros(layer.num_kv_heads)
        for token in range(5):
            added = np.einsum("nh,nhd->nd", mixed[token], out)
            for g, part in enumerate(added.reshape(layer.num_kv_heads, -1, config.width)):
                groups[g] += _slope(run, "attention_offsets", i, token, part.sum(0), shape) ** 2
        found = stats.attention[i]["lm.token_square"]
        np.testing.assert_allclose(found, groups, rtol=0, atol=TOLERANCE * groups.max())


def test_tokens_add_up_whatever_the_batches():
    params, config = _model(True)
    batches = token_batches(2, batch=2, length=8)
    together = {n: np.concatenate([batch[n] for batch in batches]) for n in ("tokens", "mask")}
    one, two = (
        calibrate(params, config, text, importance=("lm",)).layers[2]
        for text in ([together], batches)
    )
    for name in ("lm.token_square", "lm.expert_token_square"):
        # Sums of the same numbers in another order.
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5)


def test_pulls_are_slopes_along_outputs():
    params, config = _model(True)
    batch = token_batches(1, batch=1, length=6, seed=2)[0]
    batch["mask"][:] = True
    stats = calibrate(params, config, [batch], importance=("rerouting",))
    moe, weights = config.moe(0), params["layers"][0]["moe"]
    pulls = stats.layers[0]["rerouting.pulls"]
    assert pulls.shape == (6, moe.num_experts)

    def run(**offsets):
        return _loss(params, config, batch["tokens"], batch["mask"], **offsets)

    segments = jnp.asarray(batch["mask"], jnp.int32)
    taps = ("feed_forward_input", "router_logits")
    aux = forward(params, config, batch["tokens"], segments, taps)[1]["layers"][0]
    np.testing.assert_allclose(stats.layers[0]["rerouting.logits"], aux["router_logits"], rtol=1e-5)
    x = np.asarray(aux["feed_forward_input"][0], np.float64)
    experts = {name: np.asarray(leaf, np.float64) for name, leaf in weights["experts"].items()}
    shape, slopes = (*batch["tokens"].shape, config.width), np.zeros(pulls.shape)
    for t, row in enumerate(np.asarray(aux["router_logits"])):
        for e in np.argsort(-row)[: 2 * moe.experts_per_token]:
            gate = x[t] @ experts["gate"][e]
            hidden = gate / (1 + np.exp(-gate)) * (x[t] @ experts["up"][e])
            y = hidden @ experts["down"][e]
            slopes[t, e] = _slope(run, "feed_forward_offsets", 0, t, y, shape)
    atol = TOLERANCE * np.abs(slopes).max()
    np.testing.assert_allclose(pulls, slopes, rtol=0, atol=atol)
    assert ((pulls == 0) == (slopes == 0)).all()
