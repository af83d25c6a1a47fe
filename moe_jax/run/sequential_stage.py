"""A sequential stage of a run: its cut, and the files that it leaves and reuses."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.checkpoint import load_params, save_params
from moe_jax.files import write_json
from moe_jax.identity import digest
from moe_jax.params import Model
from moe_jax.plan import Plan, planned_config, read_plan
from moe_jax.prune.sequential import sequential_cut
from moe_jax.run.job import Job
from moe_jax.run.store import Steps
from moe_jax.statistics import Stats


def cut_in_turn(
    job: Job, steps: Steps, i: int, model: Model, key: str
) -> tuple[Model, Stats, Any, str]:
    """The cut of a sequential stage, or what is on disk of it.

    Second moments are not kept, so that the weights cannot be made of statistics and plan again:
    they are saved, too.

    Args:
        job, steps, i, model, key: as of ``run.stages``.

    Returns:
        The smaller model, statistics, plan, and the digest of all that they depend on.

    Raises:
        ValueError: the plan's file was changed by hand since.
    """
    cut = job.plans.get(i) or job.run.stages[i].cut
    assert cut is not None
    asked = cut.to_json() if isinstance(cut, Plan) else cut.given()
    name = digest(key, job.calibration_text, asked)
    statistics = steps.folder / "statistics" / f"{i}-{name}"
    plan_file = steps.folder / "plans" / f"{i}-{name}.json"
    weights = steps.folder / "cuts" / f"{i}-{name}"
    stats = Stats.load_if_same(statistics, name)
    if stats is None or not plan_file.exists() or not weights.exists():
        with steps.timed(f"stage {i}: calibrate and cut layer by layer"):
            bound = job.run.calibration.second_moment_bytes or None
            found = sequential_cut(
                *model, job.domains, cut, second_moment_bytes=bound, dtype=job.dtype
            )
            save_params(weights, found.params, replace=True)
            write_json(plan_file, json.loads(found.plan.to_json()))
            facts = {**found.stats.facts, "digest": name, "plan": digest(found.plan.to_json())}
            stats = dataclasses.replace(found.stats, facts=facts)
            stats.save(statistics)
        smaller = Model(found.params, found.config)
        return smaller, stats, found.plan, digest(name, found.plan.to_json())
    plan = read_plan(plan_file)
    if digest(plan.to_json()) != stats.facts["plan"]:
        raise ValueError(
            f"{plan_file} was changed, but the weights in {weights} are of the plan as it was; "
            "apply the changed one with a stage {'plan': ...}, or delete it to cut again"
        )
    config = planned_config(model.config, plan)
    params = jax.tree.map(jnp.asarray, load_params(weights, config, job.mesh))
    return Model(params, config), stats, plan, digest(name, plan.to_json())
