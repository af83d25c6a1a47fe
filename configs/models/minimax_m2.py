"""MiniMax-M2: 192 of 256 experts, no shared one; norms over all heads, heads turned by half.

Its FP8 weights with scales of blocks are read as bfloat16; of what stays, their bytes are written.

    python -m moe_jax.compress --config=configs/models/minimax_m2.py --config.dry_run=True
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "MiniMaxAI/MiniMax-M2"
    config.output = "outputs/minimax_m2"
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
