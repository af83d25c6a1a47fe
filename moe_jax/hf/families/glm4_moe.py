"""GLM-4.5, 4.6 and 4.7: grouped queries turned by half, corrected sigmoids, shared experts."""

from moe_jax.config import DefaultRope, SigmoidRouter, YarnRope
from moe_jax.hf.family import (
    AS_LAYERS,
    Family,
    Key,
    counted_shared_experts,
    decoder_keys,
    expert_keys,
    sigmoid_router,
)
from moe_jax.hf.layer_patterns import first_dense
from moe_jax.hf.layouts import correction, fused, per_expert, shared_expert

_DECODER = decoder_keys(
    vocab_size=151552, width=4096, num_layers=46, heads=(96, 8), positions=131072, norm_eps=1e-5
)
_BESIDE = shared_expert("mlp.shared_experts") | correction("mlp.gate.e_score_correction_bias")

FAMILY = Family(
    model_type="glm4_moe",
    stem="Glm4Moe",
    keys={
        **_DECODER,
        **expert_keys(128, 8, 1408, "moe_intermediate_size", "n_routed_experts"),
        **counted_shared_experts(1),
        **sigmoid_router(1.0),
        "dense_width": Key(("intermediate_size",), int, 10944),
        "qkv_bias": Key(("attention_bias",), bool, False),
        "qk_norm": Key(("use_qk_norm",), bool, False, values={False: None, True: "head"}),
    },
    fixed={
        "norm": "rms",
        "lm_head_bias": False,
        "out_bias": False,
        "shared_gated": False,
        "correction": True,
    },
    router=SigmoidRouter,
    ropes=(DefaultRope.kind, YarnRope.kind),
    rotary_share=0.5,
    dense_layers=first_dense(1),
    layouts={"per_expert": per_expert() | _BESIDE, "fused": fused() | _BESIDE},
    further_layers=AS_LAYERS,
)
