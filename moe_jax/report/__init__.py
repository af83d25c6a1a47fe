"""Reports."""

from moe_jax.report.environment import environment, peak_memory_mib

__all__ = ["environment", "peak_memory_mib"]
