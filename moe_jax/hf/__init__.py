"""Hugging Face checkpoints in and out."""

from moe_jax.hf.reader import load_hf
from moe_jax.hf.writer import save_hf

__all__ = ["load_hf", "save_hf"]
