"""Phi-3.5-MoE (41.9B) to the size of Phi-tiny-MoE (3.8B): 448 of 6400 neurons, 4 of 8 KV groups.

    python -m moe_jax.compress --config=configs/slimmoe_phi_tiny.py:tpu \\
        --config.training.files=TEXT/*.jsonl --config.calibration.files=TEXT/first.jsonl

As ``slimmoe_phi_mini.py`` beside it, which says what the paper leaves open, but in three stages:
widths by geometric means rounded up to multiples of 128, groups likewise, and a third of the
tokens each.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

MINI = runpy.run_path(str(Path(__file__).with_name("slimmoe_phi_mini.py")))
# Neurons per expert and key/value groups per layer after each stage.
SIZES = ((2688, 7), (1152, 6), (448, 4))


def get_config(mesh: str = "gpu") -> ConfigDict:
    config = MINI["get_config"](mesh)
    config.output = "outputs/phi_tiny_moe"
    distill = MINI["distill"](MINI["STEPS"] // len(SIZES))
    config.stages = tuple(
        {"expert_width": width, "kv_groups": groups, "importance": "kd_topk", "distill": distill}
        for width, groups in SIZES
    )
    return config
