"""Conversion between Hugging Face and orbax folders; the source decides the direction.

python -m moe_jax.convert --config=configs/convert.py --config.source=MODEL --config.output=DIR
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"source": "", "output": ""})
