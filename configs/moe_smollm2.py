"""SmolLM2-135M-Instruct as a Mixture-of-Experts model: a shared expert and 16 routed ones.

python tools/moe_from_dense.py --config=configs/moe_smollm2.py          # 1,000 steps, 2M tokens
python tools/moe_from_dense.py --config=configs/moe_smollm2.py:short    # 100 steps
python tools/moe_from_dense.py --config=configs/moe_smollm2.py:sparse   # 4 of 16, 300 steps
"""

from ml_collections import ConfigDict

TEXT = "moe_jax/assets/text"
# Name -> (shared neurons, routed experts of a token, steps). Every layer has 1,536 neurons.
VARIANTS = {"standard": (512, 8, 1000), "short": (512, 8, 100), "sparse": (384, 4, 300)}


def get_config(variant: str = "standard") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"configs/moe_smollm2.py takes one of {sorted(VARIANTS)}, got {variant!r}")
    shared_width, experts_per_token, steps = VARIANTS[variant]
    config = ConfigDict()
    config.name = variant
    config.folder = "~/.cache/moe_jax/smollm2"
    config.split = ConfigDict(
        {
            "shared_width": shared_width,
            "num_experts": 16,
            "experts_per_token": experts_per_token,
        }
    )
    config.calibration = ConfigDict(
        {
            "files": (f"{TEXT}/calibration/*.jsonl.xz",),
            "num_sequences": 36,
            "seq_len": 512,
            "batch_size": 4,
        }
    )
    config.run = ConfigDict(
        {
            "dtype": "float32",
            "training": {
                "files": (f"{TEXT}/training/*.jsonl.xz",),
                "seq_len": 512,
                "batch_size": 4,
            },
            "evaluation": {
                "files": (f"{TEXT}/evaluation/*.jsonl.xz",),
                "seq_len": 512,
                "batch_size": 4,
                "max_bytes": 20_000,
            },
            "stages": (
                {
                    "method": "distill",
                    "distill": {
                        "steps": steps,
                        "learning_rate": 4e-4,
                        "rates": {"router": 3.0},
                        "warmup_steps": 20,
                        "final_fraction": 0.05,
                        "weight_decay": 0.0,
                        "balance_weight": 0.01,
                        "trainable": ("attention", "norms", "router", "experts", "shared", "head"),
                        "checkpoint_every": 25,
                        "log_every": 5,
                    },
                },
            ),
        }
    )
    return config
