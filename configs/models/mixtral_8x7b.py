"""Mixtral-8x7B: two of its eight wide experts a layer become constants (MoNE).

Few, wide experts: second moments of 14,336 neurons take 0.8 GB an expert, which is why this is a
cut that needs none.

    python -m moe_jax.compress --config=configs/models/mixtral_8x7b.py --config.dry_run=True
"""

from ml_collections import ConfigDict

from configs.models import base


def get_config() -> ConfigDict:
    return base.one_cut(
        "mistralai/Mixtral-8x7B-v0.1", "outputs/mixtral_8x7b", method="mone", keep_ratio=0.75
    )
