"""The table of model families: one row each, and nothing else knows a family by name.

A row says how ``config.json`` spells the architecture (names, aliases and what the stock class
assumes where a key is missing) and under which names, and in which layout, every parameter lies on
disk. Reading, writing, key checks and shape checks are driven by it. The modelling and
configuration files of ``transformers`` 5 are the definition of a family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

# How a tensor on disk becomes a leaf. HF linear layers are stored [out, in].
#   same           shapes are equal
#   flat           the leaf's axes are merged into one
#   linear         [out, in] -> [in, out...]: the leaf's first axis is the input
#   linear_heads   [out, in] -> [in..., out]: the leaf's last axis is the output
#   stacked        [E, out, in] -> [E, in, out]
#   stacked_first  the first half of axis 1 of [E, 2 * out, in] -> [E, in, out]
#   stacked_second the second half
Transform = Literal[
    "same", "flat", "linear", "linear_heads", "stacked", "stacked_first", "stacked_second"
]
TensorTable = Mapping[str, tuple[str, Transform]]


@dataclass(frozen=True)
class Key:
    """One fact in ``config.json``.

    Attributes:
        names: spellings; where two are present they must agree. A new file gets the first.
        kind: type of the value.
        default: what the stock class takes where the key is absent; a function of the facts
            that stand before this one in the row.
        null: what it makes of an explicit ``null``; None leaves it at None.
        write_all: write every spelling, since readers differ in the one they know.
    """

    names: tuple[str, ...]
    kind: type
    default: Any | Callable[[dict[str, Any]], Any]
    null: Callable[[dict[str, Any]], Any] | None = None
    write_all: bool = False


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        model_type: as in ``config.json``; ``{model_type}_compressed`` is accepted as well.
        architecture: stock class for causal language modelling.
        default_theta: rotary base where the file gives none.
        longrope: whether the class reads longrope with ``short_mscale`` and ``long_mscale``.
        keys: fact name -> Key, in the order in which defaults may refer to each other.
        fixed: fields of ModelConfig that are the same for every model of the family.
        router: ``RouterConfig.kind``.
        router_slots: experts per token that the router is able to pick, None for any.
        sliding_window_switch: boolean key without which ``sliding_window`` does not count.
        dense_layers: keys of the list of dense layers and of the period of MoE layers.
        layouts: layout name -> leaf path -> (tensor name, transform). The first is the default.
            ``{layer}``, ``{expert}`` and ``{novice}`` stand for indices; where experts come in
            buckets of equal width, a path is given without the bucket's index.
    """

    model_type: str
    architecture: str
    default_theta: float
    keys: Mapping[str, Key]
    fixed: Mapping[str, Any]
    layouts: Mapping[str, TensorTable]
    router: Literal["softmax", "sparsemixer"] = "softmax"
    router_slots: int | None = None
    longrope: bool = False
    sliding_window_switch: str | None = None
    dense_layers: tuple[str, str] | None = None


def _heads(facts: dict[str, Any]) -> int:
    return facts["num_heads"]


def _head_dim(facts: dict[str, Any]) -> int:
    if facts["num_heads"] < 1:
        raise ValueError(f"num_attention_heads must be positive, got {facts['num_heads']}")
    return facts["width"] // facts["num_heads"]


_HEAD_DIM = Key(("head_dim",), int, _head_dim, null=_head_dim)
_IN_LAYER: TensorTable = {
    "attention_norm.scale": ("input_layernorm.weight", "same"),
    "attention_norm.bias": ("input_layernorm.bias", "same"),
    "mlp_norm.scale": ("post_attention_layernorm.weight", "same"),
    "mlp_norm.bias": ("post_attention_layernorm.bias", "same"),
    "attention.query.kernel": ("self_attn.q_proj.weight", "linear"),
    "attention.query.bias": ("self_attn.q_proj.bias", "flat"),
    "attention.key.kernel": ("self_attn.k_proj.weight", "linear"),
    "attention.key.bias": ("self_attn.k_proj.bias", "flat"),
    "attention.value.kernel": ("self_attn.v_proj.weight", "linear"),
    "attention.value.bias": ("self_attn.v_proj.bias", "flat"),
    "attention.out.kernel": ("self_attn.o_proj.weight", "linear_heads"),
    "attention.out.bias": ("self_attn.o_proj.bias", "same"),
    "attention.query_norm.scale": ("self_attn.q_norm.weight", "flat"),
    "attention.key_norm.scale": ("self_attn.k_norm.weight", "flat"),
    "mlp.gate": ("mlp.gate_proj.weight", "linear"),
    "mlp.up": ("mlp.up_proj.weight", "linear"),
    "mlp.down": ("mlp.down_proj.weight", "linear"),
}
_DECODER: TensorTable = {
    "embed.embedding": ("model.embed_tokens.weight", "same"),
    "final_norm.scale": ("model.norm.weight", "same"),
    "final_norm.bias": ("model.norm.bias", "same"),
    "lm_head.kernel": ("lm_head.weight", "linear"),
    "lm_head.bias": ("lm_head.bias", "same"),
    **{
        f"layers.{{layer}}.{leaf}": (f"model.layers.{{layer}}.{name}", transform)
        for leaf, (name, transform) in _IN_LAYER.items()
    },
}


def _per_expert(block: str, gate: str, up: str, down: str) -> TensorTable:
    """Tensors of the decoder with one tensor per expert and projection, novices included.

    The constant that an expert adds to its output is the bias of its down projection.
    """
    moe = f"model.layers.{{layer}}.{block}"
    ours = "layers.{layer}.moe"
    return {
        **_DECODER,
        f"{ours}.router.kernel": (f"{moe}.gate.weight", "linear"),
        f"{ours}.experts.gate": (f"{moe}.experts.{{expert}}.{gate}.weight", "linear"),
        f"{ours}.experts.up": (f"{moe}.experts.{{expert}}.{up}.weight", "linear"),
        f"{ours}.experts.down": (f"{moe}.experts.{{expert}}.{down}.weight", "linear"),
        f"{ours}.expert_bias": (f"{moe}.experts.{{expert}}.{down}.bias", "same"),
        f"{ours}.novices.constant": (f"{moe}.experts.{{novice}}.approx_value", "same"),
    }


def _fused(router: str) -> TensorTable:
    """Tensors as transformers 5 holds them in memory: all experts of a layer in two."""
    moe, ours = "model.layers.{layer}.mlp", "layers.{layer}.moe"
    return {
        **_DECODER,
        f"{ours}.router.kernel": (f"{moe}.{router}.weight", "linear"),
        f"{ours}.experts.gate": (f"{moe}.experts.gate_up_proj", "stacked_first"),
        f"{ours}.experts.up": (f"{moe}.experts.gate_up_proj", "stacked_second"),
        f"{ours}.experts.down": (f"{moe}.experts.down_proj", "stacked"),
    }


_GATED = _per_expert("mlp", "gate_proj", "up_proj", "down_proj")

PHIMOE = Family(
    model_type="phimoe",
    architecture="PhimoeForCausalLM",
    default_theta=1e6,
    longrope=True,
    router="sparsemixer",
    router_slots=2,
    fixed={"norm": "layer"},
    keys={
        "vocab_size": Key(("vocab_size",), int, 32064),
        "width": Key(("hidden_size",), int, 4096),
        "num_layers": Key(("num_hidden_layers",), int, 32),
        "num_heads": Key(("num_attention_heads",), int, 32),
        "num_kv_heads": Key(("num_key_value_heads",), int, 8, null=_heads),
        "head_dim": _HEAD_DIM,
        "num_experts": Key(("num_local_experts",), int, 16),
        "experts_per_token": Key(("num_experts_per_tok",), int, 2),
        "expert_width": Key(("intermediate_size",), int, 6400),
        "max_positions": Key(("max_position_embeddings",), int, 131072),
        "norm_eps": Key(("rms_norm_eps",), float, 1e-5),
        "init_std": Key(("initializer_range",), float, 0.02),
        "tied_embeddings": Key(("tie_word_embeddings",), bool, False),
        "qkv_bias": Key(("attention_bias",), bool, False),
        "out_bias": Key(("attention_bias",), bool, False),
        "lm_head_bias": Key(("lm_head_bias",), bool, False),
        "sliding_window": Key(("sliding_window",), int, None),
        "jitter": Key(("router_jitter_noise",), float, 0.01),
        "input_jitter": Key(("input_jitter_noise",), float, 0.0),
    },
    layouts={
        "per_expert": _per_expert("block_sparse_moe", "w1", "w3", "w2"),
        "fused": _fused("router"),
    },
)

OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    default_theta=10000.0,
    fixed={"norm": "rms", "qk_norm": "full", "lm_head_bias": False},
    keys={
        "vocab_size": Key(("vocab_size",), int, 50304),
        "width": Key(("hidden_size",), int, 2048),
        "num_layers": Key(("num_hidden_layers",), int, 16),
        "num_heads": Key(("num_attention_heads",), int, 16),
        "num_kv_heads": Key(("num_key_value_heads",), int, _heads, null=_heads),
        "head_dim": _HEAD_DIM,
        "num_experts": Key(("num_experts", "num_local_experts"), int, 64),
        "experts_per_token": Key(("num_experts_per_tok",), int, 8),
        "expert_width": Key(("intermediate_size",), int, 2048),
        "max_positions": Key(("max_position_embeddings",), int, 4096),
        "norm_eps": Key(("rms_norm_eps",), float, 1e-5),
        "init_std": Key(("initializer_range",), float, 0.02),
        "tied_embeddings": Key(("tie_word_embeddings",), bool, False),
        "qkv_bias": Key(("attention_bias",), bool, False),
        "out_bias": Key(("attention_bias",), bool, False),
        "clip_qkv": Key(("clip_qkv",), float, None),
        "renormalize": Key(("norm_topk_prob",), bool, False),
    },
    layouts={"per_expert": _GATED, "fused": _fused("gate")},
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    default_theta=10000.0,
    fixed={"norm": "rms", "qk_norm": "head", "lm_head_bias": False},
    sliding_window_switch="use_sliding_window",
    dense_layers=("mlp_only_layers", "decoder_sparse_step"),
    keys={
        "vocab_size": Key(("vocab_size",), int, 151936),
        "width": Key(("hidden_size",), int, 2048),
        "num_layers": Key(("num_hidden_layers",), int, 24),
        "num_heads": Key(("num_attention_heads",), int, 32),
        "num_kv_heads": Key(("num_key_value_heads",), int, 4, null=_heads),
        "head_dim": _HEAD_DIM,
        # transformers 5 writes the second name only; older readers know the first only.
        "num_experts": Key(("num_experts", "num_local_experts"), int, 128, write_all=True),
        "experts_per_token": Key(("num_experts_per_tok",), int, 8),
        "expert_width": Key(("moe_intermediate_size",), int, 768),
        "dense_width": Key(("intermediate_size",), int, 6144),
        "max_positions": Key(("max_position_embeddings",), int, 32768),
        "norm_eps": Key(("rms_norm_eps",), float, 1e-6),
        "init_std": Key(("initializer_range",), float, 0.02),
        "tied_embeddings": Key(("tie_word_embeddings",), bool, False),
        "qkv_bias": Key(("attention_bias",), bool, False),
        "out_bias": Key(("attention_bias",), bool, False),
        "sliding_window": Key(("sliding_window",), int, 4096),
        "renormalize": Key(("norm_topk_prob",), bool, False),
    },
    layouts={"per_expert": _GATED, "fused": _fused("gate")},
)

FAMILIES: dict[str, Family] = {row.model_type: row for row in (PHIMOE, OLMOE, QWEN3_MOE)}

# Suffix of the model_type under which MoNE's authors publish models with novices.
COMPRESSED_SUFFIX = "_compressed"


def find_family(model_type: Any) -> Family:
    """The row of ``model_type`` (with or without the suffix ``_compressed``).

    Raises:
        ValueError: no such row; the message lists those that exist.
    """
    base = str(model_type).removesuffix(COMPRESSED_SUFFIX)
    if base not in FAMILIES:
        raise ValueError(f"model_type must be one of {sorted(FAMILIES)}, got {model_type!r}")
    return FAMILIES[base]
