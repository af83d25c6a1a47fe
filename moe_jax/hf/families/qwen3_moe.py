"""Qwen3-MoE: q and k norms of each head, dense layers by list and period."""

from moe_jax.hf.family import (
    ATTENTION_BIAS,
    RENORMALIZE,
    Family,
    Key,
    decoder_keys,
    expert_keys,
    sliding_window,
)
from moe_jax.hf.layer_patterns import LISTED_DENSE, one_window
from moe_jax.hf.layouts import fused, per_expert

_DECODER = decoder_keys(
    vocab_size=151936, width=2048, num_layers=24, heads=(32, 4), positions=32768, norm_eps=1e-6
)
# transformers 5 writes the second name of their number only; older readers know the first only.
_EXPERTS = expert_keys(
    128, 8, 768, "moe_intermediate_size", "num_experts", "num_local_experts", write_all=True
)

FAMILY = Family(
    model_type="qwen3_moe",
    stem="Qwen3Moe",
    keys={
        **_DECODER,
        **_EXPERTS,
        "dense_width": Key(("intermediate_size",), int, 6144),
        **ATTENTION_BIAS,
        **sliding_window(4096),
        **RENORMALIZE,
    },
    fixed={"norm": "rms", "qk_norm": "head", "lm_head_bias": False},
    dense_layers=LISTED_DENSE,
    windows=one_window(switch="use_sliding_window"),
    layouts={"per_expert": per_expert(), "fused": fused()},
)
