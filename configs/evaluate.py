"""Held-out loss of one or more checkpoints on the text that ships with the package.

python -m moe_jax.evaluate --config=configs/evaluate.py --config.models=A,B --config.reference=A
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "models": "",
            "reference": "",
            "files": "moe_jax/assets/text/evaluation/*.jsonl.xz",
            "tokenizer": "",
            "dtype": "float32",
            "seq_len": 512,
            "batch_size": 8,
            "max_bytes": 0,
            "output": "",
        }
    )
