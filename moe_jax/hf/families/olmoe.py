"""OLMoE: q and k norms over all heads together, values clipped, weights not renormalised."""

from moe_jax.hf.family import (
    ATTENTION_BIAS,
    Family,
    Key,
    decoder_keys,
    expert_keys,
    renormalize,
)
from moe_jax.hf.layouts import fused, per_expert

FAMILY = Family(
    model_type="olmoe",
    stem="Olmoe",
    keys={
        **decoder_keys(
            vocab_size=50304,
            width=2048,
            num_layers=16,
            num_heads=16,
            max_positions=4096,
            norm_eps=1e-5,
        ),
        **expert_keys(
            64,
            8,
            2048,
            count_names=("num_experts", "num_local_experts"),
            width_name="intermediate_size",
        ),
        **ATTENTION_BIAS,
        **renormalize(),
        "clip_qkv": Key(("clip_qkv",), float, None, optional=True),
    },
    fixed={"norm": "rms", "qk_norm": "full", "lm_head_bias": False},
    layouts={"per_expert": per_expert(), "fused": fused()},
)
