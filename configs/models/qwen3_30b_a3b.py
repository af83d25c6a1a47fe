"""Qwen3-30B-A3B: 96 of 128 experts (REAP); both spellings of their number are written.

python -m moe_jax.compress --config=configs/models/qwen3_30b_a3b.py --config.dry_run=True
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "Qwen/Qwen3-30B-A3B"
    config.output = "outputs/qwen3_30b_a3b"
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
