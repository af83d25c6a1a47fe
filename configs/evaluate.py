"""Held-out loss of one or more checkpoints on the text that ships with the package, and tasks.

python -m moe_jax.evaluate --config=configs/evaluate.py --config.models=A,B --config.reference=A
python -m moe_jax.evaluate --config=configs/evaluate.py --config.models=A --config.tasks=piqa
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "files": ("moe_jax/assets/text/evaluation/*.jsonl.xz",),
            "dtype": "float32",
            "cache_dir": "~/.cache/moe_jax/evaluations",
        }
    )
