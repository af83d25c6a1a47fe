"""The decoder: pure functions of nested dicts of arrays, and a thin Flax shell over them."""

from moe_jax.model.attention import position_tables
from moe_jax.model.block import block, forward, head_logits, head_params, hidden_states
from moe_jax.model.options import TAPS, BlockOptions
from moe_jax.model.shell import MoeModel, init_params, shell_variables

__all__ = [
    "TAPS",
    "BlockOptions",
    "MoeModel",
    "block",
    "forward",
    "head_logits",
    "head_params",
    "hidden_states",
    "init_params",
    "position_tables",
    "shell_variables",
]
