"""Granite-3.1-3B-A800M: experts of a layer stacked in two tensors; multipliers everywhere.

python -m moe_jax.compress --config=configs/models/granite_3_1_3b_a800m.py --config.dry_run=True
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "ibm-granite/granite-3.1-3b-a800m-base"
    config.output = "outputs/granite_3_1_3b_a800m"
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
