"""Applies a Plan to weights, and refits what it leaves."""

from moe_jax.prune.apply import apply_plan
from moe_jax.prune.refit import refit

__all__ = ["apply_plan", "refit"]
