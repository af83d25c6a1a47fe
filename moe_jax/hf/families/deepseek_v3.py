"""DeepSeek-V3, Moonlight, Kimi-K2: latent attention, corrected sigmoids in groups."""

from moe_jax.hf.family import (
    AS_LAYERS,
    LATENT_ATTENTION,
    Family,
    Key,
    counted_shared_experts,
    decoder_keys,
    expert_keys,
    sigmoid_router,
)
from moe_jax.hf.layer_patterns import first_dense
from moe_jax.hf.layouts import correction, fused, per_expert, shared_expert
from moe_jax.kinds import DefaultRope, LatentAttention, SigmoidRouter, YarnRope

_DECODER = decoder_keys(
    vocab_size=129280, width=7168, num_layers=61, heads=(128, 128), positions=4096, norm_eps=1e-6
)
_BESIDE = shared_expert("mlp.shared_experts") | correction("mlp.gate.e_score_correction_bias")

FAMILY = Family(
    model_type="deepseek_v3",
    stem="DeepseekV3",
    keys={
        **_DECODER,
        **expert_keys(256, 8, 2048, "moe_intermediate_size", "n_routed_experts"),
        **counted_shared_experts(1),
        **sigmoid_router(2.5, groups=8, chosen_groups=4),
        **LATENT_ATTENTION,
        "dense_width": Key(("intermediate_size",), int, 18432),
        "interleaved": Key(("rope_interleave",), bool, True),
    },
    fixed={"norm": "rms", "lm_head_bias": False, "shared_gated": False, "correction": True},
    switches={
        "scoring_func": ("sigmoid", None),
        "topk_method": ("noaux_tc", None),
        "moe_layer_freq": (1, None),
    },
    attention=LatentAttention,
    router=SigmoidRouter,
    ropes=(DefaultRope.kind, YarnRope.kind),
    dense_layers=first_dense(3),
    layouts={"per_expert": per_expert() | _BESIDE, "fused": fused() | _BESIDE},
    aliases=("kimi_k2",),
    further_layers=AS_LAYERS,
)
