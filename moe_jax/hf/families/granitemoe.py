"""Granite 3 MoE: multipliers of embeddings, attention, residual stream and logits."""

from moe_jax.hf.family import ATTENTION_BIAS, Family, Key, decoder_keys, expert_keys
from moe_jax.hf.layouts import fused, per_expert
from moe_jax.kinds import DefaultRope, YarnRope

_BLOCK = "block_sparse_moe"
KEYS = {
    **decoder_keys(
        vocab_size=32000, width=4096, num_layers=32, heads=32, positions=2048, norm_eps=1e-6
    ),
    **expert_keys(8, 2, 11008, "intermediate_size", "num_local_experts"),
    **ATTENTION_BIAS,
    "embedding_scale": Key(("embedding_multiplier",), float, 1.0),
    "residual_scale": Key(("residual_multiplier",), float, 1.0),
    "logit_scale": Key(("attention_multiplier",), float, 1.0),
    "logit_divisor": Key(("logits_scaling",), float, 1.0),
}
# The K largest logits first, then their softmax: the same weights.
FIXED = {"norm": "rms", "lm_head_bias": False, "renormalize": True}
SWITCHES = {"position_embedding_type": ("rope", None)}
ROPES = (DefaultRope.kind, YarnRope.kind)
LAYOUTS = {
    "stacked": fused("router.layer", _BLOCK, "input_linear.weight", "output_linear.weight"),
    "fused": fused("router", _BLOCK),
    "per_expert": per_expert(_BLOCK, router="router"),
}

FAMILY = Family(
    model_type="granitemoe",
    stem="GraniteMoe",
    keys=KEYS,
    fixed=FIXED,
    switches=SWITCHES,
    ropes=ROPES,
    layouts=LAYOUTS,
)
