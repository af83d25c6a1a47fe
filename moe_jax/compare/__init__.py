"""Comparison of compression methods over sizes, calibration texts, their amounts, and trainings."""

from moe_jax.compare.grid import Block, Calibration, Cell, Grid
from moe_jax.compare.report import write_results
from moe_jax.compare.runner import run_cells
from moe_jax.compare.subjects import Subject, prepare

__all__ = [
    "Block",
    "Calibration",
    "Cell",
    "Grid",
    "Subject",
    "prepare",
    "run_cells",
    "write_results",
]
