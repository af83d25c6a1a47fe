"""Held-out loss of one or more checkpoints on the text that ships with the package, and tasks.

python -m moe_jax.evaluate --config=configs/evaluate.py --config.models=A,B --config.reference=A
python -m moe_jax.evaluate --config=configs/evaluate.py --config.models=A --config.tasks=piqa
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
            "tasks": "",
            "tasks_folder": "",
            "tasks_root": "",
            "limit": 0,
            "num_fewshot": -1,
            "max_length": 0,
            "cache_dir": "~/.cache/moe_jax/evaluations",
            "log_samples": False,
            "output": "",
        }
    )
