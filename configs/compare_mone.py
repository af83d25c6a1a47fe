"""MoNE against other one-shot compression methods on the models that ship with the package.

    python -m moe_jax.compare --config=configs/compare_mone.py            # both models
    python -m moe_jax.compare --config=configs/compare_mone.py:olmoe
    python -m moe_jax.compare --config=configs/compare_mone.py:phimoe

The three blocks are the MoNE paper's three kinds of robustness (arXiv 2507.00390): over ratios,
over calibration texts, and over their amount. Baselines are those of the paper (RS, M-SMoE, FLAP,
Angular) and later ones; where ours differ is said in ``moe_jax.plan`` and ``moe_jax.scoring``.
"""

from ml_collections import ConfigDict

MODELS = ("olmoe", "phimoe")
CALIBRATION = "moe_jax/assets/text/calibration"
SOURCES = (
    ("eight domains", (f"{CALIBRATION}/*.jsonl.xz",)),
    ("web", (f"{CALIBRATION}/web.jsonl.xz",)),
    ("code", (f"{CALIBRATION}/code_*.jsonl.xz",)),
    ("math", (f"{CALIBRATION}/math_*.jsonl.xz",)),
)
# Pairs: a ConfigDict would sort the names.
METHODS = (
    ("random, deleted", {"method": "random", "replacement": "delete"}),
    ("frequency, deleted", {"method": "frequency", "replacement": "delete"}),
    ("RS by layer, deleted", {"method": "routing_mass", "replacement": "delete"}),
    ("RS global, deleted", {"method": "routing_mass", "replacement": "delete", "scope": "global"}),
    ("EAN, deleted", {"method": "ean", "replacement": "delete"}),
    ("REAP, deleted", {"method": "reap", "replacement": "delete"}),
    ("REAP, novices", {"method": "reap", "replacement": "novice"}),
    ("MoNE, zeros", {"method": "mone", "replacement": "zero"}),
    ("MoNE", {"method": "mone", "replacement": "novice"}),
    ("M-SMoE", {"method": "m_smoe"}),
    ("HC-SMoE", {"method": "hc_smoe"}),
    ("REAM", {"method": "ream"}),
    ("FLAP score, neurons", {"method": "slim", "importance": "flap"}),
    ("Angular", {"method": "angular"}),
    ("OBS, neurons, repaired", {"method": "obs"}),
)
# Of those that calibration matters to, one of each kind.
VARIED = (
    "RS by layer, deleted",
    "REAP, deleted",
    "REAP, novices",
    "MoNE",
    "M-SMoE",
    "HC-SMoE",
    "FLAP score, neurons",
    "OBS, neurons, repaired",
)


def shipped(name: str, model: str, **fields) -> ConfigDict:
    """A comparison on the models that ship with the package, with what all of these share."""
    if model not in ("", *MODELS):
        raise ValueError(f"configs/{name}.py takes one of {MODELS}, got {model!r}")
    return ConfigDict(
        {
            "models": tuple(f"moe_jax/assets/{each}" for each in MODELS if model in ("", each)),
            "output": f"outputs/{name}_{model}" if model else f"outputs/{name}",
            "seeds": (0, 1, 2),
            "calibration": {"seq_len": 256},
            "evaluation": {
                "files": ("moe_jax/assets/text/evaluation/*.jsonl.xz",),
                "batch_size": 2,
                "max_bytes": 4_000,
            },
            **fields,
        }
    )


def get_config(model: str = "") -> ConfigDict:
    return shipped(
        "compare_mone",
        model,
        methods=METHODS,
        sources=SOURCES,
        blocks=(
            {},
            {"methods": VARIED, "sources": ("eight domains", "web", "code", "math")},
            {"methods": VARIED, "counts": (16, 128, 512)},
        ),
        focus="MoNE",
        rival="REAP, deleted",
    )
