"""Mixtral-8x7B: two of its eight wide experts a layer become constants (MoNE).

Few, wide experts: second moments of 14,336 neurons take 0.8 GB an expert, which is why this is a
cut that needs none.

    python -m moe_jax.compress --config=configs/models/mixtral_8x7b.py --config.dry_run=True
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "mistralai/Mixtral-8x7B-v0.1"
    config.output = "outputs/mixtral_8x7b"
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
