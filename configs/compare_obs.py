"""Closed-form pruning against one-shot baselines, at equal shares of the experts' weights.

    python -m moe_jax.compare --config=configs/compare_obs.py            # both shipped models
    python -m moe_jax.compare --config=configs/compare_obs.py:olmoe
    python -m moe_jax.compare --config=configs/compare_obs.py:phimoe

Experts are removed (REAP, MoNE), or every expert is narrowed (SlimMoE's gradients, energy, OBS),
with and without the least-squares repair of the neurons that stay, or experts keep what neurons
they need: ranked across a layer's or the model's experts, and stored as wide as they are. No
training. The second block calibrates on text that lacks domains.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

MONE = runpy.run_path(str(Path(__file__).with_name("compare_mone.py")))
# Shares of the experts' neurons, in steps that suit 40 and 144 of them.
OWN_WIDTHS = {"own_widths": True, "constants": True, "round_to": 8}
METHODS = (
    ("REAP, deleted", {"method": "reap", "replacement": "delete"}),
    ("MoNE", {"method": "mone"}),
    ("slim, KD top-8 gradient", {"method": "slim", "importance": "kd_topk"}),
    ("slim, Fisher", {"method": "slim", "importance": "fisher"}),
    ("slim, Fisher, repaired", {"method": "slim", "importance": "fisher", "repair": True}),
    ("slim, energy", {"method": "slim", "importance": "energy"}),
    ("slim, energy, repaired", {"method": "slim", "importance": "energy", "repair": True}),
    ("OBS, not repaired", {"method": "obs", "repair": False}),
    ("OBS", {"method": "obs"}),
    ("OBS layer by layer", {"method": "obs", "sequential": True}),
    ("OBS across layers", {"method": "obs", "neuron_scope": "layer", **OWN_WIDTHS}),
    ("OBS across the model", {"method": "obs", "neuron_scope": "model", **OWN_WIDTHS}),
)
# Of those that calibration matters to, one of each kind.
VARIED = ("REAP, deleted", "MoNE", "slim, Fisher", "OBS", "OBS across the model")


def get_config(model: str = "") -> ConfigDict:
    return MONE["shipped"](
        "compare_obs",
        model,
        methods=METHODS,
        ratios=(0.75, 0.5, 0.25, 0.15),
        sources=MONE["SOURCES"][:3],
        blocks=({}, {"methods": VARIED, "sources": ("web", "code")}),
        focus="OBS across the model",
        rival="MoNE",
    )
