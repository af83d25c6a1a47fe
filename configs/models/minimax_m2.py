"""MiniMax-M2: 192 of 256 experts, no shared one; norms over all heads, heads turned by half.

Its FP8 weights with scales of blocks are read as bfloat16; of what stays, their bytes are written.

    python -m moe_jax.compress --config=configs/models/minimax_m2.py --config.dry_run=True
"""

from ml_collections import ConfigDict

from configs.models import base


def get_config() -> ConfigDict:
    return base.one_cut(
        "MiniMaxAI/MiniMax-M2",
        "outputs/minimax_m2",
        method="reap",
        replacement="delete",
        keep_ratio=0.75,
    )
