"""Logits against transformers on torch, over the switches of the families' configurations."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch
from tiny_hf import FAMILIES, LONGROPE, VOCAB, save_tiny, torch_model
from transformers import PhimoeForCausalLM

import moe_jax

MAX_ERROR, MAX_KL = 2e-4, 1e-8

CASES = {
    " ".join((family, name)): (family, changes)
    for family, row in FAMILIES.items()
    for name, changes in {"": {}, **row.switches}.items()
}


@torch.no_grad()
def torch_logits(model, tokens):
    return model(torch.tensor(tokens)).logits.numpy()


def our_logits(folder, tokens, segment_ids=None):
    config, params = moe_jax.load_hf(folder)
    step = jax.jit(lambda params, *arrays: moe_jax.forward(params, config, *arrays)[0])
    return np.asarray(step(params, tokens, segment_ids))


def assert_same(ours, theirs):
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    assert np.abs(theirs).max() > 0.3, "logits too small to tell anything"
    assert np.abs(ours - theirs).max() <= MAX_ERROR
    log_p, log_q = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (theirs, ours))
    assert (np.exp(log_p) * (log_p - log_q)).sum(-1).mean() <= MAX_KL


def random_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(1, VOCAB, shape)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    family, overrides = CASES[case]
    save_tiny(tmp_path, family, **overrides)
    tokens = random_tokens((2, 16))
    assert_same(our_logits(tmp_path, tokens), torch_logits(torch_model(tmp_path), tokens))


@pytest.mark.parametrize("family", ["phimoe", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_padded_and_packed_sequences_are_computed_as_each_alone(family, tmp_path):
    """Lengths on both sides of the tiny Phi-MoE's longrope switch, which is at 8."""
    save_tiny(tmp_path, family)
    tokens = random_tokens((4, 16))
    lengths = np.array([[16], [9], [3]])
    segment_ids = np.concatenate([np.arange(16) < lengths, np.ones((1, 16))]).astype(np.int32)
    segment_ids[3] = [1] * 5 + [2] * 9 + [0] * 2
    ours, model = our_logits(tmp_path, tokens, segment_ids), torch_model(tmp_path)
    for row, start, end in ((0, 0, 16), (1, 0, 9), (2, 0, 3), (3, 0, 5), (3, 5, 14)):
        alone = torch_logits(model, tokens[row : row + 1, start:end])
        assert_same(ours[row, start:end], alone[0])


def published_rotary(x, position_ids):
    """Longrope of the modelling code that Phi-3.5-MoE was published with."""
    beyond = int(position_ids.max()) + 1 > LONGROPE["original_max_position_embeddings"]
    name = "long" if beyond else "short"
    factor = np.array(LONGROPE[f"{name}_factor"])
    exponent = np.arange(len(factor)) / len(factor)
    frequency = torch.tensor(1 / (factor * LONGROPE["rope_theta"] ** exponent))
    angle = position_ids[..., None].double() * frequency
    angle = torch.cat([angle, angle], -1)
    scale = LONGROPE[f"{name}_mscale"]
    return (angle.cos() * scale).to(x.dtype), (angle.sin() * scale).to(x.dtype)


@pytest.mark.parametrize("length", [8, 9], ids=["below the switch", "above the switch"])
@pytest.mark.parametrize("published", [False, True], ids=["stock code", "published code"])
def test_longrope(length, published, tmp_path):
    save_tiny(tmp_path, "phimoe", sliding_window=None)
    if published:
        file = tmp_path / "config.json"
        code = {"AutoModelForCausalLM": "modeling_phimoe.PhimoeForCausalLM"}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": code}))
    model = torch_model(tmp_path, PhimoeForCausalLM)
    tokens = random_tokens((2, length))
    stock = torch_logits(model, tokens)
    if published:
        model.model.rotary_emb.forward = published_rotary
    theirs = torch_logits(model, tokens)
    assert_same(our_logits(tmp_path, tokens), theirs)
    differs = np.abs(theirs - stock).max() > 10 * MAX_ERROR
    assert differs == (published and length > LONGROPE["original_max_position_embeddings"])
