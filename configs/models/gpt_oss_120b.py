"""gpt-oss-120b: 96 of 128 experts, in the class and the layout of the source.

Its MXFP4 weights are read as bfloat16; of the experts that stay, their bytes are written.

    python -m moe_jax.compress --config=configs/models/gpt_oss_120b.py --config.dry_run=True
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "openai/gpt-oss-120b"
    config.output = "outputs/gpt_oss_120b"
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
