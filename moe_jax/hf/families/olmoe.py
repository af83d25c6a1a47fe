"""OLMoE: q and k norms over all heads together, values clipped, weights not renormalised."""

from moe_jax.hf.family import ATTENTION_BIAS, RENORMALIZE, Family, Key, decoder_keys, expert_keys
from moe_jax.hf.layouts import fused, per_expert

_DECODER = decoder_keys(
    vocab_size=50304, width=2048, num_layers=16, heads=16, positions=4096, norm_eps=1e-5
)

FAMILY = Family(
    model_type="olmoe",
    stem="Olmoe",
    keys={
        **_DECODER,
        **expert_keys(64, 8, 2048, "intermediate_size", "num_experts", "num_local_experts"),
        **ATTENTION_BIAS,
        **RENORMALIZE,
        "clip_qkv": Key(("clip_qkv",), float, None, optional=True),
    },
    fixed={"norm": "rms", "qk_norm": "full", "lm_head_bias": False},
    norms_of_model_width=True,
    layouts={"per_expert": per_expert(), "fused": fused()},
)
