"""``config.json`` of public models, as far as it says how large they are, and published sizes."""

from __future__ import annotations

from typing import Any, NamedTuple


class Public(NamedTuple):
    """A public model.

    Attributes:
        hf: what its file says beside the defaults of its class.
        total, active: parameters in billions, as we count them: all, and what a token reads,
            both embedding matrices whole.
        published: both, as its authors give them.
        left_out: matrices of the vocabulary by which their active count is smaller than ours,
            beside rounding.
    """

    hf: dict[str, Any]
    total: float
    active: float
    published: tuple[str, str]
    left_out: int = 0


def _sizes(layers: int, width: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }


_MXFP4 = {"quantization_config": {"quant_method": "mxfp4"}}

# Name of a file in configs/models -> the model.
PUBLIC = {
    "mixtral_8x7b": Public(
        {
            "model_type": "mixtral",
            **_sizes(32, 4096, 32, 8, 32000),
            "intermediate_size": 14336,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        46.70,
        12.88,
        ("46.7", "12.9"),
    ),
    "qwen1_5_moe": Public(
        {
            "model_type": "qwen2_moe",
            **_sizes(24, 2048, 16, 16, 151936),
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
        },
        14.32,
        2.69,
        ("14.3", "2.7"),
    ),
    "qwen2_57b_a14b": Public(
        {
            "model_type": "qwen2_moe",
            **_sizes(28, 3584, 28, 4, 151936),
            "moe_intermediate_size": 2560,
            "shared_expert_intermediate_size": 20480,
            "num_experts": 64,
            "num_experts_per_tok": 8,
        },
        57.41,
        14.25,
        ("57.4", "14"),
    ),
    "qwen3_30b_a3b": Public(
        {
            "model_type": "qwen3_moe",
            **_sizes(48, 2048, 32, 4, 151936),
            "head_dim": 128,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
        30.53,
        3.35,
        ("30.5", "3.3"),
    ),
    "olmoe_1b_7b": Public(
        {"model_type": "olmoe", "intermediate_size": 1024}, 6.92, 1.28, ("6.9", "1.3")
    ),
    "phi_3_5_moe": Public(
        {
            "model_type": "phimoe",
            **_sizes(32, 4096, 32, 8, 32064),
            "intermediate_size": 6400,
            "attention_bias": True,
            "lm_head_bias": True,
        },
        41.87,
        6.64,
        ("41.9", "6.6"),
    ),
    "deepseek_v2_lite": Public(
        {
            "model_type": "deepseek_v2",
            **_sizes(27, 2048, 16, 16, 102400),
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
        },
        15.71,
        2.66,
        ("15.7", "2.4"),
        1,
    ),
    "deepseek_v3": Public(
        {
            "model_type": "deepseek_v3",
            "num_nextn_predict_layers": 1,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
            "ep_size": 1,
            "max_position_embeddings": 163840,
            "quantization_config": {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
            },
            "rope_scaling": {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 40,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
            },
        },
        671.03,
        37.55,
        ("671", "37"),
        1,
    ),
    "moonlight_16b_a3b": Public(
        {
            "model_type": "deepseek_v3",
            **_sizes(27, 2048, 16, 16, 163840),
            "intermediate_size": 11264,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
        },
        15.96,
        2.91,
        ("16", "3"),
    ),
    "glm_4_5_air": Public(
        {"model_type": "glm4_moe", "head_dim": 128, "attention_bias": True},
        106.85,
        13.42,
        ("106", "12"),
        2,
    ),
    "glm_4_7_flash": Public({"model_type": "glm4_moe_lite"}, 29.94, 3.90, ("30", "3"), 2),
    "minimax_m2": Public(
        {"model_type": "minimax_m2", "rotary_dim": 64}, 228.69, 11.03, ("2.3e2", "10"), 2
    ),
    "gpt_oss_20b": Public(
        {
            "model_type": "gpt_oss",
            "num_hidden_layers": 24,
            "num_local_experts": 32,
            "experts_per_token": 4,
            **_MXFP4,
        },
        20.91,
        4.19,
        ("20.9", "3.6"),
        1,
    ),
    "gpt_oss_120b": Public({"model_type": "gpt_oss", **_MXFP4}, 116.83, 5.71, ("116.8", "5.1"), 1),
    "ernie_4_5_21b_a3b": Public({"model_type": "ernie4_5_moe"}, 21.83, 3.35, ("21", "3"), 1),
    "granite_3_1_3b_a800m": Public(
        {
            "model_type": "granitemoe",
            **_sizes(32, 1536, 24, 8, 49155),
            "intermediate_size": 512,
            "num_local_experts": 40,
            "num_experts_per_tok": 8,
            "tie_word_embeddings": True,
        },
        3.30,
        0.88,
        ("3.3", "0.8"),
        1,
    ),
}
