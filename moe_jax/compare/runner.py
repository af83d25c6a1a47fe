"""Calibrates, cuts and measures the cells of a grid that are not there yet."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.calibrate import LayerMeasurement, calibrate_domains
from moe_jax.compare.grid import Calibration, Cell, Grid
from moe_jax.compare.subjects import Subject
from moe_jax.config import ModelConfig, MoeConfig
from moe_jax.data import training_dataset
from moe_jax.distill import TrainingRun, TrainSettings, train
from moe_jax.distill.course import course
from moe_jax.evaluate import Reference, TaskSettings, evaluate, evaluate_tasks
from moe_jax.files import write_json
from moe_jax.hf import load_hf
from moe_jax.metrics import progress_bar, read_metrics
from moe_jax.params import (
    Model,
    cast_params,
    count_params,
    expert_leaves,
    leaves_like,
    stack_experts,
)
from moe_jax.plan import Cut, Plan, plan_cut
from moe_jax.prune import apply_plan, refit
from moe_jax.prune.sequential import sequential_cut
from moe_jax.quantization import quantized, stored_bytes
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
    bench = _Bench(grid, subject)
    if read_numbers(subject.original_file) is None:
        write_json(subject.original_file, bench.measured(bench.original))
    by_calibration: dict[Calibration, list[tuple[Path, Cell]]] = {}
    for file, cell in todo.items():
        by_calibration.setdefault(cell.calibration, []).append((file, cell))
    for calibration, cells in by_calibration.items():
        stats = bench.calibrated(calibration)
        for file, cell in cells:
            facts = bench.cell(cell, stats, work=file.with_suffix(".training"))
            write_json(file, facts)
            shutil.rmtree(file.with_suffix(".training"), ignore_errors=True)
            bits = facts["evaluation"]["mean"]["bits_per_byte"]
            progress.update(f"{_title(subject, cell)}: {bits:.4f} bits per byte")


def _title(subject: Subject, cell: Cell) -> str:
    sample = cell.calibration
    return (
        f"{subject.label}, {cell.method} at {cell.ratio:g}, "
        f"{sample.count} of {sample.source}, seed {sample.seed}"
    )


class _Bench:
    """A model of the grid with its weights: what its cells are made of and measured with."""

    def __init__(self, grid: Grid, subject: Subject) -> None:
        config, params = load_hf(subject.folder, grid.dtype or None)
        self.grid, self.subject, self.original = grid, subject, Model(params, config)
        self.reference = Reference.keeping(self.original, subject.windows, grid.reference_mib)

    def calibrated(self, calibration: Calibration) -> Stats:
        """Statistics for all methods that use this sample, from disk if they are there."""
        subject = self.subject
        key, path = subject.statistics_key(calibration), subject.statistics_path(calibration)
        if (stats := Stats.load_if_same(path, key)) is not None:
            return stats
        return calibrate_domains(
            *self.original,
            subject.batches(calibration),
            subject.samples[calibration].measurement,
            save_as=path,
            digest=key,
        )

    def cell(self, cell: Cell, stats: Stats, work: Path) -> dict[str, Any]:
        """Makes and measures a cell; what a training leaves on its way goes to ``work``."""
        start, model, seed = time.perf_counter(), self.original, cell.calibration.seed
        text = self.grid.training
        per_step = text.batch_size * text.seq_len
        *_, last = stages = self.subject.cells[cell]
        first_plan, steps = Plan({}), 0
        curve: list[dict[str, Any]] = []
        found: dict[str, Any] = {}
        rounding = last.quantize
        for n, stage in enumerate(stages):
            if stage.cut is not None:
                own = stats if model is self.original else None
                plan, model = self._cut(model, stage.cut, cell.calibration, own)
                first_plan = first_plan if first_plan.layers else plan
            if stage.distill is None:
                continue
            batches = training_dataset(text, self.subject.tokenizer, seed=seed, start=steps)
            if self.grid.marks and stage is last:
                found = self._course(model, batches, stage.distill)
                steps += stage.distill.steps
                break
            run = TrainingRun(work / str(n), description=cell.method)
            trained = train(*model, batches, stage.distill, run, self.original)
            for record in read_metrics(work / str(n) / "metrics.jsonl"):
                curve.append({"tokens": (steps + record["step"]) * per_step, "lm": record["lm"]})
            model = self._computable(Model(trained, model.config))
            steps += stage.distill.steps
        if rounding is not None:
            model = Model(quantized(*model, rounding), model.config)
            found = self.measured(model)
            found["bytes"] = stored_bytes(model.config, rounding, self.subject.item_bytes)
        return {
            **(found or self.measured(model)),
            "training_tokens": steps * per_step,
            "curve": curve,
            "calibration": {"tokens": stats.tokens, "sequences": stats.sequences},
            "layers": _fates(first_plan, self.original.config),
            "dropped_layers": list(first_plan.dropped_layers),
            "seconds": round(time.perf_counter() - start, 3),
        }

    def _cut(
        self, model: Model, cut: Cut, calibration: Calibration, stats: Stats | None
    ) -> tuple[Plan, Model]:
        """By the functions that a run cuts by; without statistics, they are made of the model."""
        sample, batches = self.subject.samples[calibration], self.subject.batches(calibration)
        if cut.sequential:
            bound = sample.settings.second_moment_bytes or None
            by_layer = LayerMeasurement(second_moment_bytes=bound)
            found = sequential_cut(*model, batches, cut, by_layer)
            return found.plan, Model(found.params, found.config)
        if stats is None:
            asked = sample.measurement_for((cut,), self.original)
            stats = calibrate_domains(*model, batches, asked)
        params, config = model
        plan = plan_cut(cut, stats, config, seed=sample.seed, params=params).plan
        config, params = apply_plan(params, config, plan, stats)
        if cut.refit:
            text = self.subject.refit_batches(calibration, cut)
            params = refit(model, Model(params, config), text)
        return plan, Model(params, config)

    def _course(self, model: Model, batches: Any, settings: TrainSettings) -> dict[str, Any]:
        """The model after the longest training, and the losses after each length."""
        marks = sorted({max(1, round(settings.steps * mark)) for mark in self.grid.marks})
        per_step = self.grid.training.batch_size * self.grid.training.seq_len
        measured = self.measured(model)
        points = [{**measured["evaluation"]["mean"], "tokens": 0}]
        lengths = course(model, self.original, batches, settings, marks, self.grid.cooldown)
        for step, params in lengths:
            measured = self.measured(self._computable(Model(params, model.config)))
            points.append({**measured["evaluation"]["mean"], "tokens": step * per_step})
        return measured | {"course": points}

    def _computable(self, model: Model) -> Model:
        """In the dtype of computation: training leaves float32."""
        dtype = self.original.params["embed"]["embedding"].dtype
        leaves = leaves_like(model.params, model.config)
        return Model(cast_params(model.params, leaves, dtype), model.config)

    def measured(self, model: Model) -> dict[str, Any]:
        """Size, held-out losses and tasks of a model."""
        subject, original = self.subject, self.original.config
        counts = count_params(model.config)
        widest = max(original.moe(i).expert_width for i in original.moe_layers)
        model = Model(*canonical(*model, widest))
        losses = evaluate(*model, subject.windows, reference=self.reference, with_speed=False)
        facts: dict[str, Any] = {
            "parameters": vars(counts),
            "bytes": counts.total * subject.item_bytes,
            "evaluation": losses.to_dict(),
        }
        if subject.tasks is not None:
            settings = TaskSettings(limit=self.grid.limit or None)
            found = evaluate_tasks(*model, subject.tokenizer, subject.tasks, settings)
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
        part["router"] = jax.tree.map(lambda rows, o=order: rows[..., o], part["router"])
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
