"""Applies a Plan to weights, and refits what it leaves."""

from moe_jax.prune.apply import apply_plan, cut_in_turn
from moe_jax.prune.refit import refit, refit_in_turn

__all__ = ["apply_plan", "cut_in_turn", "refit", "refit_in_turn"]
