"""Half of a model's experts go, without training, and what is left loads wherever the model did.

    python -m moe_jax.compress --config=configs/stock.py --config.model=MODEL --config.output=DIR

The experts that a layer loses are chosen one after the other by what the loss pays for the new
routes of their tokens; then every layer's down-projections are solved for together, on more text
than the statistics read. Give it text of all that the model is for: on narrow text a refit forgets
the rest. configs/README.md has what other ways to cut lose on one model.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": "moe_jax/assets/olmoe",
            "output": "outputs/stock",
            "dtype": "float32",
            "calibration": {
                "files": ("moe_jax/assets/text/calibration/*.jsonl.xz",),
                "num_sequences": 128,
                "seq_len": 512,
                "batch_size": 8,
            },
            "stages": (
                {
                    "method": "rerouted",
                    "replacement": "delete",
                    "keep_ratio": 0.5,
                    "refit": True,
                    "refit_sequences": 384,
                },
            ),
            "evaluation": {
                "files": ("moe_jax/assets/text/evaluation/*.jsonl.xz",),
                "seq_len": 512,
                "batch_size": 8,
                "max_bytes": 60_000,
            },
        }
    )
