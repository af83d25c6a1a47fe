"""gpt-oss: biases everywhere, clamped activations, attention sinks, every other layer slides."""

from moe_jax.hf.family import ATTENTION_BIAS, Family, Key, decoder_keys, expert_keys, sliding_window
from moe_jax.hf.layer_patterns import window_by_type
from moe_jax.hf.layouts import fused_with_biases, per_expert
from moe_jax.kinds import DefaultRope, YarnRope

_DECODER = decoder_keys(
    vocab_size=201088, width=2880, num_layers=36, heads=(64, 8), positions=131072, norm_eps=1e-5
)

FAMILY = Family(
    model_type="gpt_oss",
    stem="GptOss",
    keys={
        **_DECODER,
        **expert_keys(128, 4, 2880, "intermediate_size", "num_local_experts", "num_experts"),
        "experts_per_token": Key(("num_experts_per_tok", "experts_per_token"), int, 4),
        "head_dim": Key(("head_dim",), int, 64),
        **{fact: Key(key.names, bool, True) for fact, key in ATTENTION_BIAS.items()},
        **sliding_window(128),
        "limit": Key(("swiglu_limit",), float, 7.0),
        "alpha": Key(("swiglu_alpha",), float, 1.702),
    },
    # The K largest logits first, then their softmax: the same weights.
    fixed={
        "norm": "rms",
        "lm_head_bias": False,
        "renormalize": True,
        "logit_bias": True,
        "sinks": True,
        "neuron_bias": True,
        "expert_bias": True,
    },
    ropes=(DefaultRope.kind, YarnRope.kind),
    default_theta=150000.0,
    default_scaling={
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    windows=window_by_type(),
    layouts={"fused": fused_with_biases(), "per_expert": per_expert(router="router")},
)
