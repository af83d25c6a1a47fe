"""The training loop: steps, checkpoints, numbers, and ways to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from moe_jax.checkpoint import TrainingCheckpoints
from moe_jax.config import ModelConfig
from moe_jax.distill.settings import TrainSettings
from moe_jax.distill.step import arranged, initial_state, make_step, result_of
from moe_jax.interruption import Interruption, Stopped
from moe_jax.metrics import MetricsWriter, progress_bar
from moe_jax.processes import any_of, is_writer, mesh_of, on_mesh_of, place_batch


@dataclass(frozen=True)
class TrainingRun:
    """Where a training keeps what it makes, and what it tells of itself.

    Attributes:
        folder: receives ``checkpoints/`` and ``metrics.jsonl``.
        facts: what decides the result beside the settings, as JSON values; kept in the checkpoints.
        tracking: ``tensorboard`` and ``wandb_project`` of ``metrics.MetricsWriter``.
        description: stands before the progress bar.
    """

    folder: str | Path
    facts: Mapping[str, Any] = field(default_factory=dict)
    tracking: Mapping[str, Any] = field(default_factory=dict)
    description: str = "train"


def train(
    params: dict[str, Any],
    config: ModelConfig,
    dataset: grain.IterDataset,
    settings: TrainSettings,
    run: TrainingRun,
    teacher: tuple[dict[str, Any], ModelConfig] | None = None,
) -> dict[str, Any]:
    """Trains for ``settings.steps`` steps, going on from the last checkpoint in the run's folder.

    Killed at any moment and called again with the same arguments, it ends with the same bits (on
    CPU) as if it had never stopped: every step is a function of the state, the position in the
    data and ``settings.seed``. SIGTERM of any process finishes the step, saves and raises
    ``Stopped``.

    Args:
        params, config: the student; a resumed run takes its checkpoint's trained weights. Where
            they lie on a mesh, batches are split over its axes ``data`` and ``fsdp``.
        dataset: see ``data.training_dataset``; its position is part of the checkpoint. Batches
            from ``data.teacher_cache`` bring the teacher's predictions with them.
        teacher: live teacher, run in the same jitted step; where it lies must go with ``params``.

    Returns:
        The weights: trained ones in float32, others as they were.

    Raises:
        FloatingPointError: a loss or gradient was not finite; the last good checkpoint stays.
        ValueError: student and teacher do not go together, or the checkpoint in the folder was
            made with other settings (named).
        OSError: a checkpoint cannot be written; the one before it stays.
        Stopped: by SIGTERM, after a checkpoint.
    """
    settings.check_models(config, teacher[1] if teacher else None, _cached_ids(dataset))
    state, frozen = initial_state(params, config, settings)
    advance = _advance(params, config, settings, teacher, state, frozen)
    about = {**settings.facts(), **run.facts}
    iterator = iter(dataset)
    with (
        Interruption() as interruption,
        TrainingCheckpoints(Path(run.folder) / "checkpoints") as checkpoints,
    ):
        restored = checkpoints.restore(state, about)
        if restored is not None:
            state, position = restored
            iterator.set_state(position)
        start = saved = int(state["step"])
        with (
            _metrics_writer(run, start) as writer,
            progress_bar(settings.steps, run.description, "step", start) as bar,
        ):
            recorder = _Recorder(writer, bar, start)
            for step in range(start + 1, settings.steps + 1):
                batch = next(iterator)
                state, metrics = advance(state, batch)
                recorder.add(step, metrics, batch, record=step % settings.log_every == 0)
                stop = any_of(interruption.requested) and step < settings.steps
                if step % settings.checkpoint_every == 0 or step == settings.steps or stop:
                    recorder.check(metrics)
                    recorder.flush()  # or a kill after the checkpoint would lose the numbers
                    checkpoints.save(step, state, iterator.get_state(), about)
                    saved = step
                if stop:
                    interruption.obeyed = True
                    break
            recorder.flush()
    if saved < settings.steps:
        raise Stopped(
            f"stopped after step {saved} of {settings.steps}, saved in {run.folder}; run it again"
        )
    return result_of(state, frozen)


def _cached_ids(dataset: grain.IterDataset) -> int | None:
    """How many of a teacher's predictions a batch brings for each token; None: no cache."""
    predictions = next(iter(dataset)).get("teacher_ids")
    return None if predictions is None else predictions.shape[-1]


def _advance(
    params: dict[str, Any],
    config: ModelConfig,
    settings: TrainSettings,
    teacher: tuple[dict[str, Any], ModelConfig] | None,
    state: dict[str, Any],
    frozen: Any,
) -> Callable[[dict[str, Any], Any], tuple[dict[str, Any], dict[str, jax.Array]]]:
    """``(state, batch) -> (state, metrics)``: a step, where the weights lie."""
    mesh = mesh_of(params)
    teacher = teacher if settings.needs_teacher else None
    teacher_params = arranged(*teacher, settings) if teacher else None
    step = make_step(
        config, settings, teacher[1] if teacher else None, None if mesh is None else state
    )

    def advance(state, batch):
        placed = place_batch(batch, mesh)
        with on_mesh_of(params):
            return step(state, frozen, teacher_params, placed)

    return advance


def _metrics_writer(run: TrainingRun, start: int) -> AbstractContextManager[MetricsWriter | None]:
    """The file of numbers, after the records of later steps are dropped; one process has it."""
    if not is_writer():
        return nullcontext()
    return MetricsWriter(run.folder, after_step=start, **run.tracking)


class _Recorder:
    """Writes a step's numbers once the next step is under way, so that logging never waits."""

    def __init__(self, writer: MetricsWriter | None, bar: Any, start: int) -> None:
        self._writer, self._bar = writer, bar
        self._pending: tuple[int, dict[str, jax.Array], int] | None = None
        self._tokens = 0
        self._since = time.perf_counter()
        self._first = start + 1

    def add(self, step: int, metrics: dict[str, jax.Array], batch, record: bool) -> None:
        if self._pending is not None:
            self.flush()
        if step == self._first + 1:  # compilation is no speed
            self._tokens, self._since = 0, time.perf_counter()
        self._tokens += int(np.count_nonzero(batch["segment_ids"]))
        self._bar.update()
        if record or step == 1:
            self._pending = (step, metrics, self._tokens)

    def flush(self) -> None:
        """Writes what waits; raises FloatingPointError if something broke."""
        if self._pending is None:
            return
        step, metrics, tokens = self._pending
        self._pending = None
        values = self.check(metrics)
        del values["broken_step"]
        elapsed = time.perf_counter() - self._since
        speed = tokens / elapsed
        if step == self._first:
            self._bar.set_postfix(loss=f"{values['loss']:.3f}")
        else:
            self._bar.set_postfix(loss=f"{values['loss']:.3f}", tokens_per_s=f"{speed:,.0f}")
            values["tokens_per_second"] = speed
        if self._writer is not None:
            self._writer.write(step, **values)
        self._tokens -= tokens
        self._since = time.perf_counter()

    def check(self, metrics: dict[str, jax.Array]) -> dict[str, float]:
        """The numbers of a step; raises FloatingPointError if one so far was not finite."""
        values = {name: float(value) for name, value in metrics.items()}
        broken = int(values["broken_step"])
        if broken:
            raise FloatingPointError(
                f"the loss or the gradient of step {broken} is not finite; the last checkpoint "
                "before it is kept. A lower learning rate or a longer warm-up usually helps"
            )
        return values
