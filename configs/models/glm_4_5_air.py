"""GLM-4.5-Air: 96 of 128 experts; half of each head is turned by its position.

python -m moe_jax.compress --config=configs/models/glm_4_5_air.py --config.dry_run=True
"""

from ml_collections import ConfigDict

from configs.models import base


def get_config() -> ConfigDict:
    return base.one_cut(
        "zai-org/GLM-4.5-Air",
        "outputs/glm_4_5_air",
        method="reap",
        replacement="delete",
        keep_ratio=0.75,
    )
