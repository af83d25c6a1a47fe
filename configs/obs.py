"""Half of every expert's neurons go, and those that stay make up for them: no training.

    python -m moe_jax.compress --config=configs/obs.py           # OLMoE, 20 of 40 neurons
    python -m moe_jax.compress --config=configs/obs.py:phimoe    # Phi-MoE, 72 of 144

The neurons are chosen one after the other by Optimal Brain Surgeon, and the down-projections of
those that stay are solved for in closed form, from second moments of one calibration pass. The
result is a stock checkpoint with a smaller width.
"""

from ml_collections import ConfigDict

MODELS = ("olmoe", "phimoe")


def get_config(model: str = "olmoe") -> ConfigDict:
    if model not in MODELS:
        raise ValueError(f"configs/obs.py takes one of {MODELS}, got {model!r}")
    return ConfigDict(
        {
            "model": f"moe_jax/assets/{model}",
            "output": f"outputs/obs_{model}",
            "dtype": "float32",
            "seed": 0,
            "calibration": {
                "files": ("moe_jax/assets/text/calibration/*.jsonl.xz",),
                "num_sequences": 128,
                "seq_len": 512,
                "batch_size": 8,
            },
            "stages": ({"method": "obs", "width_ratio": 0.5},),
            "evaluation": {
                "files": ("moe_jax/assets/text/evaluation/*.jsonl.xz",),
                "seq_len": 512,
                "batch_size": 8,
                "max_bytes": 60_000,
            },
        }
    )
