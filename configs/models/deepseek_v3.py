"""DeepSeek-V3: 192 of 256 experts, 24 in each of the router's eight groups.

Its FP8 weights with scales of blocks are read as bfloat16; of what stays, their bytes are written.
The layer for multi-token prediction is left out of a cut model, and config.json says so.

    python -m moe_jax.compress --config=configs/models/deepseek_v3.py --config.dry_run=True
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "deepseek-ai/DeepSeek-V3"
    config.output = "outputs/deepseek_v3"
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
