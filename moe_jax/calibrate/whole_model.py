"""The pass over calibration batches with the whole model at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.calibrate.gradients import Objective, expert_pulls, mask_gradients
from moe_jax.calibrate.measurement import (
    Measurement,
    RunningSum,
    SlicedSum,
    check_batch,
    warn_unreached,
)
from moe_jax.calibrate.memory import MomentPlan
from moe_jax.calibrate.sums import State, batch_sums
from moe_jax.config import ModelConfig
from moe_jax.metrics import progress_bar
from moe_jax.processes import gather, mesh_of, on_mesh_of, place_batch
from moe_jax.statistics import Stats
from moe_jax.statistics_table import spread


def calibrate(
    params: dict[str, Any],
    config: ModelConfig,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    importance: Sequence[str] = (),
    teacher: tuple[dict[str, Any], ModelConfig] | None = None,
    top_k: int = 8,
    second_moments: bool | Sequence[int] | MomentPlan = False,
    second_moment_bytes: int | None = None,
    attention_moments: bool = False,
    shared_moments: bool = False,
    slices: int = 1,
    seed: int = 0,
    backend: str = "auto",
    facts: dict[str, Any] | None = None,
    description: str = "calibrate",
    warn: bool = True,
) -> Stats:
    """Statistics of every layer over ``batches``, padding left out.

    Args:
        params, config: the model to measure.
        batches: ``{"tokens": Int[B, S], "mask": Bool[B, S]}``, all of one shape.
        importance, teacher, top_k, second_moments, second_moment_bytes, attention_moments,
            shared_moments, slices, seed, backend: what is measured, see ``Measurement``.
        facts: kept with the result.
        description: stands before the progress bar.
        warn: log the names of the experts that no token reached.

    Returns:
        Mergeable sums.

    Raises:
        ValueError: no batch or slice, batches that are not such arrays, all padding, an unknown
            loss, token ids outside the vocabulary, teacher and model with different vocabularies,
            second moments that do not fit in memory, or NaN in the result (named).
    """
    measurement = Measurement(
        importance, teacher, top_k, second_moments, second_moment_bytes, attention_moments,
        shared_moments, slices, seed, backend,
    )  # fmt: skip
    measurement.check(params, config)
    stats = measure_text(params, config, batches, measurement, description)
    if warn:
        warn_unreached(stats)
    return dataclasses.replace(stats, facts=dict(facts or {}))


def measure_text(
    params: dict[str, Any],
    config: ModelConfig,
    batches: Iterable[dict[str, np.ndarray]],
    measurement: Measurement,
    description: str,
) -> Stats:
    """``calibrate`` for a measurement that was checked."""
    moments = measurement.moment_plan(config)
    if len(moments.passes) > 1:
        batches = list(batches)  # read again for each pass
    total = SlicedSum(measurement.slices)
    mesh = mesh_of(params)
    for count, batch in enumerate(_shown(batches, description)):
        check_batch(batch, config.vocab_size)
        placed = place_batch(batch, mesh)
        new = batch_sums(params, config, placed, measurement.backend, moments.wanted(0))
        _add_gradients(new, params, config, placed, measurement, count + 1)
        total.add(new, batch["mask"])
        del new  # before those of the next batch are made
    stats = total.stats(config, dict(enumerate(params["layers"])))
    total.whole.state = None
    for n in range(1, len(moments.passes)):
        moved = RunningSum()
        for batch in _shown(batches, f"{description}, pass {n + 1} of {len(moments.passes)}"):
            placed = place_batch(batch, mesh)
            new = batch_sums(params, config, placed, measurement.backend, moments.wanted(n))
            moved.add(new, batch["mask"])
            del new
        experts, attention, _ = moved.sums
        for i, arrays in experts.items():
            stats.layers[i] |= spread(gather(arrays), config, i)
        for i, arrays in attention.items():
            stats.attention[i] |= gather(arrays)
    stats.check_finite()
    return stats


def _add_gradients(
    new: State, params, config: ModelConfig, batch, measurement: Measurement, count: int
) -> None:
    """Adds the gradients of every loss asked for to the sums of a batch, the ``count``-th."""
    teacher_params, teacher_config = measurement.teacher or (params, config)
    rng = jax.random.fold_in(jax.random.key(measurement.seed), count)
    for loss in measurement.importance:
        if loss == "rerouting":
            with on_mesh_of(params):
                pulls = expert_pulls(params, config, batch, measurement.backend)
            for i, arrays in pulls.items():
                new[0][i] |= arrays
            continue
        objective = Objective(
            config,
            teacher_config,
            loss,  # type: ignore[arg-type]  # checked in Measurement
            measurement.top_k,
            measurement.backend,
        )
        with on_mesh_of(params):
            gradients = mask_gradients(params, teacher_params, batch, rng, objective)
        for target, by_layer in zip(new[:2], gradients, strict=True):
            for i, arrays in by_layer.items():
                target[i] |= {f"{loss}.{name}": array for name, array in arrays.items()}


def _shown(
    batches: Iterable[dict[str, np.ndarray]], description: str
) -> Iterator[dict[str, np.ndarray]]:
    """Batches under a progress bar."""
    length = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    with progress_bar(None, description, "tok") as bar:
        for count, batch in enumerate(batches, 1):
            yield batch
            bar.update(int(np.count_nonzero(batch["mask"])))
            bar.set_postfix(batch=f"{count}/{length}" if length else str(count))
