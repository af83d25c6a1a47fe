"""A few one-shot methods on a task that the shipped models answer above chance.

    python -m moe_jax.compare --config=configs/compare_tasks.py            # both shipped models
    python -m moe_jax.compare --config=configs/compare_tasks.py:olmoe

The task is a sample of BLiMP that ships with the package; any other of lm-evaluation-harness can be
named, local or on the hub.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

MONE, OBS = (
    runpy.run_path(str(Path(__file__).with_name(f"compare_{name}.py"))) for name in ("mone", "obs")
)
NAMES = (
    "RS by layer, deleted",
    "REAP, deleted",
    "M-SMoE",
    "MoNE",
    "FLAP score, neurons",
    "slim, Fisher",
    "OBS, neurons, repaired",
    "OBS across the model",
)
KNOWN = dict(OBS["METHODS"]) | dict(MONE["METHODS"])


def get_config(model: str = "") -> ConfigDict:
    return MONE["shipped"](
        "compare_tasks",
        model,
        methods=tuple((name, KNOWN[name]) for name in NAMES),
        sources=MONE["SOURCES"][:1],
        tasks=("blimp_1005",),
        tasks_folder="moe_jax/assets/tasks",
        focus="MoNE",
        rival="REAP, deleted",
    )
