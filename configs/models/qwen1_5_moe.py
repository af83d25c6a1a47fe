"""Qwen1.5-MoE-A2.7B: three quarters of every expert's neurons, by their cost in the loss.

The shared expert, gated, stays as wide as it is; the refit solves for its down-projection too.

    python -m moe_jax.compress --config=configs/models/qwen1_5_moe.py --config.dry_run=True
"""

from ml_collections import ConfigDict

from configs.models import base


def get_config() -> ConfigDict:
    return base.one_cut(
        "Qwen/Qwen1.5-MoE-A2.7B",
        "outputs/qwen1_5_moe",
        method="token_fisher",
        width_ratio=0.75,
        refit=True,
        round_to=32,
    )
