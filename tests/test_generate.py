"""Generation with the cache against full recomputation, and against transformers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import tiny_config, tiny_model
from tiny_hf import VOCAB, save_tiny
from transformers import AutoModelForCausalLM

from moe_jax import load_hf
from moe_jax.data import load_tokenizer
from moe_jax.kinds import LongRope
from moe_jax.model import forward, init_params
from moe_jax.model.generate import decode_step, generate, padded_length, prefill, stop_at
from moe_jax.params import layers_are_uniform, stack_layers

# Float32 rounding of sums in another order, through a few layers, on logits of order one to ten.
TOLERANCE = 2e-4
# The switch changes attention enough to change the likeliest token now and then.
LONGROPE = LongRope(
    original_positions=12,
    short_factor=(1.0, 1.5, 1.2, 1.0),
    long_factor=(2.0, 35.0, 25.0, 40.0),
    short_scale=0.5,
    long_scale=3.0,
)


def phimoe(window: int | None = None, **changes):
    """A tiny model whose layers see ``window`` tokens; its weights let attention matter."""
    config = tiny_config("phimoe", init_std=0.8, **changes)
    layers = tuple(dataclasses.replace(layer, sliding_window=window) for layer in config.layers)
    config = dataclasses.replace(config, layers=layers)
    return init_params(config, jax.random.key(0)), config


MODELS = {
    "olmoe": lambda: tiny_model("olmoe"),
    "qwen3_moe": lambda: tiny_model("qwen3_moe"),
    "sliding windows": lambda: phimoe(window=5),
    "longrope": lambda: phimoe(rope=LONGROPE),
}


def prompts_of(*lengths, vocab=VOCAB, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocab, length).tolist() for length in lengths]


@functools.partial(jax.jit, static_argnames="config")
def padded_logits(params, config, tokens, segment_ids):
    return forward(params, config, tokens, segment_ids)[0][0]


def logits_of(params, config, tokens):
    """Of each token of one sequence, by ``forward`` on all of it.

    Padding is made of documents of one token each: their positions do not move LongRoPE's switch,
    and one program serves all lengths.
    """
    padding = 24 - len(tokens)
    segment_ids = [1] * len(tokens) + list(range(2, 2 + padding))
    arrays = (np.array([ids], np.int32) for ids in (list(tokens) + [0] * padding, segment_ids))
    return np.asarray(padded_logits(params, config, *arrays))[: len(tokens)]


def next_logits(params, config, tokens):
    return logits_of(params, config, tokens)[-1]


def recomputed(params, config, prompt, count):
    """Greedy decoding by a full forward pass for each token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(next_logits(params, config, tokens).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_cache_gives_the_logits_of_forward(name):
    """Ragged prompts, on both sides of a window; LongRoPE beyond its switch, which is at 12."""
    params, config = MODELS[name]()
    sizes = (14, 13, 20) if name == "longrope" else (1, 6, 11)
    prompts = prompts_of(*sizes)
    tokens = np.zeros((3, 20), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    read = jax.jit(prefill, static_argnames=("config", "capacity"))
    step = jax.jit(decode_step, static_argnames="config")
    logits, cache = read(params, config, tokens, jnp.array(sizes), 24)
    for new in prompts_of(3, 3, 3, 3, seed=1):
        for row, prompt in enumerate(prompts):
            expected = next_logits(params, config, prompt)
            np.testing.assert_allclose(logits[row], expected, atol=TOLERANCE, rtol=TOLERANCE)
            prompt.append(new[row])
        logits, cache = step(params, config, cache, jnp.array(new))
    assert cache.lengths.tolist() == [size + 4 for size in sizes]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_recomputation(name):
    """With LongRoPE, most prompts cross the switch, each at another time."""
    params, config = MODELS[name]()
    prompts = prompts_of(1, 5, 7, 8, 9, 10, 12, 14)
    expected = [recomputed(params, config, prompt, 10) for prompt in prompts]
    assert generate(params, config, prompts, 10) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(prompts)


def test_longrope_switch_changes_what_was_read_before_it():
    """Or the test above could not tell a stale cache."""
    params, config = MODELS["longrope"]()
    (prompt,) = prompts_of(13)
    lengths = jnp.array([12])
    tokens = np.array([prompt], np.int32)
    read = jax.jit(prefill, static_argnames=("config", "capacity"))
    _, cache = read(params, config, tokens[:, :12], lengths, 16)
    step = jax.jit(decode_step, static_argnames="config")
    stale, _ = step(params, config, cache, tokens[:, 12])
    assert np.abs(stale[0] - next_logits(params, config, prompt)).max() > 100 * TOLERANCE


def test_stacked_layers():
    params, config = tiny_model("olmoe")
    assert layers_are_uniform(config)
    prompts = prompts_of(3, 7)
    stacked = generate(stack_layers(params), config, prompts, 5)
    assert stacked == generate(params, config, prompts, 5)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "phimoe", "gpt_oss", "deepseek_v3"])
def test_equals_transformers(family, tmp_path):
    """Padded on the left there, at the end here; the tiny Phi-MoE's switch is at 8."""
    save_tiny(tmp_path, family, eos_token_id=None)
    config, params = load_hf(tmp_path)
    prompts = prompts_of(9, 12, 20)
    ids = torch.zeros((3, 20), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :] = torch.tensor(prompt)
        mask[row, -len(prompt) :] = 1
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    theirs = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=12, pad_token_id=0
    )
    assert generate(params, config, prompts, 12) == theirs[:, 20:].tolist()


def test_end_tokens_and_predicate():
    params, config = tiny_model("olmoe")
    prompts = prompts_of(4, 9)
    whole = generate(params, config, prompts, 10)
    end = whole[0][3]
    cut = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in whole]
    assert generate(params, config, prompts, 10, end_tokens={end}) == cut
    assert generate(params, config, prompts, 10, finished=lambda tokens: end in tokens) == cut
    assert cut != whole


def test_sampling_follows_its_seed_and_the_distribution():
    params, config = tiny_model("olmoe")
    prompts = prompts_of(4) * 400

    def drawn(seed):
        return np.array(generate(params, config, prompts, 2, temperature=0.7, seed=seed))

    first = drawn(0)
    np.testing.assert_array_equal(first, drawn(0))
    assert (first != drawn(1)).any()
    expected = np.asarray(jax.nn.softmax(next_logits(params, config, prompts[0]) / 0.7))
    found = np.bincount(first[:, 0], minlength=config.vocab_size) / len(prompts)
    # Five standard deviations of a share among 400 draws.
    assert (np.abs(found - expected) < 5 * np.sqrt(expected / 400) + 1e-3).all()
    assert (found > 0).sum() > 3


def test_stop_at():
    tokenizer = load_tokenizer("moe_jax/assets/olmoe/tokenizer.json")
    text = "One two.\n\nQuestion: three"
    tokens = tokenizer.encode(text)
    finished = stop_at(tokenizer, ["\n\nQuestion:", ""])
    ends = [finished(tokens[:count]) for count in range(1, len(tokens) + 1)]
    first = next(
        i for i in range(len(tokens)) if "\n\nQuestion:" in tokenizer.decode(tokens[: i + 1])
    )
    assert ends.index(True) == first
    assert not any(stop_at(tokenizer, [])(tokens[:count]) for count in range(1, len(tokens)))


def test_padded_length():
    assert [padded_length(n) for n in (1, 32, 33, 64, 65)] == [32, 32, 64, 64, 128]


def test_refuses():
    params, config = tiny_model("olmoe")
    with pytest.raises(ValueError, match="at least one token each"):
        generate(params, config, [], 3)
    with pytest.raises(ValueError, match="at least one token each"):
        generate(params, config, [[1], []], 3)
    with pytest.raises(ValueError, match=r"\[1, 54\] with a prompt of 10 tokens .* got 55"):
        generate(params, config, prompts_of(10), 55)
    with pytest.raises(ValueError, match="got 0"):
        generate(params, config, prompts_of(10), 0)
    with pytest.raises(ValueError, match=r"got -0\.5"):
        generate(params, config, prompts_of(10), 3, temperature=-0.5)
    with pytest.raises(ValueError, match="vocab_size"):
        generate(params, config, [[config.vocab_size]], 3)
    with pytest.raises(ValueError, match="at least the prompts' 5 tokens, got 4"):
        prefill(params, config, np.zeros((1, 5), np.int32), jnp.array([5]), 4)
