"""Granite-3.1-3B-A800M: experts of a layer stacked in two tensors; multipliers everywhere.

python -m moe_jax.compress --config=configs/models/granite_3_1_3b_a800m.py --config.dry_run=True
"""

from ml_collections import ConfigDict

from configs.models import base


def get_config() -> ConfigDict:
    return base.one_cut(
        "ibm-granite/granite-3.1-3b-a800m-base",
        "outputs/granite_3_1_3b_a800m",
        method="token_fisher",
        width_ratio=0.75,
        refit=True,
        round_to=32,
    )
