"""Compress Mixture-of-Experts language models in JAX."""

from moe_jax.config import ModelConfig
from moe_jax.model import forward, init_params

__all__ = ["ModelConfig", "forward", "init_params"]
