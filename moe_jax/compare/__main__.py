"""Compares compression methods on the same calibration, training and held-out text.

    python -m moe_jax.compare --config=configs/compare_mone.py
    python -m moe_jax.compare --config=configs/compare_mone.py:olmoe --config.seeds="(0,)"
    python -m moe_jax.compare --config=configs/ablations.py

Every cell (a model, method, ratio, calibration sample and seed) leaves a file named by a digest of
all that it depends on, so that a rerun, or a grid with more cells, does only what is missing. One
calibration serves all methods that use the same sample.

    output/cells/DIGEST.json        one compressed model: sizes, held-out losses, which experts went
    output/originals/*.json         the models as they are
    output/statistics/DIGEST.*      calibration
    output/results.{csv,json}       all of it in one file
    output/table.md, summary.md     means and spreads over seeds; the ranking in sentences
    output/report.html, *.png       the same with figures

Fields of the configuration:
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from moe_jax import cli
from moe_jax.compare.grid import Grid
from moe_jax.compare.report import write_results
from moe_jax.compare.runner import run_cells
from moe_jax.compare.subjects import prepare
from moe_jax.files import LOCK, check_apart, locked
from moe_jax.settings import field_help

__doc__ = f"{__doc__}{field_help(Grid)}\n"
# By name: run as a program, this module is called __main__.
_logger = logging.getLogger("moe_jax.compare")


def main(settings: ConfigDict, _: Sequence[str]) -> None:
    """The command line."""
    grid = Grid.from_dict(settings.to_dict())
    subjects = prepare(grid)
    output = Path(grid.output).expanduser()
    # Programs serve every seed, and the next run.
    jax.config.update("jax_compilation_cache_dir", str((output / "compiled").absolute()))
    samples = len({cell.calibration for subject in subjects for cell in subject.cells})
    cells = sum(len(subject.cells) for subject in subjects)
    _logger.info("%d cells, %d calibrations, %d models", cells, samples, len(subjects))
    for subject in subjects:
        check_apart(subject.folder, output)
    with locked(output / LOCK, f"output {output}"):
        run_cells(grid, subjects)
        paths = write_results(grid, subjects)
    print(paths["summary"].read_text(encoding="utf-8"))
    cli.print_paths(paths)


if __name__ == "__main__":
    cli.run_with_config(main, "What to compare, such as configs/compare_mone.py.")
