"""Mixtral: the K largest weights always divided by their sum, which no key says."""

from moe_jax.hf.family import Family, Key, decoder_keys, expert_keys, sliding_window
from moe_jax.hf.layer_patterns import one_window
from moe_jax.hf.layouts import fused, per_expert

_DECODER = decoder_keys(
    vocab_size=32000, width=4096, num_layers=32, heads=(32, 8), positions=131072, norm_eps=1e-5
)

FAMILY = Family(
    model_type="mixtral",
    stem="Mixtral",
    keys={
        **_DECODER,
        **expert_keys(8, 2, 14336, "intermediate_size", "num_local_experts", "num_experts"),
        **sliding_window(None),
        "input_jitter": Key(("router_jitter_noise",), float, 0.0),
    },
    fixed={"norm": "rms", "lm_head_bias": False, "renormalize": True},
    default_theta=1e6,
    windows=one_window(),
    layouts={
        "per_expert": per_expert("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
        "fused": fused(),
    },
)
