"""Qwen2-57B-A14B: 48 of 64 experts (REAP); the result loads in stock classes.

python -m moe_jax.compress --config=configs/models/qwen2_57b_a14b.py --config.dry_run=True
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "Qwen/Qwen2-57B-A14B"
    config.output = "outputs/qwen2_57b_a14b"
    config.dtype = "bfloat16"
    config.calibration = ConfigDict(
        {
            "files": ("hf:allenai/c4:en:train",),
            "num_sequences": 128,
            "seq_len": 2048,
            "batch_size": 4,
        }
    )
    config.stages = ({"method": "reap", "replacement": "delete", "keep_ratio": 0.75},)
    return config
