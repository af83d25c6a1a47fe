"""Distillation of slimmed experts from two starts: cut by gradients, or in closed form.

    python tools/ablate.py --config=configs/distill_start.py            # both shipped models
    python tools/ablate.py --config=configs/distill_start.py:olmoe
    python tools/ablate.py --config=configs/distill_start.py:phimoe
    python tools/ablate.py --config=configs/distill_start.py:rates      # choice of learning rates

Every expert is cut to 15% of its neurons: by SlimMoE's step with the Fisher criterion, or by
Optimal Brain Surgeon with the least-squares repair. Then all weights are distilled from the
original. All arms see the same text in the same order. Each start has the learning rate that was
the best for it on one seed of the OLMoE, at half of the tokens.
"""

from ml_collections import ConfigDict

MODELS = {"olmoe": ("OLMoE", 6), "phimoe": ("Phi-MoE", 22)}  # of 40 neurons and of 144
STARTS = {
    "Fisher": {"method": "slim", "importance": "fisher"},
    "OBS, repaired": {"method": "obs"},
}
RATES = {"Fisher": 5e-4, "OBS, repaired": 2.5e-4}
TRIED = (1e-3, 5e-4, 2.5e-4)


def arm(model: str, start: str, rate: float) -> dict:
    """A cut, and distillation after it."""
    distill = {"share": 1.0, "loss": "kd_full", "learning_rate": rate}
    stage = {**STARTS[start], "expert_width": MODELS[model][1], "distill": distill}
    return {"model": f"moe_jax/assets/{model}", "stages": (stage,)}


def studies(variant: str) -> tuple:
    """Pairs of a study's name and its arms."""
    if variant == "rates":
        return tuple(
            (
                f"Learning rates, {start} (OLMoE, 15% width)",
                tuple((f"{rate:g}", arm("olmoe", start, rate)) for rate in TRIED),
            )
            for start in STARTS
        )
    return tuple(
        (
            f"{label}, 15% of the width",
            tuple((start, arm(model, start, rate)) for start, rate in RATES.items()),
        )
        for model, (label, _) in MODELS.items()
        if variant in ("", model)
    )


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "rates", *MODELS):
        raise ValueError(
            f"configs/distill_start.py takes one of {('rates', *MODELS)}, got {variant!r}"
        )
    tries = variant == "rates"
    return ConfigDict(
        {
            "output": "outputs/distill_start_rates" if tries else "outputs/distill_start",
            "seeds": (0,) if tries else (0, 1, 2),
            "steps": 80,
            "studies": studies(variant),
            # Lengths of the trainings as shares of the steps, and how much of each has a learning
            # rate that falls; before, it is constant.
            "marks": (0.25, 0.5) if tries else (0.125, 0.25, 0.5, 1.0),
            "cooldown": 0.2,
            "distill": {"warmup_steps": 4, "chunk_tokens": 256},
            "calibration": {
                "files": ("moe_jax/assets/text/calibration/*.jsonl.xz",),
                "num_sequences": 128,
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
                "batch_size": 4,
                "max_bytes": 8_000,
            },
        }
    )
