"""GLM-4.5, 4.6 and 4.7: DeepSeek-V3's experts behind grouped queries, turned in part."""

import dataclasses

from moe_jax.hf.families.deepseek_v3 import FAMILY as DEEPSEEK_V3
from moe_jax.hf.family import Key, counted_shared_experts, decoder_keys, expert_keys, sigmoid_router
from moe_jax.hf.layer_patterns import first_dense
from moe_jax.kinds import GroupedQueryAttention

_DECODER = decoder_keys(
    vocab_size=151552, width=4096, num_layers=46, heads=(96, 8), positions=131072, norm_eps=1e-5
)

FAMILY = dataclasses.replace(
    DEEPSEEK_V3,
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
    fixed={**DEEPSEEK_V3.fixed, "out_bias": False},
    attention=GroupedQueryAttention,
    rotary_share=0.5,
    dense_layers=first_dense(1),
    aliases=(),
)
