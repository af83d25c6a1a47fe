"""Statistics of a model on the text that ships with the package.

python -m moe_jax.calibrate --config=configs/calibrate.py --config.model=DIR
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": "moe_jax/assets/olmoe",
            "output": "outputs/statistics/olmoe",
            "dtype": "float32",
            "seed": 0,
            "importance": (),
            "method": "",
            "keep_ratio": placeholder(float),
            "calibration": {
                "files": ("moe_jax/assets/text/calibration/*.jsonl.xz",),
                "num_sequences": 128,
                "seq_len": 512,
                "batch_size": 8,
                "pack": False,
            },
        }
    )
