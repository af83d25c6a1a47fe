"""Compress Mixture-of-Experts language models in JAX."""

from moe_jax.calibrate import calibrate
from moe_jax.config import ModelConfig
from moe_jax.hf import load_hf, save_hf
from moe_jax.losses import distill_loss
from moe_jax.model import forward, init_params
from moe_jax.plan import Plan, make_plan
from moe_jax.prune import apply_plan
from moe_jax.scoring import score
from moe_jax.statistics import Stats

__all__ = [
    "ModelConfig",
    "Plan",
    "Stats",
    "apply_plan",
    "calibrate",
    "distill_loss",
    "forward",
    "init_params",
    "load_hf",
    "make_plan",
    "save_hf",
    "score",
]
