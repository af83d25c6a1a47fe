"""gpt-oss-120b: 96 of 128 experts, in the class and the layout of the source.

Its MXFP4 weights are read as bfloat16; of the experts that stay, their bytes are written.

    python -m moe_jax.compress --config=configs/models/gpt_oss_120b.py --config.dry_run=True
"""

from ml_collections import ConfigDict

from configs.models import base


def get_config() -> ConfigDict:
    return base.one_cut(
        "openai/gpt-oss-120b",
        "outputs/gpt_oss_120b",
        method="reap",
        replacement="delete",
        keep_ratio=0.75,
    )
