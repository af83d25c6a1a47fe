"""OLMoE-1B-7B: half of every expert's neurons by OBS, with repair.

Its norms of queries and keys run over all heads, so that key/value groups cannot be removed.

    python -m moe_jax.compress --config=configs/models/olmoe_1b_7b.py --config.dry_run=True
"""

from ml_collections import ConfigDict

from configs.models import base


def get_config() -> ConfigDict:
    return base.one_cut(
        "allenai/OLMoE-1B-7B-0125",
        "outputs/olmoe_1b_7b",
        method="obs",
        width_ratio=0.5,
        repair=True,
    )
