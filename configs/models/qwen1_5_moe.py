"""Qwen1.5-MoE-A2.7B: three quarters of every expert's neurons, by their cost in the loss.

The shared expert, gated, stays as wide as it is; the refit solves for its down-projection too.

    python -m moe_jax.compress --config=configs/models/qwen1_5_moe.py --config.dry_run=True
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "Qwen/Qwen1.5-MoE-A2.7B"
    config.output = "outputs/qwen1_5_moe"
    config.dtype = "bfloat16"
    config.calibration = ConfigDict(
        {
            "files": ("hf:allenai/c4:en:train",),
            "num_sequences": 128,
            "seq_len": 2048,
            "batch_size": 4,
        }
    )
    config.stages = (
        {"method": "token_fisher", "width_ratio": 0.75, "refit": True, "round_to": 32},
    )
    return config
