"""GLM-4.7-Flash: DeepSeek-V3's parts, with dense layers by a list."""

import dataclasses

from moe_jax.hf.families.deepseek_v3 import FAMILY as DEEPSEEK_V3
from moe_jax.hf.family import Key, decoder_keys, expert_keys, sigmoid_router
from moe_jax.hf.layer_patterns import DENSE_BY_KIND

_DECODER = decoder_keys(
    vocab_size=154880, width=2048, num_layers=47, heads=(20, 20), positions=202752, norm_eps=1e-5
)

FAMILY = dataclasses.replace(
    DEEPSEEK_V3,
    model_type="glm4_moe_lite",
    stem="Glm4MoeLite",
    keys={
        **DEEPSEEK_V3.keys,
        **_DECODER,
        **expert_keys(64, 4, 1536, "moe_intermediate_size", "n_routed_experts"),
        **sigmoid_router(1.8),
        "content_dim": Key(("qk_nope_head_dim",), int, 192),
        "value_dim": Key(("v_head_dim",), int, 256),
        "query_rank": Key(("q_lora_rank",), int, 768, optional=True),
        "dense_width": Key(("intermediate_size",), int, 10240),
    },
    # The class has the first layer dense, or a list.
    switches={**DEEPSEEK_V3.switches, "first_k_dense_replace": (1, None)},
    dense_layers=DENSE_BY_KIND,
    aliases=(),
)
