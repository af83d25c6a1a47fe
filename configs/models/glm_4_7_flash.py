"""GLM-4.7-Flash: latent attention with a query rank, corrected sigmoids, one dense layer.

python -m moe_jax.compress --config=configs/models/glm_4_7_flash.py --config.dry_run=True
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "zai-org/GLM-4.7-Flash"
    config.output = "outputs/glm_4_7_flash"
    config.dtype = "bfloat16"
    config.calibration = ConfigDict(
        {
            "files": ("hf:allenai/c4:en:train",),
            "num_sequences": 128,
            "seq_len": 2048,
            "batch_size": 4,
        }
    )
    config.stages = ({"method": "mone", "keep_ratio": 0.75},)
    return config
