"""Calibrates, cuts and measures the cells of a grid that are not there yet."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.calibrate import Batches, Measurement, calibrate_domains, domain_batches
from moe_jax.compare.grid import Calibration, Cell, Grid
from moe_jax.compare.measure import Params, canonical
from moe_jax.compare.subjects import Subject
from moe_jax.config import ModelConfig
from moe_jax.data.documents import expand_files
from moe_jax.evaluate import Reference, TaskSettings, evaluate, evaluate_tasks
from moe_jax.files import write_json
from moe_jax.hf import load_hf
from moe_jax.metrics import progress_bar
from moe_jax.params import count_params
from moe_jax.plan import Plan, plan_cut
from moe_jax.prune import apply_plan
from moe_jax.prune.sequential import sequential_cut
from moe_jax.run.describe import fates
from moe_jax.statistics import Stats

_logger = logging.getLogger(__name__)


class Progress:
    """How many cells are done: a bar on a terminal, else a line for each, with the time left."""

    def __init__(self, total: int, done: int) -> None:
        self._bar = progress_bar(total, "compare", "cell", initial=done)
        self._done, self._first, self._total = done, done, total
        self._start = time.perf_counter()

    def update(self, text: str) -> None:
        """One more cell is done."""
        self._done += 1
        self._bar.set_postfix_str(text)
        self._bar.update()
        if self._bar.disable:
            spent = time.perf_counter() - self._start
            left = spent / (self._done - self._first) * (self._total - self._done)
            minutes = f"{left / 60:.0f} min left"
            _logger.info("%d of %d, %s: %s", self._done, self._total, minutes, text)

    def close(self) -> None:
        self._bar.close()


def cell_file(output: Path, subject: Subject, cell: Cell) -> Path:
    """Where a cell's numbers are."""
    return output / "cells" / f"{subject.cell_key(cell)}.json"


def original_file(output: Path, subject: Subject) -> Path:
    """Where the numbers of the model itself are."""
    return output / "originals" / f"{subject.label.replace('/', '_')}-{subject.key}.json"


def statistics_path(output: Path, subject: Subject, calibration: Calibration) -> Path:
    """Where statistics are, without suffix."""
    return output / "statistics" / subject.statistics_key(calibration)


def read_numbers(file: Path) -> dict[str, Any] | None:
    """What a run left; None if there is nothing that can be used."""
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if found["evaluation"]["mean"] and found["parameters"] else None
    except (ValueError, KeyError, TypeError) as error:
        _logger.warning("measured again, as %s is damaged: %s", file, error)
        return None


def run_cells(grid: Grid, subjects: Sequence[Subject]) -> None:
    """Carries out what is left to do; every cell leaves a file as soon as it is done."""
    output = Path(grid.output).expanduser()
    # Two names of the same settings share a file: it is made once and counted once.
    todo = {
        subject.name: {
            file: cell
            for cell in subject.cells
            if read_numbers(file := cell_file(output, subject, cell)) is None
        }
        for subject in subjects
    }
    total = sum(len({cell_file(output, s, cell) for cell in s.cells}) for s in subjects)
    progress = Progress(total, total - sum(map(len, todo.values())))
    try:
        for subject in subjects:
            missing = read_numbers(original_file(output, subject)) is None
            if todo[subject.name] or missing:
                _run_subject(grid, subject, todo[subject.name], output, progress)
    finally:
        progress.close()


def _run_subject(
    grid: Grid, subject: Subject, todo: Mapping[Path, Cell], output: Path, progress: Progress
) -> None:
    config, params = load_hf(subject.folder, grid.dtype or None)
    reference = Reference.keeping((params, config), subject.windows, grid.reference_mib)
    if read_numbers(original_file(output, subject)) is None:
        facts = _measured(grid, subject, params, config, reference)
        write_json(original_file(output, subject), facts)
    by_calibration: dict[Calibration, list[tuple[Path, Cell]]] = {}
    for file, cell in todo.items():
        by_calibration.setdefault(cell.calibration, []).append((file, cell))
    for calibration, cells in by_calibration.items():
        stats = _calibrated(grid, subject, params, calibration, output)
        for file, cell in cells:
            start = time.perf_counter()
            stage = subject.cells[cell]
            if stage.sequential:
                domains = _domains(grid, subject, calibration)
                bound = grid.calibration.second_moment_bytes or None
                found = sequential_cut(params, config, domains, stage, second_moment_bytes=bound)
                plan, smaller, cut = found.plan, found.config, found.params
            else:
                planned = plan_cut(stage, stats, config, seed=calibration.seed, params=params)
                plan = planned.plan
                smaller, cut = apply_plan(params, config, plan, stats)
            facts = _measured(grid, subject, cut, smaller, reference)
            facts |= {
                "calibration": {"tokens": stats.tokens, "sequences": stats.sequences},
                "layers": _fates(plan, config),
                "dropped_layers": list(plan.dropped_layers),
                "seconds": round(time.perf_counter() - start, 3),
            }
            write_json(file, facts)
            bits = facts["evaluation"]["mean"]["bits_per_byte"]
            progress.update(f"{_title(subject, cell)}: {bits:.4f} bits per byte")


def _title(subject: Subject, cell: Cell) -> str:
    sample = cell.calibration
    return (
        f"{subject.label}, {cell.method} at {cell.ratio:g}, "
        f"{sample.count} of {sample.source}, seed {sample.seed}"
    )


def _calibrated(
    grid: Grid, subject: Subject, params: Params, calibration: Calibration, output: Path
) -> Stats:
    """Statistics for all methods that use this sample, from disk if they are there."""
    key = subject.statistics_key(calibration)
    path = statistics_path(output, subject, calibration)
    if (stats := Stats.load_if_same(path, key)) is not None:
        return stats
    return calibrate_domains(
        params,
        subject.config,
        _domains(grid, subject, calibration),
        Measurement(
            subject.losses(calibration),
            second_moments=subject.second_moments(calibration),
            second_moment_bytes=grid.calibration.second_moment_bytes or None,
            attention_moments=subject.attention_moments(calibration),
            seed=calibration.seed,
        ),
        save_as=path,
        digest=key,
    )


def _domains(grid: Grid, subject: Subject, calibration: Calibration) -> dict[str, Batches]:
    """The batches of a sample, by domain."""
    settings = grid.calibration_of(calibration)
    return domain_batches(
        expand_files(settings.files),
        subject.tokenizer,
        settings,
        seed=calibration.seed,
        vocab_size=subject.config.vocab_size,
    )


def _measured(
    grid: Grid, subject: Subject, params: Params, config: ModelConfig, reference: Reference
) -> dict[str, Any]:
    """Size, held-out losses and tasks of a model."""
    counts = count_params(config)
    widest = max(subject.config.moe(i).expert_width for i in subject.config.moe_layers)
    params, config = canonical(params, config, widest)
    facts: dict[str, Any] = {
        "parameters": vars(counts),
        "bytes": counts.total * subject.item_bytes,
        "evaluation": evaluate(
            params, config, subject.windows, reference=reference, with_speed=False
        ).to_dict(),
    }
    if subject.tasks is not None:
        facts["tasks"] = evaluate_tasks(
            params,
            config,
            subject.tokenizer,
            subject.tasks,
            TaskSettings(limit=grid.limit or None),
        )["tasks"]
    return facts


def _fates(plan: Plan, config: ModelConfig) -> dict[str, Any]:
    """By layer with experts, which of them went and how."""
    gone: dict[str, Any] = {}
    for i in config.moe_layers:
        gone[str(i)] = fates(plan, i)
        if i in plan.dropped_layers:
            gone[str(i)]["removed"] = list(range(config.moe(i).num_experts))
    return gone
