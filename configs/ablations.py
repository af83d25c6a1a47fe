"""What matters in slimming and distilling: studies on the shipped models, several seeds each.

    python -m moe_jax.compare --config=configs/ablations.py
    python -m moe_jax.compare --config=configs/ablations.py --config.steps=2000 --config.output=DIR

``STUDIES`` maps a study to its model, to the share that stays, and to its methods: cuts and
trainings, the last cut without its size. In ``distill``, ``share`` is a share of ``config.steps``,
so that all trained methods of a study see equally many tokens.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

TRAINED = runpy.run_path(str(Path(__file__).with_name("distill_start.py")))["trained"]
PHIMOE, OLMOE = "moe_jax/assets/phimoe", "moe_jax/assets/olmoe"


def slim(share: float = 1.0, loss: str = "kd_full", **changes) -> dict:
    """A cut of every expert, then distillation; with ``expert_width`` before the last stage."""
    distill = {"share": share, "loss": loss}
    distill |= {k: changes.pop(k) for k in ("hidden_weight", "router_weight") if k in changes}
    return {"method": "slim", "distill": distill, **changes}


def stages(*early: tuple[int, float]) -> tuple[dict, ...]:
    """Widths and shares of the tokens before the last stage, which gets the rest of them."""
    left = 1 - sum(share for _, share in early)
    return (*(slim(share, expert_width=width) for width, share in early), slim(left))


def experts(method: str, replacement: str, distill: dict | None) -> dict:
    """Removal of experts, then recovery."""
    cut = {"method": method, "replacement": replacement}
    return cut | ({"distill": distill} if distill else {})


DISTILLED = {"loss": "kd_full"}
# A model that is nearly as good as its original wants smaller steps than one cut to pieces.
RECOVERY = {"loss": "lm", "learning_rate": 2e-4}

# 15% of 144 neurons are 22.
STUDIES = {
    "Stages, at equal tokens (Phi-MoE, 15% width)": (PHIMOE, 0.15, {
        "no distillation": {"method": "slim"},
        "one stage": slim(),
        "two stages": stages((56, 0.5)),
        "three stages": stages((77, 1 / 3), (41, 1 / 3)),
    }),
    "Share of tokens in the first of two stages (Phi-MoE, 15% width)": (PHIMOE, 0.15, {
        "25%": stages((56, 0.25)),
        "50%": stages((56, 0.5)),
        "75%": stages((56, 0.75)),
    }),
    "Importance, one stage (Phi-MoE, 15% width)": (PHIMOE, 0.15, {
        "KD top-8 gradient": slim(),
        "KD top-8 gradient, across a layer's experts": slim(neuron_scope="layer"),
        "Fisher": slim(importance="fisher"),
        "activation norm": slim(importance="activation_norm"),
        "random": slim(importance="random_neurons"),
    }),
    "Distillation loss, one stage (Phi-MoE, 15% width)": (PHIMOE, 0.15, {
        "forward KL": slim(),
        "top-8": slim(loss="kd_topk"),
        "top-8, renormalised": slim(loss="kd_topk_renormalized"),
        "reverse KL": slim(loss="reverse_kl"),
        "Jensen-Shannon": slim(loss="jensen_shannon"),
        "forward KL and hidden states": slim(hidden_weight=1.0),
        "text alone, no teacher": slim(loss="lm"),
    }),
    "Slimming or removing experts, equal parameters (Phi-MoE, 50%)": (PHIMOE, 0.5, {
        "slim to half width": slim(),
        "remove half of the experts (REAP)": experts("reap", "delete", DISTILLED),
        "half of the experts novices (MoNE)": experts("mone", "novice", DISTILLED),
    }),
    "Recovery of MoNE on text (OLMoE, 50% novices)": (OLMOE, 0.5, {
        "novices, no training": experts("mone", "novice", None),
        "novices, all weights train": experts("mone", "novice", RECOVERY),
        "novices, the router trains": experts(
            "mone", "novice", {**RECOVERY, "trainable": "router"}
        ),
        "experts deleted, no training": experts("mone", "delete", None),
        "experts deleted, all weights train": experts("mone", "delete", RECOVERY),
    }),
}  # fmt: skip


def get_config() -> ConfigDict:
    return TRAINED(
        models=(PHIMOE, OLMOE),
        output="outputs/ablations",
        # Pairs: a ConfigDict would sort the names.
        methods=tuple(pair for *_, methods in STUDIES.values() for pair in methods.items()),
        blocks=tuple(
            {"title": title, "models": (model,), "methods": tuple(methods), "ratios": (ratio,)}
            for title, (model, ratio, methods) in STUDIES.items()
        ),
        count=32,
        steps=36,
        distill={
            "learning_rate": 1e-3,
            "chunk_tokens": 256,
            "log_every": 2,
            "checkpoint_every": 10_000,
        },
    )
