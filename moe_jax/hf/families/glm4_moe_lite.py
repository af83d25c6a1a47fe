"""GLM-4.7-Flash: DeepSeek-V3's parts, with dense layers by a list."""

from moe_jax.config import DefaultRope, LatentAttention, SigmoidRouter, YarnRope
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
from moe_jax.hf.layer_patterns import DENSE_BY_KIND
from moe_jax.hf.layouts import correction, fused, per_expert, shared_expert

_DECODER = decoder_keys(
    vocab_size=154880, width=2048, num_layers=47, heads=(20, 20), positions=202752, norm_eps=1e-5
)
_BESIDE = shared_expert("mlp.shared_experts") | correction("mlp.gate.e_score_correction_bias")

FAMILY = Family(
    model_type="glm4_moe_lite",
    stem="Glm4MoeLite",
    keys={
        **_DECODER,
        **expert_keys(64, 4, 1536, "moe_intermediate_size", "n_routed_experts"),
        **counted_shared_experts(1),
        **sigmoid_router(1.8),
        **LATENT_ATTENTION,
        "content_dim": Key(("qk_nope_head_dim",), int, 192),
        "value_dim": Key(("v_head_dim",), int, 256),
        "query_rank": Key(("q_lora_rank",), int, 768, optional=True),
        "dense_width": Key(("intermediate_size",), int, 10240),
        "interleaved": Key(("rope_interleave",), bool, True),
    },
    fixed={"norm": "rms", "lm_head_bias": False, "shared_gated": False, "correction": True},
    switches={
        "scoring_func": ("sigmoid", None),
        "topk_method": ("noaux_tc", None),
        "first_k_dense_replace": (1, None),  # the class has the first layer dense, or a list
    },
    attention=LatentAttention,
    router=SigmoidRouter,
    ropes=(DefaultRope.kind, YarnRope.kind),
    dense_layers=DENSE_BY_KIND,
    layouts={"per_expert": per_expert() | _BESIDE, "fused": fused() | _BESIDE},
    further_layers=AS_LAYERS,
)
