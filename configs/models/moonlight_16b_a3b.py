"""Moonlight-16B-A3B: DeepSeek-V3's parts with one group of 64 experts.

python -m moe_jax.compress --config=configs/models/moonlight_16b_a3b.py --config.dry_run=True
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "moonshotai/Moonlight-16B-A3B"
    config.output = "outputs/moonlight_16b_a3b"
    config.dtype = "bfloat16"
    config.calibration = ConfigDict(
        {
            "files": ("hf:allenai/c4:en:train",),
            "num_sequences": 128,
            "seq_len": 2048,
            "batch_size": 4,
        }
    )
    config.stages = ({"method": "rerouted", "replacement": "delete", "keep_ratio": 0.75},)
    return config
