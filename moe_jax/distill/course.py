"""Trainings of several lengths, which share all but the end of their schedules."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.distill.settings import TrainSettings
from moe_jax.distill.step import arranged, initial_state, make_step, result_of
from moe_jax.params import Model

_step_function = functools.cache(make_step)  # students of one shape share their programs


def course(
    student: Model,
    teacher: Model,
    batches: Iterable[Mapping[str, Any]],
    settings: TrainSettings,
    marks: Sequence[int],
    cooldown: float,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Weights after trainings of several lengths.

    What a decaying learning rate leaves halfway is worse than a training of half the length. Here
    the rate is constant after the warm-up, and the last ``cooldown`` of every training branches off
    with a cosine decay. Each result is that of a training of so many steps and no others.

    Args:
        student, teacher: weights and configuration.
        batches: the training stream; all trainings see the same text.
        settings: but for ``steps``.
        marks: lengths in steps, ascending.
        cooldown: share of each length.

    Raises:
        FloatingPointError: a loss or gradient was not finite.
    """
    params, config = student
    state, frozen = initial_state(params, config, settings)
    reference = arranged(*teacher, settings)
    text = list(itertools.islice(batches, marks[-1]))

    def advance(state: Any, first: int, last: int, **schedule: Any) -> Any:
        how = dataclasses.replace(settings, seed=0, **schedule)  # the state holds the seed
        step = _step_function(config, how, teacher[1])
        for batch in text[first:last]:
            state, metrics = step(state, frozen, reference, batch)
        if first < last and int(metrics["broken_step"]):
            raise FloatingPointError(
                f"the loss of step {int(metrics['broken_step'])} is not finite"
            )
        return state

    done = 0
    for mark in marks:
        turn = mark - round(cooldown * mark)
        state = advance(state, done, turn, final_fraction=1.0)
        done = turn
        branch = jax.tree.map(jnp.copy, state)  # a step donates what it is given
        branch = advance(branch, turn, mark, steps=mark, warmup_steps=turn)
        yield mark, result_of(branch, frozen)
