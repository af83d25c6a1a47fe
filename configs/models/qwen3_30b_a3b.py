"""Qwen3-30B-A3B: 96 of 128 experts (REAP); both spellings of their number are written.

python -m moe_jax.compress --config=configs/models/qwen3_30b_a3b.py --config.dry_run=True
"""

from ml_collections import ConfigDict

from configs.models import base


def get_config() -> ConfigDict:
    return base.one_cut(
        "Qwen/Qwen3-30B-A3B",
        "outputs/qwen3_30b_a3b",
        method="reap",
        replacement="delete",
        keep_ratio=0.75,
    )
