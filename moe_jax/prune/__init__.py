"""Applies a Plan to weights."""

from moe_jax.prune.apply import apply_plan

__all__ = ["apply_plan"]
