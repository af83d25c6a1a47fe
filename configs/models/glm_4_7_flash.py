"""GLM-4.7-Flash: latent attention with a query rank, corrected sigmoids, one dense layer.

python -m moe_jax.compress --config=configs/models/glm_4_7_flash.py --config.dry_run=True
"""

from ml_collections import ConfigDict

from configs.models import base


def get_config() -> ConfigDict:
    return base.one_cut(
        "zai-org/GLM-4.7-Flash", "outputs/glm_4_7_flash", method="mone", keep_ratio=0.75
    )
