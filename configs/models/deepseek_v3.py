"""DeepSeek-V3: 192 of 256 experts, 24 in each of the router's eight groups.

Its FP8 weights with scales of blocks are read as bfloat16; of what stays, their bytes are written.
The layer for multi-token prediction is left out of a cut model, and config.json says so.

    python -m moe_jax.compress --config=configs/models/deepseek_v3.py --config.dry_run=True
"""

from ml_collections import ConfigDict

from configs.models import base


def get_config() -> ConfigDict:
    return base.one_cut(
        "deepseek-ai/DeepSeek-V3",
        "outputs/deepseek_v3",
        method="reap",
        replacement="delete",
        keep_ratio=0.75,
    )
