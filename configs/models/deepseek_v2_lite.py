"""DeepSeek-V2-Lite: latent attention, the first layer dense, shared experts that the file counts.

704 of 1,408 neurons: the shared experts, together 2,816 wide, are then told as four, and stock
classes load the result. A width that does not divide 2,816 would need the shipped modelling file.

    python -m moe_jax.compress --config=configs/models/deepseek_v2_lite.py --config.dry_run=True
"""

from ml_collections import ConfigDict

from configs.models import base


def get_config() -> ConfigDict:
    return base.one_cut(
        "deepseek-ai/DeepSeek-V2-Lite",
        "outputs/deepseek_v2_lite",
        method="token_fisher",
        expert_width=704,
    )
