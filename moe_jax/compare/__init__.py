"""Comparison of compression methods over sizes, calibration texts, their amounts, and trainings."""

from moe_jax.compare.grid import Grid
from moe_jax.compare.report import write_results
from moe_jax.compare.runner import run_cells
from moe_jax.compare.subjects import prepare

__all__ = [
    "Grid",
    "prepare",
    "run_cells",
    "write_results",
]
