"""Granite 3 MoE with a shared expert beside the routed ones."""

from moe_jax.hf.families.granitemoe import FIXED, KEYS, LAYOUTS, ROPES, SWITCHES
from moe_jax.hf.family import Family, Key
from moe_jax.hf.layouts import LINEAR, LOWER_ROWS, UPPER_ROWS, in_layer

_SHARED = in_layer(
    {
        "moe.shared.gate": ("shared_mlp.input_linear.weight", UPPER_ROWS),
        "moe.shared.up": ("shared_mlp.input_linear.weight", LOWER_ROWS),
        "moe.shared.down": ("shared_mlp.output_linear.weight", LINEAR),
    }
)

FAMILY = Family(
    model_type="granitemoeshared",
    stem="GraniteMoeShared",
    keys={**KEYS, "shared_width": Key(("shared_intermediate_size",), int, 0)},
    fixed={**FIXED, "shared_gated": False},
    switches=SWITCHES,
    ropes=ROPES,
    layouts={name: table | _SHARED for name, table in LAYOUTS.items()},
)
