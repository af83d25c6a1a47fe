"""Array operations that know nothing of models."""

from moe_jax.ops.grouped_matmul import grouped_matmul

__all__ = ["grouped_matmul"]
