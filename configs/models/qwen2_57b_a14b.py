"""Qwen2-57B-A14B: 48 of 64 experts (REAP); the result loads in stock classes.

python -m moe_jax.compress --config=configs/models/qwen2_57b_a14b.py --config.dry_run=True
"""

from ml_collections import ConfigDict

from configs.models import base


def get_config() -> ConfigDict:
    return base.one_cut(
        "Qwen/Qwen2-57B-A14B",
        "outputs/qwen2_57b_a14b",
        method="reap",
        replacement="delete",
        keep_ratio=0.75,
    )
