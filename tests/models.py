"""Tiny random models that several tests share."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import DenseConfig, LayerConfig, ModelConfig, MoeConfig, SharedExpert
from moe_jax.kinds import GroupedQueryAttention, SoftmaxRouter, SparseMixerRouter
from moe_jax.model import init_params
from moe_jax.plan import Plan

VOCAB, WIDTH, EXPERTS, EXPERT_WIDTH, SHARED_WIDTH = 61, 16, 6, 8, 10


def tiny_config(family: str = "olmoe", **changes: Any) -> ModelConfig:
    """Two MoE layers with a dense one between them (none for families that have none)."""
    sparse = family == "phimoe"
    shared = SharedExpert(SHARED_WIDTH, gated=True) if family == "qwen2_moe" else None
    moe = MoeConfig(EXPERTS, 2, EXPERT_WIDTH, shared=shared)
    layer = LayerConfig(2, 2, moe)
    dense = LayerConfig(2, 2, DenseConfig(12))
    layers = (layer, dense, layer) if family == "qwen3_moe" else (layer, layer)
    facts: dict[str, Any] = {
        "family": family,
        "vocab_size": VOCAB,
        "width": WIDTH,
        "attention": GroupedQueryAttention(
            head_dim=8,
            qkv_bias=sparse,
            out_bias=sparse,
            qk_norm={"olmoe": "full", "qwen3_moe": "head"}.get(family),
        ),
        "layers": layers,
        "router": SparseMixerRouter(jitter=0.2) if sparse else SoftmaxRouter(),
        "norm": "layer" if sparse else "rms",
        "lm_head_bias": sparse,
        "init_std": 0.35,
        "max_positions": 64,
    }
    return ModelConfig(**{**facts, **changes})


@functools.cache
def tiny_model(family: str = "olmoe") -> tuple[dict[str, Any], ModelConfig]:
    """Random weights and configuration; do not change them."""
    config = tiny_config(family)
    return init_params(config, jax.random.key(1)), config


def token_batches(count: int = 3, batch: int = 4, length: int = 12, seed: int = 0) -> list[dict]:
    """Batches of random tokens with padding at the end of most rows."""
    rng = np.random.default_rng(seed)
    return [
        {
            "tokens": rng.integers(0, VOCAB, (batch, length)).astype(np.int32),
            "mask": np.arange(length) < rng.integers(length // 3, length + 1, (batch, 1)),
        }
        for _ in range(count)
    ]


def neuron_masks(plan: Plan) -> dict[int, jnp.ndarray]:
    """Ones at the neurons that a plan keeps: a dry run of it."""
    masks = {}
    for i, layer in plan.layers.items():
        mask = np.zeros((EXPERTS, EXPERT_WIDTH), np.float32)
        for e, kept in layer.neurons.items():
            mask[e, list(kept)] = 1
        masks[i] = jnp.asarray(mask)
    return masks
