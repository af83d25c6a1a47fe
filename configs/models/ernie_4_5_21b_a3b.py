"""ERNIE-4.5-21B-A3B: 48 of 64 experts; a softmax with a correction, two shared experts.

python -m moe_jax.compress --config=configs/models/ernie_4_5_21b_a3b.py --config.dry_run=True
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "baidu/ERNIE-4.5-21B-A3B-PT"
    config.output = "outputs/ernie_4_5_21b_a3b"
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
