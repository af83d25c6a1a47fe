"""GLM-4.5-Air: 96 of 128 experts; half of each head is turned by its position.

python -m moe_jax.compress --config=configs/models/glm_4_5_air.py --config.dry_run=True
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "zai-org/GLM-4.5-Air"
    config.output = "outputs/glm_4_5_air"
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
