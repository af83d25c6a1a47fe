"""What matters in slimming and distilling: every arm on a shipped model, several seeds each.

    python tools/ablate.py --config=configs/ablations.py
    python tools/ablate.py --config=configs/ablations.py --config.steps=2000 --config.output=DIR

``STUDIES`` maps a study to its arms. An arm is a model, and stages as ``moe_jax.compress`` takes
them; in their ``distill``, ``share`` stands for a share of ``config.steps``, so that all arms of a
study see equally many tokens.
"""

from ml_collections import ConfigDict

WIDTH = 22  # of 144: 15%
HALF = 72


def slim(width: int = WIDTH, share: float = 1.0, loss: str = "kd_full", **changes) -> dict:
    """A cut of every expert to ``width``, then distillation."""
    distill = {"share": share, "loss": loss}
    distill |= {k: changes.pop(k) for k in ("hidden_weight", "router_weight") if k in changes}
    return {"method": "slim", "expert_width": width, "distill": distill, **changes}


def experts(method: str, replacement: str, distill: dict | None, ratio: float = 0.5) -> dict:
    """Removal of experts, then recovery."""
    cut = {"method": method, "keep_ratio": ratio, "replacement": replacement}
    return cut | ({"distill": distill} if distill else {})


def phimoe(*stages: dict) -> dict:
    return {"model": "moe_jax/assets/phimoe", "stages": stages}


def olmoe(*stages: dict) -> dict:
    return {"model": "moe_jax/assets/olmoe", "stages": stages}


ONE_SHOT = {"method": "slim", "expert_width": WIDTH}
# A model that is nearly as good as its original wants smaller steps than one cut to pieces.
RECOVERY = {"share": 1.0, "loss": "lm", "learning_rate": 2e-4}

STUDIES = {
    "Stages, at equal tokens (Phi-MoE, 15% width)": {
        "no distillation": phimoe(ONE_SHOT),
        "one stage": phimoe(slim()),
        "two stages": phimoe(slim(56, 0.5), slim(WIDTH, 0.5)),
        "three stages": phimoe(slim(77, 1 / 3), slim(41, 1 / 3), slim(WIDTH, 1 / 3)),
    },
    "Share of tokens in the first of two stages (Phi-MoE, 15% width)": {
        "25%": phimoe(slim(56, 0.25), slim(WIDTH, 0.75)),
        "50%": phimoe(slim(56, 0.5), slim(WIDTH, 0.5)),
        "75%": phimoe(slim(56, 0.75), slim(WIDTH, 0.25)),
    },
    "Importance, one stage (Phi-MoE, 15% width)": {
        "KD top-8 gradient": phimoe(slim()),
        "KD top-8 gradient, across a layer's experts": phimoe(slim(neuron_scope="layer")),
        "Fisher": phimoe(slim(importance="fisher")),
        "activation norm": phimoe(slim(importance="activation_norm")),
        "random": phimoe(slim(importance="random_neurons")),
    },
    "Distillation loss, one stage (Phi-MoE, 15% width)": {
        "forward KL": phimoe(slim()),
        "top-8": phimoe(slim(loss="kd_topk")),
        "top-8, renormalised": phimoe(slim(loss="kd_topk_renormalized")),
        "reverse KL": phimoe(slim(loss="reverse_kl")),
        "Jensen-Shannon": phimoe(slim(loss="jensen_shannon")),
        "forward KL and hidden states": phimoe(slim(hidden_weight=1.0)),
        "text alone, no teacher": phimoe(slim(loss="lm")),
    },
    "Slimming or removing experts, equal parameters (Phi-MoE, 50%)": {
        "slim to half width": phimoe(slim(HALF)),
        "remove half of the experts (REAP)": phimoe(
            experts("reap", "delete", {"share": 1.0, "loss": "kd_full"})
        ),
        "half of the experts novices (MoNE)": phimoe(
            experts("mone", "novice", {"share": 1.0, "loss": "kd_full"})
        ),
    },
    "Recovery of MoNE on text (OLMoE, 50% novices)": {
        "novices, no training": olmoe(experts("mone", "novice", None)),
        "novices, all weights train": olmoe(experts("mone", "novice", RECOVERY)),
        "novices, the router trains": olmoe(
            experts("mone", "novice", {**RECOVERY, "trainable": "router"})
        ),
        "experts deleted, no training": olmoe(experts("mone", "delete", None)),
        "experts deleted, all weights train": olmoe(experts("mone", "delete", RECOVERY)),
    },
}


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "output": "outputs/ablations",
            "seeds": (0, 1, 2),
            "steps": 36,
            # Pairs: a ConfigDict would sort the names.
            "studies": tuple((study, tuple(arms.items())) for study, arms in STUDIES.items()),
            "distill": {
                "learning_rate": 1e-3,
                "chunk_tokens": 256,
                "log_every": 2,
                "checkpoint_every": 10_000,
            },
            "calibration": {
                "files": ("moe_jax/assets/text/calibration/*.jsonl.xz",),
                "num_sequences": 32,
                "seq_len": 256,
                "batch_size": 8,
            },
            "training": {
                "files": ("moe_jax/assets/text/training/*.jsonl.xz",),
                "seq_len": 256,
                "batch_size": 8,
            },
            "evaluation": {
                "files": ("moe_jax/assets/text/evaluation/*.jsonl.xz",),
                "seq_len": 256,
                "batch_size": 16,
                "max_bytes": 8_000,
            },
        }
    )
