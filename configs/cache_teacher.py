"""The predictions of a model that ships with the package on the training text that ships with it.

python -m moe_jax.cache_teacher --config=configs/cache_teacher.py --config.model=DIR
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": "moe_jax/assets/olmoe",
            "output": "outputs/teacher_cache/olmoe",
            "dtype": "float32",
            "seed": 0,
            "top_k": 8,
            "steps": 100,
            "start": 0,
            "log_prob_dtype": "bfloat16",
            "rows_per_file": 0,
            "training": {
                "files": ("moe_jax/assets/text/training/*.jsonl.xz",),
                "seq_len": 512,
                "batch_size": 8,
                "cache_dir": "",
            },
        }
    )
