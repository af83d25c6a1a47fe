"""SlimMoE on a trained model that ships with the package: experts from 144 to 22 neurons.

    python -m moe_jax.compress --config=configs/quickstart_slimmoe.py                  # two stages
    python -m moe_jax.compress --config=configs/quickstart_slimmoe.py:one_stage        # same tokens
    python -m moe_jax.compress --config=configs/quickstart_slimmoe.py:no_distillation

Each stage cuts every expert and then distils from the original (arXiv 2506.18349). The teacher is
a Phi-MoE with 16 experts; 15% of the width of its experts stays. Neurons are ranked by the Fisher
criterion and distilled with the whole distribution: on this small model both do better than the
top-8 forms of the paper (configs/ablations.py).
"""

from ml_collections import ConfigDict

STEPS = 240
# Name -> (width, share of the steps) of each stage. 56 is the geometric mean of 144 and 22.
STAGES = {
    "two_stages": ((56, 0.5), (22, 0.5)),
    "one_stage": ((22, 1.0),),
    "no_distillation": ((22, 0.0),),
}


def stage(width: int, share: float) -> dict:
    cut = {"method": "slim", "expert_width": width, "importance": "fisher"}
    if not share:
        return cut
    distill = {"steps": round(STEPS * share), "learning_rate": 1e-3, "loss": "kd_full"}
    return {**cut, "distill": {**distill, "chunk_tokens": 256, "checkpoint_every": 60}}


def get_config(variant: str = "two_stages") -> ConfigDict:
    if variant not in STAGES:
        raise ValueError(
            f"configs/quickstart_slimmoe.py takes one of {sorted(STAGES)}, got {variant!r}"
        )
    config = ConfigDict()
    config.model = "moe_jax/assets/phimoe"
    config.output = f"outputs/quickstart_slimmoe_{variant}"
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
    config.training = ConfigDict(
        {
            "files": ("moe_jax/assets/text/training/*.jsonl.xz",),
            "seq_len": 256,
            "batch_size": 8,
        }
    )
    config.stages = tuple(stage(width, share) for width, share in STAGES[variant])
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
