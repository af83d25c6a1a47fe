"""Qwen1.5-MoE and Qwen2-57B-A14B: a gated shared expert, q/k/v biases, windows by type of layer."""

from moe_jax.hf.family import RENORMALIZE, Family, Key, decoder_keys, expert_keys, sliding_window
from moe_jax.hf.layer_patterns import LISTED_DENSE, window_by_type
from moe_jax.hf.layouts import fused, per_expert, shared_expert

_DECODER = decoder_keys(
    vocab_size=151936, width=2048, num_layers=24, heads=(16, 16), positions=32768, norm_eps=1e-6
)
_SHARED = shared_expert("mlp.shared_expert", "mlp.shared_expert_gate")

FAMILY = Family(
    model_type="qwen2_moe",
    stem="Qwen2Moe",
    keys={
        **_DECODER,
        **expert_keys(60, 4, 1408, "moe_intermediate_size", "num_experts"),
        "shared_width": Key(("shared_expert_intermediate_size",), int, 5632),
        "dense_width": Key(("intermediate_size",), int, 5632),
        "qkv_bias": Key(("qkv_bias",), bool, True),
        **sliding_window(4096),
        **RENORMALIZE,
    },
    fixed={"norm": "rms", "lm_head_bias": False, "shared_gated": True},
    dense_layers=LISTED_DENSE,
    windows=window_by_type("use_sliding_window", 28),
    layouts={"per_expert": per_expert() | _SHARED, "fused": fused() | _SHARED},
)
