"""A small Phi-MoE trained from scratch: 16 experts, 2 per token, SparseMixer routing.

python tools/train_teacher.py --config=configs/teacher_phimoe.py --config.output=outputs/phimoe
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
    config.output = "outputs/teacher_phimoe"
    config.text = "outputs/text"
    config.cache = ""
    config.tokenizer = "moe_jax/assets/phimoe/tokenizer.json"
    config.sources = sources()
    config.seed = 0
    config.seq_len = 256
    config.batch_size = 8
    config.model = ConfigDict(
        {
            "architectures": ["PhimoeForCausalLM"],
            "model_type": "phimoe",
            "vocab_size": 8192,
            "hidden_size": 256,
            "intermediate_size": 144,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "attention_bias": True,
            "lm_head_bias": True,
            "sliding_window": 2047,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 1,
            # Wider than Phi-3.5-MoE's 0.01: only experts within the band compete and learn from
            # each other, and a small model has few tokens to learn its routing from.
            "router_jitter_noise": 0.1,
            "input_jitter_noise": 0.01,
            "router_aux_loss_coef": 0.01,
        }
    )
    config.train = ConfigDict(
        {
            "steps": 2000,
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
