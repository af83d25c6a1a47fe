"""Qwen3-MoE: q and k norms of each head, dense layers by list and period."""

import dataclasses

from moe_jax.hf.family import (
    ATTENTION_BIAS,
    Family,
    Key,
    decoder_keys,
    expert_keys,
    renormalize,
    sliding_window,
)
from moe_jax.hf.layer_patterns import LISTED_DENSE, one_window
from moe_jax.hf.layouts import fused, per_expert

_EXPERTS = expert_keys(
    128,
    8,
    768,
    count_names=("num_experts", "num_local_experts"),
    width_name="moe_intermediate_size",
)

FAMILY = Family(
    model_type="qwen3_moe",
    stem="Qwen3Moe",
    keys={
        **decoder_keys(
            vocab_size=151936,
            width=2048,
            num_layers=24,
            num_heads=32,
            num_kv_heads=4,
            max_positions=32768,
            norm_eps=1e-6,
        ),
        **_EXPERTS,
        # transformers 5 writes the second name only; older readers know the first only.
        "num_experts": dataclasses.replace(_EXPERTS["num_experts"], write_all=True),
        "dense_width": Key(("intermediate_size",), int, 6144),
        **ATTENTION_BIAS,
        **sliding_window(4096),
        **renormalize(),
    },
    fixed={"norm": "rms", "qk_norm": "head", "lm_head_bias": False},
    dense_layers=LISTED_DENSE,
    windows=one_window(switch="use_sliding_window"),
    layouts={"per_expert": per_expert(), "fused": fused()},
)
