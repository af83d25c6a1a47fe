"""gpt-oss-20b: two thirds of every expert's neurons, the rest and the constants repaired.

Its MXFP4 weights are read as bfloat16. The result, whose numbers are others, would be larger in 16
bits than the model is: it is packed in MXFP4 again.
Experts have a constant each in the stock format, which takes over what it can of what goes.

    python -m moe_jax.compress --config=configs/models/gpt_oss_20b.py --config.dry_run=True
"""

from ml_collections import ConfigDict

from configs.models import base


def get_config() -> ConfigDict:
    config = base.one_cut(
        "openai/gpt-oss-20b",
        "outputs/gpt_oss_20b",
        method="obs",
        sequential=True,
        repair=True,
        constants=True,
        width_ratio=2 / 3,
        round_to=128,
    )
    config.export = ConfigDict({"packing": "source"})
    return config
