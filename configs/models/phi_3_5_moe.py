"""Phi-3.5-MoE: experts of 6,400 neurons to 960, the width of Phi-mini-MoE, in one shot.

SparseMixer always picks two experts. For the stages with distillation see ``slimmoe_phi_mini.py``.

    python -m moe_jax.compress --config=configs/models/phi_3_5_moe.py --config.dry_run=True
"""

from ml_collections import ConfigDict

from configs.models import base


def get_config() -> ConfigDict:
    return base.one_cut(
        "microsoft/Phi-3.5-MoE-instruct",
        "outputs/phi_3_5_moe",
        method="token_fisher",
        expert_width=960,
    )
