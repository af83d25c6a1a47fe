"""Calibrates, cuts and measures the cells of a grid that are not there yet."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.calibrate import calibrate_domains
from moe_jax.compare.grid import Calibration, Cell, Grid
from moe_jax.compare.subjects import Subject
from moe_jax.config import ModelConfig, MoeConfig
from moe_jax.evaluate import Reference, TaskSettings, evaluate, evaluate_tasks
from moe_jax.files import write_json
from moe_jax.hf import load_hf
from moe_jax.metrics import progress_bar
from moe_jax.params import Model, count_params, expert_leaves, stack_experts
from moe_jax.plan import Plan, plan_cut
from moe_jax.prune import apply_plan, refit
from moe_jax.prune.sequential import sequential_cut
from moe_jax.run.describe import fates
from moe_jax.statistics import Stats

Params = dict[str, Any]
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
    # Two names of one cut share a file: it is made once and counted once.
    todo = {
        subject.name: {
            file: cell
            for cell in subject.cells
            if read_numbers(file := subject.cell_file(cell)) is None
        }
        for subject in subjects
    }
    total = sum(len({subject.cell_file(cell) for cell in subject.cells}) for subject in subjects)
    progress = Progress(total, total - sum(map(len, todo.values())))
    try:
        for subject in subjects:
            if todo[subject.name] or read_numbers(subject.original_file) is None:
                _run_subject(grid, subject, todo[subject.name], progress)
    finally:
        progress.close()


def _run_subject(
    grid: Grid, subject: Subject, todo: Mapping[Path, Cell], progress: Progress
) -> None:
    config, params = load_hf(subject.folder, grid.dtype or None)
    reference = Reference.keeping((params, config), subject.windows, grid.reference_mib)
    if read_numbers(subject.original_file) is None:
        write_json(subject.original_file, _measured(grid, subject, params, config, reference))
    by_calibration: dict[Calibration, list[tuple[Path, Cell]]] = {}
    for file, cell in todo.items():
        by_calibration.setdefault(cell.calibration, []).append((file, cell))
    for calibration, cells in by_calibration.items():
        stats = _calibrated(subject, params, calibration)
        for file, cell in cells:
            start = time.perf_counter()
            plan, smaller, cut = _compressed(subject, cell, params, stats)
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


def _calibrated(subject: Subject, params: Params, calibration: Calibration) -> Stats:
    """Statistics for all methods that use this sample, from disk if they are there."""
    key, path = subject.statistics_key(calibration), subject.statistics_path(calibration)
    if (stats := Stats.load_if_same(path, key)) is not None:
        return stats
    return calibrate_domains(
        params,
        subject.config,
        subject.batches(calibration),
        subject.samples[calibration].measurement,
        save_as=path,
        digest=key,
    )


def _compressed(
    subject: Subject, cell: Cell, params: Params, stats: Stats
) -> tuple[Plan, ModelConfig, Params]:
    """The cut of a cell, by the functions that a run cuts by."""
    cut, config, sample = subject.cells[cell], subject.config, subject.samples[cell.calibration]
    if cut.sequential:
        bound = sample.settings.second_moment_bytes or None
        batches = subject.batches(cell.calibration)
        found = sequential_cut(params, config, batches, cut, second_moment_bytes=bound)
        return found.plan, found.config, found.params
    plan = plan_cut(cut, stats, config, seed=sample.seed, params=params).plan
    smaller, weights = apply_plan(params, config, plan, stats)
    if cut.refit:
        text = subject.refit_batches(cell.calibration, cut)
        weights = refit(Model(params, config), Model(weights, smaller), text)
    return plan, smaller, weights


def _measured(
    grid: Grid, subject: Subject, params: Params, config: ModelConfig, reference: Reference
) -> dict[str, Any]:
    """Size, held-out losses and tasks of a model."""
    counts = count_params(config)
    widest = max(subject.config.moe(i).expert_width for i in subject.config.moe_layers)
    params, config = canonical(params, config, widest)
    losses = evaluate(params, config, subject.windows, reference=reference, with_speed=False)
    facts: dict[str, Any] = {
        "parameters": vars(counts),
        "bytes": counts.total * subject.item_bytes,
        "evaluation": losses.to_dict(),
    }
    if subject.tasks is not None:
        settings = TaskSettings(limit=grid.limit or None)
        found = evaluate_tasks(params, config, subject.tokenizer, subject.tasks, settings)
        facts["tasks"] = found["tasks"]
    return facts


def _fates(plan: Plan, config: ModelConfig) -> dict[str, Any]:
    """By layer with experts, which of them went and how."""
    gone: dict[str, Any] = {}
    for i in config.moe_layers:
        gone[str(i)] = fates(plan, i)
        if i in plan.dropped_layers:
            gone[str(i)]["removed"] = list(range(config.moe(i).num_experts))
    return gone


def canonical(params: Params, config: ModelConfig, width: int) -> tuple[Params, ModelConfig]:
    """A model of equal function, each layer's novices last among its router rows.

    Which experts are novices, and how wide each is, are part of a configuration and so of the
    compiled program: as they are, no two plans share one. Experts that differ in width are filled
    up with zeros to ``width``, the original's, novices beside them too: experts of no neurons.
    """
    layers = list(params["layers"])
    for i in config.moe_layers:
        moe, part = config.moe(i), dict(layers[i]["moe"])
        if not moe.novice_ids and not moe.expert_widths:
            continue
        order = np.array([*moe.expert_ids, *moe.novice_ids])
        part["router"] = {**part["router"], "kernel": part["router"]["kernel"][:, order]}
        if moe.expert_widths:
            leaves = expert_leaves(config, i)
            part = _of_one_width(part, moe, leaves, width)
            facts = {"expert_widths": (), "expert_width": width, "expert_bias": True}
            config = config.replace_moe(i, novice_ids=(), **facts)
        else:
            last = tuple(range(len(moe.expert_ids), moe.num_experts))
            config = config.replace_moe(i, novice_ids=last)
        layers[i] = {**layers[i], "moe": part}
    return {**params, "layers": layers}, config


def _of_one_width(part: Params, moe: MoeConfig, leaves: Params, width: int) -> Params:
    """All experts and then all novices as experts of ``width`` neurons and a constant."""
    novices, missing = len(moe.novice_ids), width - moe.expert_width
    experts = {}
    for name, array in stack_experts(part["experts"], leaves).items():
        more = {"E": novices, "F": missing}
        experts[name] = jnp.pad(array, [(0, more.get(axis, 0)) for axis in leaves[name].axes])
    model_width = part["router"]["kernel"].shape[0]
    bias = part.get("expert_bias", jnp.zeros((len(moe.expert_ids), model_width)))
    if novices:
        bias = jnp.concatenate([bias, part["novices"]["constant"]])
    rest = {name: leaves for name, leaves in part.items() if name != "novices"}
    return {**rest, "experts": experts, "expert_bias": bias}
