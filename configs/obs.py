"""Half of the experts' neurons go, and those that stay make up for them: no training.

    python -m moe_jax.compress --config=configs/obs.py           # OLMoE, 20 of 40 neurons
    python -m moe_jax.compress --config=configs/obs.py:phimoe    # Phi-MoE, 72 of 144
    python -m moe_jax.compress --config=configs/obs.py:olmoe_across      # ranked across the model
    python -m moe_jax.compress --config=configs/obs.py:phimoe_across

The neurons are chosen one after the other by Optimal Brain Surgeon, and the down-projections of
those that stay are solved for in closed form, from second moments of one calibration pass. The
result is a stock checkpoint with a smaller width. Ranked across all experts of the model, each
keeps as many neurons as it needs, and a constant: better still if the calibration text covers what
the model is for, and loaded with the modelling file that the checkpoint brings.
"""

from ml_collections import ConfigDict

MODELS = ("olmoe", "phimoe")
ACROSS = {"neuron_scope": "model", "own_widths": True, "constants": True, "round_to": 8}


def get_config(argument: str = "olmoe") -> ConfigDict:
    known = (*MODELS, *(f"{model}_across" for model in MODELS))
    if argument not in known:
        raise ValueError(f"configs/obs.py takes one of {known}, got {argument!r}")
    model = argument.removesuffix("_across")
    options = {} if model == argument else ACROSS
    return ConfigDict(
        {
            "model": f"moe_jax/assets/{model}",
            "output": f"outputs/obs_{argument}",
            "dtype": "float32",
            "seed": 0,
            "calibration": {
                "files": ("moe_jax/assets/text/calibration/*.jsonl.xz",),
                "num_sequences": 128,
                "seq_len": 512,
                "batch_size": 8,
            },
            "stages": ({"method": "obs", "width_ratio": 0.5, **options},),
            "evaluation": {
                "files": ("moe_jax/assets/text/evaluation/*.jsonl.xz",),
                "seq_len": 512,
                "batch_size": 8,
                "max_bytes": 60_000,
            },
        }
    )
