"""Distillation of slimmed experts from two starts: cut by gradients, or in closed form.

    python -m moe_jax.compare --config=configs/distill_start.py            # both shipped models
    python -m moe_jax.compare --config=configs/distill_start.py:olmoe
    python -m moe_jax.compare --config=configs/distill_start.py:phimoe
    python -m moe_jax.compare --config=configs/distill_start.py:rates      # of learning

Every expert is cut to 15% of its neurons: by SlimMoE's step with the Fisher criterion, or by
Optimal Brain Surgeon with the least-squares repair. Then all weights are distilled from the
original. All methods see the same text in the same order. Each start has the learning rate that
was the best for it on one seed of the OLMoE, at half of the tokens.
"""

from ml_collections import ConfigDict

MODELS = {"olmoe": "OLMoE", "phimoe": "Phi-MoE"}
STARTS = {
    "Fisher": {"method": "slim", "importance": "fisher"},
    "OBS, repaired": {"method": "obs"},
}
RATES = {"Fisher": 5e-4, "OBS, repaired": 2.5e-4}
TRIED = (1e-3, 5e-4, 2.5e-4)
TEXT = "moe_jax/assets/text"


def trained(**fields) -> ConfigDict:
    """A grid with trainings on the text that ships with the package."""
    return ConfigDict(
        {
            "seeds": (0, 1, 2),
            "sources": (("eight domains", (f"{TEXT}/calibration/*.jsonl.xz",)),),
            "calibration": {"seq_len": 256},
            "training": {"files": (f"{TEXT}/training/*.jsonl.xz",), "seq_len": 256},
            "evaluation": {
                "files": (f"{TEXT}/evaluation/*.jsonl.xz",),
                "seq_len": 256,
                "batch_size": 4,
                "max_bytes": 8_000,
            },
            **fields,
        }
    )


def method(start: str, rate: float) -> dict:
    return {**STARTS[start], "distill": {"loss": "kd_full", "learning_rate": rate}}


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "rates", *MODELS):
        raise ValueError(
            f"configs/distill_start.py takes one of {('rates', *MODELS)}, got {variant!r}"
        )
    shared = {"ratios": (0.15,), "cooldown": 0.2, "distill": {"warmup_steps": 4}, "steps": 80}
    shared["distill"]["chunk_tokens"] = 256
    if variant == "rates":
        names = {start: {rate: f"{start}, {rate:g}" for rate in TRIED} for start in STARTS}
        return trained(
            models=("moe_jax/assets/olmoe",),
            output="outputs/distill_start_rates",
            methods=tuple(
                (name, method(start, rate))
                for start, by_rate in names.items()
                for rate, name in by_rate.items()
            ),
            blocks=tuple(
                {
                    "title": f"Learning rates, {start} (OLMoE, 15% width)",
                    "methods": tuple(by_rate.values()),
                    "seeds": (0,),
                }
                for start, by_rate in names.items()
            ),
            marks=(0.25, 0.5),
            **shared,
        )
    models = [name for name in MODELS if variant in ("", name)]
    return trained(
        models=tuple(f"moe_jax/assets/{name}" for name in models),
        output="outputs/distill_start",
        methods=tuple((start, method(start, rate)) for start, rate in RATES.items()),
        blocks=tuple(
            {"title": f"{MODELS[name]}, 15% of the width", "models": (f"moe_jax/assets/{name}",)}
            for name in models
        ),
        # Lengths of the trainings as shares of the steps; of each, the last fifth cools down.
        marks=(0.125, 0.25, 0.5, 1.0),
        **shared,
    )
