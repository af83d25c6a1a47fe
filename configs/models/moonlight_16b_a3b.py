"""Moonlight-16B-A3B: DeepSeek-V3's parts with one group of 64 experts.

python -m moe_jax.compress --config=configs/models/moonlight_16b_a3b.py --config.dry_run=True
"""

from ml_collections import ConfigDict

from configs.models import base


def get_config() -> ConfigDict:
    return base.one_cut(
        "moonshotai/Moonlight-16B-A3B",
        "outputs/moonlight_16b_a3b",
        method="rerouted",
        replacement="delete",
        keep_ratio=0.75,
    )
