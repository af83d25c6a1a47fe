"""MiniMax-M2: q and k norms over all heads, heads turned in part, corrected sigmoids."""

from moe_jax.hf.family import Family, Key, decoder_keys, expert_keys
from moe_jax.hf.layouts import correction, fused, per_expert
from moe_jax.kinds import DefaultRope, SigmoidRouter, YarnRope

_DECODER = decoder_keys(
    vocab_size=200064, width=3072, num_layers=62, heads=(48, 8), positions=196608, norm_eps=1e-6
)
_PROJECTIONS = {"gate": "w1", "up": "w3", "down": "w2"}
_CORRECTION = "e_score_correction_bias"

FAMILY = Family(
    model_type="minimax_m2",
    stem="MiniMaxM2",
    keys={
        **_DECODER,
        **expert_keys(256, 8, 1536, "intermediate_size", "num_local_experts", "num_experts"),
        "head_dim": Key(("head_dim",), int, 128),
        "input_jitter": Key(("router_jitter_noise",), float, 0.0),
    },
    fixed={
        "norm": "rms",
        "lm_head_bias": False,
        "qk_norm": "full",
        "renormalize": True,
        "correction": True,
    },
    switches={
        "use_qk_norm": (True, None),
        "qk_norm_type": ("per_layer", None),
        "scoring_func": ("sigmoid", None),
        "use_routing_bias": (True, None),
        "shared_intermediate_size": (0, None),
    },
    router=SigmoidRouter,
    ropes=(DefaultRope.kind, YarnRope.kind),
    default_theta=5e6,
    rotary_share=1.0,
    layouts={
        "per_expert": per_expert("block_sparse_moe", _PROJECTIONS)
        | correction(f"block_sparse_moe.{_CORRECTION}"),
        "fused": fused() | correction(f"mlp.{_CORRECTION}"),
    },
)
