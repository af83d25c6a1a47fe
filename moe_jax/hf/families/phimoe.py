"""Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE: SparseMixer, LayerNorm with biases, longrope."""

from moe_jax.hf.family import ATTENTION_BIAS, Family, Key, decoder_keys, expert_keys, sliding_window
from moe_jax.hf.layer_patterns import one_window
from moe_jax.hf.layouts import fused, per_expert
from moe_jax.kinds import DefaultRope, LongRope, SparseMixerRouter

_DECODER = decoder_keys(
    vocab_size=32064, width=4096, num_layers=32, heads=(32, 8), positions=131072, norm_eps=1e-5
)

FAMILY = Family(
    model_type="phimoe",
    stem="Phimoe",
    keys={
        **_DECODER,
        **expert_keys(16, 2, 6400, "intermediate_size", "num_local_experts"),
        **ATTENTION_BIAS,
        **sliding_window(None),
        "lm_head_bias": Key(("lm_head_bias",), bool, False),
        "jitter": Key(("router_jitter_noise",), float, 0.01),
        "input_jitter": Key(("input_jitter_noise",), float, 0.0),
    },
    fixed={"norm": "layer"},
    router=SparseMixerRouter,
    router_slots=2,
    ropes=(DefaultRope.kind, LongRope.kind),
    default_theta=1e6,
    windows=one_window(),
    layouts={
        "per_expert": per_expert("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
        "fused": fused("router"),
    },
)
