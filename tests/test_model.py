"""The decoder as a whole: documents and padding, masked against removed neurons, the shell."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import VOCAB, tiny_config, tiny_model

from moe_jax import forward, init_params
from moe_jax.config import LayerConfig, ModelConfig, MoeConfig
from moe_jax.kinds import GroupedQueryAttention
from moe_jax.model import TAPS, MoeModel, shell_variables
from moe_jax.params import abstract_params, leaves_with_path, nest, path_name

FAMILIES = ["phimoe", "olmoe", "qwen3_moe"]


def random_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(1, VOCAB, shape).astype(np.int32)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_separate_ones(family):
    params, config = tiny_model(family)
    lengths = (5, 8, 3)
    row, padding = random_tokens(16), 16 - sum(lengths)
    ids = np.repeat([1, 2, 3, 0], [*lengths, padding])
    # Rows of a batch: all documents packed, then each alone in front of padding.
    starts = np.cumsum([0, *lengths])[:-1]
    tokens, segment_ids = [row], [ids]
    for start, length in zip(starts, lengths, strict=True):
        tokens.append(np.roll(row, -start))
        segment_ids.append((np.arange(16) < length).astype(int))
    step = jax.jit(lambda tokens, ids: forward(params, config, tokens, ids)[0])
    packed, *alone = np.asarray(step(np.stack(tokens), np.stack(segment_ids)))
    for start, length, logits in zip(starts, lengths, alone, strict=True):
        np.testing.assert_allclose(packed[start : start + length], logits[:length], atol=2e-5)


def test_padding_changes_no_real_token():
    params, config = tiny_model("olmoe")
    tokens = random_tokens((2, 12))
    ids = (np.arange(12) < np.array([[12], [7]])).astype(np.int32)
    other = np.where(ids > 0, tokens, (tokens + 5) % VOCAB)
    step = jax.jit(lambda tokens: forward(params, config, tokens, ids, ("group_sizes",)))
    first, aux = step(tokens)
    second, _ = step(other)
    np.testing.assert_array_equal(np.asarray(first)[ids > 0], np.asarray(second)[ids > 0])
    for layer in aux["layers"]:
        assert int(layer["group_sizes"].sum()) == ids.sum() * 2


def test_a_token_sees_none_that_follow():
    params, config = tiny_model("qwen3_moe")
    tokens = random_tokens((1, 12))
    changed = tokens.copy()
    changed[0, 8:] = (changed[0, 8:] + 1) % VOCAB
    step = jax.jit(lambda tokens: forward(params, config, tokens)[0])
    first, second = step(tokens), step(changed)
    np.testing.assert_allclose(first[0, :8], second[0, :8], atol=1e-6)
    assert np.abs(first[0, 8:] - second[0, 8:]).max() > 1e-3


def sliced(params, config, kept):
    """The model with only the neurons ``kept[layer]`` (ids [E, F']) of each expert."""
    params = jax.tree.map(np.asarray, params)
    for i, ids in kept.items():
        experts = params["layers"][i]["moe"]["experts"]
        params["layers"][i]["moe"]["experts"] = {
            "gate": np.take_along_axis(experts["gate"], ids[:, None, :], 2),
            "up": np.take_along_axis(experts["up"], ids[:, None, :], 2),
            "down": np.take_along_axis(experts["down"], ids[:, :, None], 1),
        }
        config = config.replace_moe(i, expert_width=ids.shape[1])
    return jax.tree.map(jnp.asarray, params), config


@pytest.mark.parametrize(
    ("width", "expert_width", "num_experts", "kept", "tokens"),
    [
        (16, 8, 6, 3, 12),
        (64, 300, 4, 77, 200),
        (256, 40, 16, 13, 256),
        (128, 192, 4, 64, 300),  # widths that need no padding, before and after
        (128, 512, 4, 100, 300),
    ],
)
def test_masked_equals_sliced_to_the_bit(width, expert_width, num_experts, kept, tokens):
    layer = LayerConfig(2, 2, MoeConfig(num_experts, 2, expert_width))
    config = ModelConfig(
        "olmoe", VOCAB, width, GroupedQueryAttention(8, qk_norm="full"), (layer,), init_std=0.2
    )
    params = init_params(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    every = np.tile(np.arange(expert_width), (num_experts, 1))
    kept_ids = {0: np.sort(rng.permuted(every, axis=1)[:, :kept])}
    masks = {}
    for i, ids in kept_ids.items():
        mask = np.zeros((num_experts, expert_width), np.float32)
        np.put_along_axis(mask, ids, 1, 1)
        masks[i] = jnp.asarray(mask)
    batch = random_tokens((1, tokens))
    small_params, small_config = sliced(params, config, kept_ids)
    masked = jax.jit(lambda p: forward(p, config, batch, neuron_masks=masks)[0])(params)
    small = jax.jit(lambda p: forward(p, small_config, batch)[0])(small_params)
    np.testing.assert_array_equal(masked, small)


@pytest.mark.parametrize("family", FAMILIES)
def test_shell_equals_forward(family):
    params, config = tiny_model(family)
    tokens = random_tokens((2, 8))
    model = MoeModel(config)
    logits, aux = jax.jit(model.apply)(shell_variables(params), tokens)
    expected, _ = jax.jit(lambda p: forward(p, config, tokens))(params)
    np.testing.assert_array_equal(logits, expected)
    assert aux == {"layers": [{}] * config.num_layers}


@pytest.mark.parametrize("family", FAMILIES)
def test_initialised_shapes_are_those_of_the_abstract_tree(family):
    config = tiny_config(family)
    leaves = {path: leaf.shape for path, leaf in leaves_with_path(abstract_params(config))}
    params = init_params(config, jax.random.key(0))
    assert {path: leaf.shape for path, leaf in leaves_with_path(params)} == leaves
    variables = jax.eval_shape(MoeModel(config).init, jax.random.key(0), random_tokens((1, 4)))
    by_name = {path_name(path): shape for path, shape in leaves.items()}
    assert {name: leaf.shape for name, leaf in variables["params"].items()} == by_name


def test_nest_inverts_leaves_with_path():
    params, _ = tiny_model("phimoe")
    again = nest(dict(leaves_with_path(params)))
    assert jax.tree.structure(again) == jax.tree.structure(params)


def test_shell_refuses_a_wrong_shape():
    params, config = tiny_model("olmoe")
    variables = shell_variables(params)
    variables["params"]["final_norm.scale"] = jnp.ones(3)
    with pytest.raises(Exception, match=r"final_norm\.scale"):
        MoeModel(config).apply(variables, random_tokens((1, 4)))


def test_taps():
    params, config = tiny_model("qwen3_moe")
    tokens = random_tokens((2, 8))
    _, aux = jax.jit(lambda p: forward(p, config, tokens, taps=TAPS))(params)
    everywhere = {"layer_input", "key", "value", "mixed", "layer_output"}
    everywhere |= {"feed_forward_input", "feed_forward_output", "hidden"}
    assert set(aux["layers"][0]) == set(TAPS) - {"shared_hidden"}  # of shared experts
    assert set(aux["layers"][1]) == everywhere
    np.testing.assert_array_equal(aux["layers"][0]["layer_output"], aux["layers"][1]["layer_input"])
    assert aux["layers"][0]["hidden"].shape == (2 * 8 * 2, config.moe(0).expert_width)
    np.testing.assert_array_equal(
        aux["layers"][0]["layer_input"], params["embed"]["embedding"][tokens]
    )


def test_unknown_tap():
    params, config = tiny_model("olmoe")
    with pytest.raises(ValueError, match="hiden"):
        forward(params, config, random_tokens((1, 4)), taps=("hiden",))


def test_train_mode_follows_its_key():
    params, config = tiny_model("phimoe")
    tokens = random_tokens((2, 8))
    step = jax.jit(lambda rng: forward(params, config, tokens, rng=rng)[0])
    first, again, other = (step(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_bfloat16_stays_close_to_float32():
    params, config = tiny_model("olmoe")
    tokens = random_tokens((2, 8))
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    step = jax.jit(lambda p: forward(p, config, tokens)[0])
    logits, expected = step(narrow), step(wide)
    assert logits.dtype == jnp.float32
    log_p, log_q = jax.nn.log_softmax(expected), jax.nn.log_softmax(logits)
    assert float((jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean()) < 0.01
