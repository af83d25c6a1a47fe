"""Tiny models of every family, made by transformers with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GptOssConfig,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    LlamaConfig,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from moe_jax.config import ModelConfig
from moe_jax.hf.families import find_family
from moe_jax.params import Leaf, abstract_params

WEIGHTS = "model.safetensors"
VOCAB = 48
SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 3.5],
    "short_mscale": 1.1,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 8,
}


YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 8,
    "beta_slow": 1,
    "original_max_position_embeddings": 32,
}
# Of latent attention: every head has keys and values of its own.
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_COUNTED = {
    "intermediate_size": 12,
    "moe_intermediate_size": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
}


_GRANITE = {
    "intermediate_size": 8,
    "num_local_experts": 4,
    "embedding_multiplier": 1.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.0,
}


class Tiny(NamedTuple):
    """A row of the table of families.

    Attributes:
        kind: its configuration in transformers.
        facts: of the tiny model, beside the shared ones.
        switches: name -> changes to these; logits must be right for each.
    """

    kind: Callable[..., Any]
    facts: dict[str, Any]
    switches: dict[str, dict[str, Any]]


FAMILIES = {
    "phimoe": Tiny(
        PhimoeConfig,
        {
            "intermediate_size": 8,
            "num_local_experts": 4,
            "attention_bias": True,
            "lm_head_bias": True,
            "sliding_window": 7,
            "rope_parameters": LONGROPE,
        },
        {
            "tied, no biases": {
                "tie_word_embeddings": True,
                "attention_bias": False,
                "lm_head_bias": False,
            },
            "head_dim, one kv head": {"head_dim": 4, "num_key_value_heads": 1},
            "default rope, full attention": {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_window": None,
            },
            "wide jitter band": {"router_jitter_noise": 0.4, "num_local_experts": 6},
        },
    ),
    "olmoe": Tiny(
        OlmoeConfig,
        {"intermediate_size": 8, "num_experts": 4, "clip_qkv": 0.5},
        {
            "tied, biases, renormalised": {
                "tie_word_embeddings": True,
                "attention_bias": True,
                "norm_topk_prob": True,
            },
            "K=1, no clip, multi-head": {
                "num_experts_per_tok": 1,
                "clip_qkv": None,
                "num_key_value_heads": 4,
            },
            "K=E": {"num_experts_per_tok": 4, "num_key_value_heads": 1},
        },
    ),
    "qwen3_moe": Tiny(
        Qwen3MoeConfig,
        {
            "intermediate_size": 12,
            "moe_intermediate_size": 8,
            "num_experts": 4,
            "head_dim": 8,
            "norm_topk_prob": True,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 7,
        },
        {
            "tied, biases, every other layer": {
                "tie_word_embeddings": True,
                "attention_bias": True,
                "mlp_only_layers": [],
                "decoder_sparse_step": 2,
            },
            "K=1, full attention, one kv head": {
                "num_experts_per_tok": 1,
                "norm_topk_prob": False,
                "use_sliding_window": False,
                "num_key_value_heads": 1,
            },
        },
    ),
    "mixtral": Tiny(
        MixtralConfig,
        {"intermediate_size": 8, "num_local_experts": 4, "sliding_window": 7},
        {
            "tied, head_dim, K=3": {
                "tie_word_embeddings": True,
                "head_dim": 8,
                "num_experts_per_tok": 3,
            },
            "full attention, K=1": {"sliding_window": None, "num_experts_per_tok": 1},
        },
    ),
    "qwen2_moe": Tiny(
        Qwen2MoeConfig,
        {
            "intermediate_size": 12,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 10,
            "num_experts": 4,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 7,
        },
        {
            "tied, no biases, every other layer, renormalised": {
                "tie_word_embeddings": True,
                "qkv_bias": False,
                "norm_topk_prob": True,
                "mlp_only_layers": [],
                "decoder_sparse_step": 2,
                "use_sliding_window": False,
            },
            "types of layers, head_dim, one kv head": {
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
                "head_dim": 8,
                "num_key_value_heads": 1,
            },
        },
    ),
    "deepseek_v2": Tiny(
        DeepseekV2Config,
        {**_COUNTED, **_LATENT, "n_shared_experts": 2, "routed_scaling_factor": 1.5},
        {
            "groups, no query rank, biases, tied": {
                "topk_method": "group_limited_greedy",
                "n_group": 4,
                "topk_group": 2,
                "q_lora_rank": None,
                "attention_bias": True,
                "tie_word_embeddings": True,
            },
            "yarn, every layer has experts": {
                "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9},
                "first_k_dense_replace": 0,
            },
        },
    ),
    "deepseek_v3": Tiny(
        DeepseekV3Config,
        {**_COUNTED, **_LATENT, "n_group": 2, "topk_group": 1, "num_mtp_layers": 0},
        {
            "one group, halves, no query rank, tied": {
                "n_group": 1,
                "topk_group": 1,
                "rope_interleave": False,
                "q_lora_rank": None,
                "tie_word_embeddings": True,
            },
            "yarn, weights as they are, biases, two shared": {
                "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
                "norm_topk_prob": False,
                "attention_bias": True,
                "n_shared_experts": 2,
            },
        },
    ),
    "glm4_moe": Tiny(
        Glm4MoeConfig,
        {**_COUNTED, "head_dim": 8, "num_mtp_layers": 0, "routed_scaling_factor": 1.5},
        {
            "norms, biases, groups, tied": {
                "use_qk_norm": True,
                "attention_bias": True,
                "n_group": 2,
                "topk_group": 1,
                "tie_word_embeddings": True,
            },
            "whole heads turned, yarn": {
                "rope_parameters": {**YARN, "partial_rotary_factor": 1.0},
                "norm_topk_prob": False,
            },
        },
    ),
    "glm4_moe_lite": Tiny(
        Glm4MoeLiteConfig,
        {**{k: v for k, v in _COUNTED.items() if k != "first_k_dense_replace"}, **_LATENT},
        {
            "dense layers by list, no query rank": {
                "mlp_layer_types": ["sparse", "dense", "sparse"],
                "q_lora_rank": None,
            },
            "halves, tied, biases": {
                "rope_interleave": False,
                "tie_word_embeddings": True,
                "attention_bias": True,
            },
        },
    ),
    "minimax_m2": Tiny(
        MiniMaxM2Config,
        {
            "intermediate_size": 8,
            "num_local_experts": 4,
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
            },
        },
        {
            "tied, whole heads turned, one kv head": {
                "tie_word_embeddings": True,
                "num_key_value_heads": 1,
                "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
            },
            "six experts, K=3, yarn": {
                "num_local_experts": 6,
                "num_experts_per_tok": 3,
                "rope_parameters": {**YARN, "partial_rotary_factor": 0.5},
            },
        },
    ),
    "ernie4_5_moe": Tiny(
        Ernie4_5_MoeConfig,
        {
            "intermediate_size": 12,
            "moe_intermediate_size": 8,
            "moe_num_experts": 4,
            "moe_k": 2,
            "num_hidden_layers": 3,
            "moe_num_shared_experts": 2,
        },
        {
            "untied, every other layer": {
                "tie_word_embeddings": False,
                "moe_layer_interval": 2,
            },
            "first layers, one shared": {
                "moe_layer_start_index": 0,
                "moe_layer_end_index": 1,
                "moe_num_shared_experts": 1,
            },
        },
    ),
    "granitemoe": Tiny(
        GraniteMoeConfig,
        _GRANITE,
        {
            "tied, biases, K=3": {
                "tie_word_embeddings": True,
                "attention_bias": True,
                "num_experts_per_tok": 3,
            },
            "yarn, K=1, one kv head": {
                "rope_parameters": YARN,
                "num_experts_per_tok": 1,
                "num_key_value_heads": 1,
            },
        },
    ),
    "granitemoeshared": Tiny(
        GraniteMoeSharedConfig,
        {**_GRANITE, "shared_intermediate_size": 10},
        {
            "none shared, no multipliers": {
                "shared_intermediate_size": 0,
                "embedding_multiplier": 1.0,
                "residual_multiplier": 1.0,
                "attention_multiplier": 0.5,
                "logits_scaling": 1.0,
            },
            "tied, biases, yarn": {
                "tie_word_embeddings": True,
                "attention_bias": True,
                "rope_parameters": YARN,
            },
        },
    ),
    "gpt_oss": Tiny(
        GptOssConfig,
        {
            "intermediate_size": 8,
            "num_local_experts": 4,
            "head_dim": 8,
            "sliding_window": 7,
            # Within reach of the tiny model's products.
            "swiglu_limit": 1.0,
        },
        {
            "tied, few biases, default rope, K=1": {
                "tie_word_embeddings": True,
                "attention_bias": False,
                "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
                "num_experts_per_tok": 1,
            },
            "types of layers, one kv head, gain": {
                "layer_types": ["full_attention", "sliding_attention"],
                "num_key_value_heads": 1,
                "rope_parameters": {**YARN, "truncate": False},
                "swiglu_alpha": 0.7,
            },
        },
    ),
    "llama": Tiny(
        lambda **facts: LlamaConfig(**{k: v for k, v in facts.items() if "experts" not in k}),
        {"intermediate_size": 12},
        {
            "tied, biases, head_dim": {
                "tie_word_embeddings": True,
                "attention_bias": True,
                "head_dim": 8,
            },
            "llama3 rope": {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 100.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
                "head_dim": 16,
            },
        },
    ),
}
# Those that have experts, some layers of them at least.
MIXTURES = [name for name in FAMILIES if "num_experts" in find_family(name).keys]
SHARING = [name for name in MIXTURES if "shared_width" in find_family(name).keys]


def save_tiny(
    folder: Path, family: str, *, fused: bool = False, dtype=torch.float32, seed=0, **overrides
) -> Path:
    """A random model in ``folder``; weights are large enough for its parts to matter."""
    row = FAMILIES[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(row.kind(**{**SHARED, **row.facts, **overrides}))
    with torch.no_grad():
        corrections = [b for name, b in model.named_buffers() if "correction_bias" in name]
        for parameter in (*model.parameters(), *corrections):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.to(dtype).save_pretrained(folder, save_original_format=not fused)
    return Path(folder)


def with_further_layer(folder: Path) -> Path:
    """A checkpoint with one more layer than it computes, as DeepSeek-V3 predicts two tokens."""
    tensors = load_file(folder / WEIGHTS)
    last = {k: v for k, v in tensors.items() if k.startswith("model.layers.2.")}
    for name, tensor in last.items():
        tensors[name.replace("layers.2.", "layers.3.")] = tensor + 1
    tensors["model.layers.3.eh_proj.weight"] = torch.ones(16, 32)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    file = folder / "config.json"
    hf = json.loads(file.read_text())
    hf.pop("num_mtp_layers", None)
    file.write_text(json.dumps({**hf, "num_nextn_predict_layers": 1}))
    return folder


def read_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of every tensor, read with the reference library."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            for key in stream.keys():  # noqa: SIM118, not a dict
                part = stream.get_slice(key)
                data = stream.get_tensor(key).contiguous().view(torch.uint8).numpy().tobytes()
                tensors[key] = (part.get_dtype(), tuple(part.get_shape()), data)
    return tensors


def random_params(config: ModelConfig, seed: int = 0, dtype=jnp.float32):
    """Random weights of an architecture."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * generator.normal(size=leaf.shape), dtype),
        abstract_params(config),
        is_leaf=lambda node: isinstance(node, Leaf),
    )


def trees_equal(first, second) -> bool:
    """Whether two parameter trees have the same structure, dtypes and bytes."""
    if jax.tree.structure(first) != jax.tree.structure(second):
        return False
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(
        a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs
    )


def torch_model(folder: Path, kind: Any = AutoModelForCausalLM, **options) -> Any:
    """A model of transformers: eager attention and experts, float32."""
    return kind.from_pretrained(
        folder,
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
        **options,
    ).eval()


def torch_logits(folder: Path, tokens: np.ndarray, **options) -> np.ndarray:
    """Logits of ``torch_model``."""
    with torch.no_grad():
        return torch_model(folder, **options)(torch.tensor(tokens)).logits.numpy()
