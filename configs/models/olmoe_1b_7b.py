"""OLMoE-1B-7B: half of every expert's neurons by OBS, with repair.

Its norms of queries and keys run over all heads, so that key/value groups cannot be removed.

    python -m moe_jax.compress --config=configs/models/olmoe_1b_7b.py --config.dry_run=True
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "allenai/OLMoE-1B-7B-0125"
    config.output = "outputs/olmoe_1b_7b"
    config.dtype = "bfloat16"
    config.calibration = ConfigDict(
        {
            "files": ("hf:allenai/c4:en:train",),
            "num_sequences": 128,
            "seq_len": 2048,
            "batch_size": 4,
        }
    )
    config.stages = ({"method": "obs", "width_ratio": 0.5, "repair": True},)
    return config
