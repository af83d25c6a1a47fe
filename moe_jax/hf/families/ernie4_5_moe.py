"""ERNIE 4.5: neighbours turned against each other, a corrected softmax, shared experts."""

from moe_jax.hf.family import Family, Key, counted_shared_experts, decoder_keys
from moe_jax.hf.layer_patterns import DENSE_BY_INTERVAL
from moe_jax.hf.layouts import ROW, correction, fused, per_expert, shared_expert
from moe_jax.kinds import DefaultRope, YarnRope

_DECODER = decoder_keys(
    vocab_size=103424, width=2560, num_layers=28, heads=(20, 4), positions=131072, norm_eps=1e-5
)
_SHARED = shared_expert("mlp.shared_experts")
_CORRECTION = "moe_statics.e_score_correction_bias"

FAMILY = Family(
    model_type="ernie4_5_moe",
    stem="Ernie4_5_Moe",
    keys={
        **_DECODER,
        "tied_embeddings": Key(("tie_word_embeddings",), bool, True),
        "num_experts": Key(("moe_num_experts",), int, 64),
        "experts_per_token": Key(("moe_k",), int, 6),
        "expert_width": Key(("moe_intermediate_size",), int, 1536),
        **counted_shared_experts(2, "moe_num_shared_experts"),
        "dense_width": Key(("intermediate_size",), int, 12288),
        "least_sum": Key(("moe_norm_min",), float, 1e-12),
    },
    fixed={
        "norm": "rms",
        "lm_head_bias": False,
        "interleaved": True,
        "renormalize": True,
        "correction": True,
        "shared_gated": False,
    },
    switches={"use_bias": (False, None)},
    ropes=(DefaultRope.kind, YarnRope.kind),
    default_theta=500000.0,
    dense_layers=DENSE_BY_INTERVAL,
    further_layers=("model.mtp_",),
    layouts={
        "per_expert": per_expert() | _SHARED | correction(f"mlp.{_CORRECTION}", ROW),
        "fused": fused() | _SHARED | correction(f"mlp.gate.{_CORRECTION}", ROW),
    },
)
