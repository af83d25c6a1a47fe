"""A few one-shot methods on a task that the shipped models answer above chance.

    python -m moe_jax.compare --config=configs/compare_tasks.py            # both shipped models
    python -m moe_jax.compare --config=configs/compare_tasks.py:olmoe

The task is a sample of BLiMP that ships with the package; any other of lm-evaluation-harness can be
named, local or on the hub.
"""

from ml_collections import ConfigDict

MODELS = ("olmoe", "phimoe")
METHODS = (
    ("RS by layer, deleted", {"method": "routing_mass", "replacement": "delete"}),
    ("REAP, deleted", {"method": "reap", "replacement": "delete"}),
    ("M-SMoE", {"method": "m_smoe"}),
    ("MoNE", {"method": "mone"}),
    ("FLAP score, neurons", {"method": "slim", "importance": "flap"}),
    ("slim, Fisher", {"method": "slim", "importance": "fisher"}),
    ("OBS, neurons, repaired", {"method": "obs"}),
    (
        "OBS across the model",
        {
            "method": "obs",
            "neuron_scope": "model",
            "own_widths": True,
            "constants": True,
            "round_to": 8,
        },
    ),
)


def get_config(model: str = "") -> ConfigDict:
    if model not in ("", *MODELS):
        raise ValueError(f"configs/compare_tasks.py takes one of {MODELS}, got {model!r}")
    return ConfigDict(
        {
            "models": tuple(f"moe_jax/assets/{name}" for name in MODELS if model in ("", name)),
            "output": f"outputs/compare_tasks_{model}" if model else "outputs/compare_tasks",
            "dtype": "float32",
            "methods": METHODS,
            "ratios": (0.75, 0.5),
            "sources": (("eight domains", ("moe_jax/assets/text/calibration/*.jsonl.xz",)),),
            "source": "eight domains",
            "count": 128,
            "seeds": (0, 1, 2),
            "blocks": ({},),
            "calibration": {"seq_len": 256, "batch_size": 8, "pack": False},
            "evaluation": {
                "files": ("moe_jax/assets/text/evaluation/*.jsonl.xz",),
                "seq_len": 512,
                "batch_size": 2,
                "max_bytes": 4_000,
            },
            "tasks": ("blimp_1005",),
            "tasks_folder": "moe_jax/assets/tasks",
            "tasks_root": "",
            "limit": 0,
            "focus": "MoNE",
            "rival": "REAP, deleted",
            "reference_mib": 1024,
        }
    )
