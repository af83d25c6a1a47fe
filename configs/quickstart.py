"""Compresses a trained Mixture-of-Experts model that ships with the package, on any machine.

    python -m moe_jax.compress --config=configs/quickstart.py           # OLMoE, MoNE: 48 of 64
    python -m moe_jax.compress --config=configs/quickstart.py:phimoe    # Phi-MoE, narrower

Any field can be changed on the command line, such as --config.output=DIR.
"""

from ml_collections import ConfigDict

STAGES = {
    # A quarter of each layer's experts become constants (arXiv 2507.00390).
    "olmoe": ({"method": "mone", "keep_ratio": 0.75},),
    # Every expert keeps 64 of its 144 neurons, by the gradient of the top-8 distillation loss
    # (arXiv 2506.18349, one stage, before distillation).
    "phimoe": ({"method": "slim", "importance": "kd_topk", "expert_width": 64},),
}


def get_config(model: str = "olmoe") -> ConfigDict:
    if model not in STAGES:
        raise ValueError(f"configs/quickstart.py takes one of {sorted(STAGES)}, got {model!r}")
    config = ConfigDict()
    config.model = f"moe_jax/assets/{model}"
    config.output = f"outputs/quickstart_{model}"
    config.dtype = "float32"
    config.seed = 0
    config.calibration = ConfigDict(
        {
            "files": ("moe_jax/assets/text/calibration/*.jsonl.xz",),
            "num_sequences": 128,
            "seq_len": 512,
            "batch_size": 8,
        }
    )
    config.stages = STAGES[model]
    config.evaluation = ConfigDict(
        {
            "files": ("moe_jax/assets/text/evaluation/*.jsonl.xz",),
            "seq_len": 512,
            "batch_size": 8,
            "max_bytes": 60_000,
        }
    )
    config.mesh = ConfigDict({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1})
    return config
