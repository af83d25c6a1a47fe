"""A small OLMoE trained from scratch: 64 experts, 8 per token.

python tools/train_teacher.py --config=configs/teacher_olmoe.py --config.output=outputs/olmoe
"""

from ml_collections import ConfigDict


def sources() -> ConfigDict:
    """Share of training tokens of each domain."""
    return ConfigDict(
        {
            "books": 0.20,
            "web": 0.14,
            "encyclopedia": 0.14,
            "code_python": 0.14,
            "code_go_js": 0.12,
            "techdocs": 0.12,
            "math_word": 0.06,
            "math_symbolic": 0.08,
        }
    )


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.output = "outputs/teacher_olmoe"
    config.text = "outputs/text"
    config.cache = ""
    config.tokenizer = "moe_jax/assets/olmoe/tokenizer.json"
    config.sources = sources()
    config.seed = 0
    config.seq_len = 256
    config.batch_size = 8
    config.model = ConfigDict(
        {
            "architectures": ["OlmoeForCausalLM"],
            "model_type": "olmoe",
            "vocab_size": 8192,
            "hidden_size": 256,
            "intermediate_size": 40,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "clip_qkv": None,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 1,
            "router_aux_loss_coef": 0.01,
        }
    )
    config.train = ConfigDict(
        {
            "steps": 1800,
            "learning_rate": 2e-3,
            "warmup_steps": 200,
            "final_fraction": 0.05,
            "weight_decay": 0.1,
            "loss": "lm",
            "balance_weight": 0.01,
            "compute_dtype": "bfloat16",
            "checkpoint_every": 250,
            "log_every": 10,
            "seed": 0,
        }
    )
    return config
