"""The training loop: steps, checkpoints, numbers, and ways to stop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.checkpoint import TrainingCheckpoints
from moe_jax.config import ModelConfig
from moe_jax.distill.interruption import Interruption, Stopped
from moe_jax.distill.settings import TrainSettings
from moe_jax.distill.step import (
    BATCH_AXES,
    arranged,
    initial_state,
    make_step,
    result_of,
    state_shardings,
)
from moe_jax.metrics import MetricsWriter, progress_bar


def train(
    params: dict[str, Any],
    config: ModelConfig,
    dataset: grain.IterDataset,
    settings: TrainSettings,
    folder: str | Path,
    *,
    teacher: tuple[dict[str, Any], ModelConfig] | None = None,
    mesh: Mesh | None = None,
    facts: Mapping[str, Any] | None = None,
    tracking: Mapping[str, Any] | None = None,
    description: str = "train",
) -> dict[str, Any]:
    """Trains for ``settings.steps`` steps, going on from the last checkpoint in ``folder``.

    Killed at any moment and called again with the same arguments, it ends with the same bits (on
    CPU) as if it had never stopped: every step is a function of the state, the position in the
    data and ``settings.seed``. SIGTERM finishes the step, saves and raises ``Stopped``.

    Args:
        params, config: the student; a resumed run takes its checkpoint's trained weights.
        dataset: see ``data.training_dataset``; its position is part of the checkpoint. Batches
            from ``data.teacher_cache`` bring the teacher's predictions with them.
        settings: how.
        folder: receives ``checkpoints/`` and ``metrics.jsonl``.
        teacher: live teacher, run in the same jitted step.
        mesh: where to run; batches are split over its axes ``data`` and ``fsdp``.
        facts: what else decides the result, as JSON values; kept in the checkpoints.
        tracking: ``tensorboard`` and ``wandb_project`` of ``metrics.MetricsWriter``.
        description: stands before the progress bar.

    Returns:
        The weights: trained ones in float32, others as they were.

    Raises:
        FloatingPointError: a loss or gradient was not finite; the last good checkpoint stays.
        ValueError: student and teacher do not go together, or the checkpoint in ``folder`` was
            made with other settings (named).
        OSError: a checkpoint cannot be written; the one before it stays.
        Stopped: by SIGTERM, after a checkpoint.
    """
    predictions = next(iter(dataset)).get("teacher_ids")
    cached = None if predictions is None else predictions.shape[-1]
    settings.check_models(config, teacher[1] if teacher else None, cached)
    state, frozen = initial_state(params, config, settings, mesh)
    teacher_config = teacher[1] if teacher and settings.needs_teacher else None
    teacher_params = (
        arranged(teacher[0], teacher[1], settings, mesh) if teacher and teacher_config else None
    )
    shardings = None if mesh is None else state_shardings(state, config, settings, mesh)
    step_function = make_step(config, settings, teacher_config, shardings)
    about = {**settings.facts(), **(facts or {})}
    iterator = iter(dataset)
    with (
        Interruption() as interruption,
        TrainingCheckpoints(Path(folder) / "checkpoints") as checkpoints,
    ):
        restored = checkpoints.restore(state, about)
        if restored is not None:
            state, position = restored
            iterator.set_state(position)
        start = int(state["step"])
        saved = start
        with (
            MetricsWriter(folder, after_step=start, **(tracking or {})) as writer,
            progress_bar(settings.steps, description, "step", start) as bar,
        ):
            recorder = _Recorder(writer, bar, start)
            for step in range(start + 1, settings.steps + 1):
                batch = next(iterator)
                state, metrics = step_function(state, frozen, teacher_params, on_mesh(batch, mesh))
                recorder.add(step, metrics, batch, record=step % settings.log_every == 0)
                stop = interruption.requested and step < settings.steps
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
        raise Stopped(saved, settings.steps, folder)
    return result_of(state, frozen)


def on_mesh(batch: dict[str, np.ndarray], mesh: Mesh | None) -> dict[str, Any]:
    """This process's rows of a batch as its part of the global one."""
    if mesh is None:
        return batch
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


class _Recorder:
    """Writes a step's numbers once the next step is under way, so that logging never waits."""

    def __init__(self, writer: MetricsWriter, bar: Any, start: int) -> None:
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
        self._tokens += int(np.count_nonzero(batch["segment_ids"])) * jax.process_count()
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
