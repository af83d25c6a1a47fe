"""ERNIE-4.5-21B-A3B: 48 of 64 experts; a softmax with a correction, two shared experts.

python -m moe_jax.compress --config=configs/models/ernie_4_5_21b_a3b.py --config.dry_run=True
"""

from ml_collections import ConfigDict

from configs.models import base


def get_config() -> ConfigDict:
    return base.one_cut(
        "baidu/ERNIE-4.5-21B-A3B-PT",
        "outputs/ernie_4_5_21b_a3b",
        method="reap",
        replacement="delete",
        keep_ratio=0.75,
    )
