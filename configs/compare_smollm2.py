"""Cuts without training on a model that answers questions, which ``moe_smollm2.py`` builds.

    python -m moe_jax.compare --config=configs/compare_smollm2.py             # the 100-step build
    python -m moe_jax.compare --config=configs/compare_smollm2.py:standard    # 1,000 steps
    python -m moe_jax.compare --config=configs/compare_smollm2.py:sparse

Rows that say "refitted" differ from the row of their name in that alone, so that what is chosen and
what makes up for it are told apart. "stock" rows load in transformers and serving engines as they
are. The statistics and refits read 36 x 512 tokens, "x 3" 108 x 512 for the refit.
"""

from ml_collections import ConfigDict

FOLDER = "~/.cache/moe_jax/smollm2"
TEXT = "moe_jax/assets/text"
DELETE = {"replacement": "delete"}
REFIT = {"refit": True}
LONG = {"refit": True, "refit_sequences": 108}
REAP = {"method": "reap", **DELETE}
REROUTED = {"method": "rerouted", **DELETE}
WITHIN = {"method": "token_fisher"}
LAYER_WIDTH = {"method": "token_fisher", "neuron_scope": "layer_width", "round_to": 4}
ACROSS = {
    "method": "token_fisher", "neuron_scope": "model", "own_widths": True, "round_to": 8,
}  # fmt: skip
HEAPR = {"method": "heapr", "neuron_scope": "model", "own_widths": True, "round_to": 8}
METHODS = (
    ("MoNE", {"method": "mone"}),
    ("REAP", REAP),
    ("REAP, refitted", {**REAP, **REFIT}),
    ("removal with re-routing", REROUTED),
    ("removal with re-routing, refitted", {**REROUTED, **REFIT}),
    ("removal with re-routing, refitted x 3", {**REROUTED, **LONG}),
    ("M-SMoE", {"method": "m_smoe"}),
    ("M-SMoE, refitted", {"method": "m_smoe", **REFIT}),  # as MergeMoE does with its own merges
    ("SlimMoE's gradient", {"method": "slim", "importance": "kd_topk"}),
    ("Fisher-MoE: cost within the expert", WITHIN),
    ("cost within the expert, refitted", {**WITHIN, **REFIT}),
    ("cost within the expert, refitted x 3", {**WITHIN, **LONG}),
    ("CAMERA-P", {"method": "camera", "neuron_scope": "layer", "own_widths": True, "round_to": 8}),
    ("HEAPr", HEAPR),
    ("HEAPr, summed over tokens", {**HEAPR, "options": {"over": "tokens"}}),
    ("MSAN", {"method": "msan", **DELETE}),
    ("AIMER", {"method": "aimer", **DELETE}),
    ("OBS within the expert", {"method": "obs"}),
    (
        "OBS across the model",
        {"method": "obs", "neuron_scope": "model", "own_widths": True, "round_to": 8},
    ),
    ("one width a layer", LAYER_WIDTH),
    ("one width a layer, refitted", {**LAYER_WIDTH, **REFIT}),
    ("one width a layer, refitted x 3", {**LAYER_WIDTH, **LONG}),
    ("cost across the model", ACROSS),
    ("cost across the model, refitted", {**ACROSS, **REFIT}),
    ("cost across the model, refitted x 3", {**ACROSS, **LONG}),
)
# Fewer bits alone, and after cuts: a matrix of 4 bits in groups of 128 stores 4.25 a weight.
BITS = tuple(
    (f"{bits} bits", {**REAP, "quantize": {"bits": bits, "group_size": 128}})
    for bits in (8, 6, 5, 4, 3)
)
_FOUR = {"quantize": {"bits": 4, "group_size": 128}}
CUT_BITS = (
    ("removal with re-routing, refitted, 4 bits", {**REROUTED, **REFIT, **_FOUR}),
    ("cost within the expert, refitted, 4 bits", {**WITHIN, **REFIT, **_FOUR}),
    ("one width a layer, refitted, 4 bits", {**LAYER_WIDTH, **REFIT, **_FOUR}),
)


def get_config(variant: str = "short") -> ConfigDict:
    config = ConfigDict()
    config.models = (f"{FOLDER}/{variant}/distilled/model",)
    config.output = f"outputs/compare_smollm2_{variant}"
    config.methods = METHODS + CUT_BITS + BITS
    config.ratios = (0.5,)
    # REAP keeps all at a ratio of 1, so that fewer bits stand alone.
    config.blocks = (
        {"methods": tuple(name for name, _ in METHODS + CUT_BITS)},
        {"methods": tuple(name for name, _ in BITS), "ratios": (1.0,)},
    )
    config.sources = (("all domains", (f"{TEXT}/calibration/*.jsonl.xz",)),)
    config.count = 36
    config.calibration = ConfigDict({"seq_len": 512, "batch_size": 4})
    config.evaluation = ConfigDict(
        {
            "files": (f"{TEXT}/evaluation/*.jsonl.xz",),
            "seq_len": 512,
            "batch_size": 4,
            "max_bytes": 16_000,
        }
    )
    config.reference_mib = 8192
    config.focus = "one width a layer, refitted"
    config.rival = "REAP"
    return config
