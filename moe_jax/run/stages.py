"""The steps of a stage: measure, plan, cut, train, evaluate. Each leaves a file and reuses it."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.calibrate import (
    LayerMeasurement,
    Measurement,
    calibrate_domains,
    calibrate_layerwise,
)
from moe_jax.checkpoint import check_same, load_params, save_params
from moe_jax.config import ModelConfig
from moe_jax.distill import TrainingRun, TrainSettings, train
from moe_jax.evaluate import Evaluation, evaluate
from moe_jax.files import write_json
from moe_jax.identity import digest
from moe_jax.layer_store import LayerStore
from moe_jax.lineage import Lineage
from moe_jax.metrics import read_metrics
from moe_jax.params import Model, cast_params, leaves_like
from moe_jax.plan import (
    Plan,
    cut_scores,
    mesh_cost,
    parse_plan,
    plan_cut,
    planned_config,
    read_plan,
    validate_plan,
)
from moe_jax.processes import agree, is_writer, spec_tree
from moe_jax.prune import apply_plan, cut_in_turn, refit, refit_in_turn
from moe_jax.prune.sequential import sequential_cut
from moe_jax.report import check_report, plain
from moe_jax.report.facts import Stage, Training
from moe_jax.run.describe import Ranking, describe_stage, describe_training
from moe_jax.run.job import Job, needs_statistics
from moe_jax.run.store import DONE, Steps, training_folder
from moe_jax.statistics import Stats
from moe_jax.stored import in_turn

Scores = Mapping[int, np.ndarray]
_logger = logging.getLogger(__name__)


def run_stages(
    job: Job, steps: Steps, model: Model, original: Model, key: str
) -> tuple[Model, Lineage, str, list[Stage]]:
    """Carries out every stage, or what is left of it to do.

    What a step needs beside the model, such as second moments, is let go when it ends: at most the
    original, the model and what the step makes of it are held at a time.

    Args:
        job: the run.
        steps: what is done already.
        model: what the first stage starts from.
        original: what trainings learn from.
        key: digest of all that ``model`` depends on.

    Returns:
        The model that the last stage leaves, where it comes from, the digest of all that it depends
        on, and what the report says of each stage.
    """
    reports, lineage = [], Lineage.of(model.config)
    for i, stage in enumerate(job.run.stages):
        model, plan, key, report = _cut(job, steps, i, model, original, key)
        lineage = lineage if plan is None else lineage.after(plan, model.config)
        evaluations: dict[str, Any] = {}
        if stage.distill:
            if stage.cuts and job.windows is not None:
                evaluations["cut"] = _evaluated(job, steps, i, "cut", model, original, key)
            settings = stage.distill
            model, key, report["training"] = _trained(job, steps, i, settings, model, original, key)
            lineage = lineage.changed(stage.distill.trained_parts)
        last = i == len(job.run.stages) - 1
        if job.run.trains and not last and job.windows is not None:
            name = "trained" if stage.distill else "cut"
            evaluations[name] = _evaluated(job, steps, i, name, model, original, key)
        if evaluations:
            report["evaluation"] = evaluations  # type: ignore[typeddict-item]
        reports.append(report)
    return model, lineage, key, reports


def _cut(
    job: Job, steps: Steps, i: int, model: Model, original: Model, key: str
) -> tuple[Model, Plan | None, str, Stage]:
    """The model after a stage's cut, its plan, the digest of both, and the cut's report."""
    stage = job.run.stages[i]
    if not stage.cuts:
        return model, None, key, _described(job, steps, i, Ranking(), model, model.config, key)
    if job.goes_in_turn(i):
        smaller, stats, plan, key = _cut_in_turn(job, steps, i, model, key)
        costs = {n: a["removal_cost"] for n, a in stats.layers.items() if "removal_cost" in a}
        ranking = Ranking(plan, stats, costs)
    else:
        measured, plan, scores, key = _planned(job, steps, i, model, original, key)
        ranking = Ranking(plan, measured, scores)
    if job.mesh is not None:  # padding to the widest expert is known only now
        spec_tree(planned_config(model.config, plan), job.mesh)
    if not job.goes_in_turn(i):
        with steps.timed(f"stage {i}: prune"):
            if job.layerwise:
                store = LayerStore(steps.folder / "cuts" / f"{i}-{key}")
                config = planned_config(model.config, plan)
                first = next(n for n in range(config.num_layers + 1) if not store.has(n))
                cut = cut_in_turn(*model, plan, ranking.stats, first)
                smaller = _stored(model, config, store, cut)
            else:
                config, params = apply_plan(*model, plan, ranking.stats)
                smaller = Model(params, config)
        if plan.settings.get("refit"):
            smaller = _refitted(job, steps, i, plan, model, smaller, key)
    return smaller, plan, key, _described(job, steps, i, ranking, model, smaller.config, key)


def _refitted(
    job: Job, steps: Steps, i: int, plan: Plan, model: Model, cut: Model, key: str
) -> Model:
    """The model after its plan's refit, from disk if it is there: statistics do not give it."""
    name = digest(key, job.calibration_text, *_mode(job))
    weights = steps.folder / "cuts" / f"{i}-{name}"
    if job.layerwise:
        with steps.timed(f"stage {i}: refit"):
            store = LayerStore(weights)
            first = next(n for n in range(cut.config.num_layers + 1) if not store.has(n))
            layers: Any = ()
            if first < cut.config.num_layers:
                stream = weights / "stream"
                layers = refit_in_turn(model, cut, job.refit_batches(plan), folder=stream)
            found = _stored(cut, cut.config, store, layers)
            shutil.rmtree(weights / "stream", ignore_errors=True)  # if killed before it was gone
            return found
    if not agree(weights.exists()):
        with steps.timed(f"stage {i}: refit"):
            model = _computable(job, i, model)
            save_params(weights, refit(model, cut, job.refit_batches(plan)), replace=True)
    params = load_params(weights, cut.config, job.mesh)
    return cut._replace(params=jax.tree.map(jnp.asarray, params))


def _mode(job: Job) -> list[str]:
    """What tells files of a run layer by layer from those of one in memory, of other bits."""
    return ["layerwise"] if job.layerwise else []


def _stored(
    model: Model,
    config: ModelConfig,
    store: LayerStore,
    layers: Iterable[tuple[int, dict[str, Any]]],
) -> Model:
    """A model as ``model`` is, but for its layers: those in ``store``, once ``layers`` are, too."""
    for n, weights in layers:
        store.write(n, weights)
        del weights  # before the next one is made
    return Model({**model.params, "layers": store.layers(config.num_layers)}, config)


def _planned(
    job: Job, steps: Steps, i: int, model: Model, original: Model, key: str
) -> tuple[Stats | None, Plan, Scores | None, str]:
    """Statistics, plan, its scores (None if it came from disk), digest of what a stage leaves."""
    stage, config = job.run.stages[i], model.config
    if i in job.plans:
        plan = job.plans[i]
        stats = _measured(job, steps, i, model, original, key) if needs_statistics(plan) else None
        measured = stats.facts["digest"] if stats else ""
        return stats, plan, {}, digest(key, plan.to_json(), measured)
    stats = _measured(job, steps, i, model, original, key)
    new_key = digest(key, stage.removes, stats.facts["digest"])
    name = f"plans/{i}-{new_key}.json"

    def read(text: str) -> Plan:
        plan = parse_plan(text, steps.folder / name)
        validate_plan(plan, config)
        return plan

    scores: list[Scores] = []

    def make() -> Any:
        assert stage.cut is not None  # a stage that removes has a cut, unless it has a plan
        params = in_turn(model.params)
        planned = plan_cut(stage.cut, stats, config, seed=job.run.seed, params=params)
        scores.append(planned.scores)
        if cost := mesh_cost(stage.cut, planned, stats, config):
            _logger.info("stage %d: %s", i, cost)
        return json.loads(planned.plan.to_json())

    plan = steps.cached_json(f"stage {i}: plan", name, read, make)
    return stats, plan, scores[0] if scores else None, digest(new_key, plan.to_json())


def _cut_in_turn(
    job: Job, steps: Steps, i: int, model: Model, key: str
) -> tuple[Model, Stats, Any, str]:
    """The cut of a sequential stage, or what is on disk of it.

    Second moments are not kept, so that the weights cannot be made of statistics and plan again:
    they are saved, too.

    Returns:
        The smaller model, statistics, plan, and the digest of all that they depend on.

    Raises:
        ValueError: the plan's file was changed by hand since.
    """
    cut = job.plans.get(i) or job.run.stages[i].cut
    assert cut is not None  # as ``Job.goes_in_turn`` says of the stage
    asked = cut.to_json() if isinstance(cut, Plan) else cut.given()
    name = digest(key, job.calibration_text, asked, *_mode(job))
    statistics = steps.folder / "statistics" / f"{i}-{name}"
    plan_file = steps.folder / "plans" / f"{i}-{name}.json"
    weights = steps.folder / "cuts" / f"{i}-{name}"
    stats = Stats.load_if_same(statistics, name)
    store = LayerStore(weights) if job.layerwise else None
    if stats is None or not plan_file.exists() or not weights.exists():
        with steps.timed(f"stage {i}: calibrate and cut layer by layer"):
            bound = job.run.calibration.second_moment_bytes or None
            measurement = LayerMeasurement(second_moment_bytes=bound, dtype=job.dtype)
            found = sequential_cut(*model, job.domains, cut, measurement, store=store)
            if store is None:
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
    if store is not None:
        smaller = _stored(model, config, store, ())
        return smaller, stats, plan, digest(name, plan.to_json())
    params = jax.tree.map(jnp.asarray, load_params(weights, config, job.mesh))
    return Model(params, config), stats, plan, digest(name, plan.to_json())


def _described(
    job: Job,
    steps: Steps,
    i: int,
    ranking: Ranking,
    model: Model,
    after: ModelConfig,
    key: str,
) -> Stage:
    """What the report says of a stage's cut, from disk if it is there.

    Scores are taken as the plan used them; they are made again only if the plan came from disk but
    its description is gone.
    """
    stage, seed = job.run.stages[i], job.run.seed

    def read(text: str) -> Stage:
        facts = json.loads(text)
        check_report({"stages": [facts]})
        return facts

    def make() -> Any:
        found = ranking
        if found.scores is None and found.stats is not None and stage.cut is not None:
            params = in_turn(model.params)
            scores = cut_scores(stage.cut, found.stats, model.config, seed=seed, params=params)
            found = dataclasses.replace(found, scores=scores)
        sequences = job.run.calibration.num_sequences
        return plain(describe_stage(stage, found, model.config, after, seed, sequences))

    if not stage.cuts:
        return make()
    return steps.cached_json(f"stage {i}: describe", f"facts/{i}-{key}.json", read, make, True)


def _measured(job: Job, steps: Steps, i: int, model: Model, original: Model, key: str) -> Stats:
    """Statistics of the current model, from disk if they are there."""
    losses = job.run.stages[i].losses
    second_moments = job.needs_second_moments(i)
    attention_moments = job.needs_attention_moments(i)
    shared_moments = job.needs_shared_moments(i) and not job.goes_in_turn(i)
    more = ["attention"] * attention_moments + ["shared"] * shared_moments
    more += _mode(job)
    name = digest(key, job.calibration_text, losses, job.teacher_digest, second_moments, *more)
    measurement = Measurement(
        losses,
        original,
        second_moments=second_moments,
        second_moment_bytes=job.run.calibration.second_moment_bytes or None,
        attention_moments=attention_moments,
        shared_moments=shared_moments,
        seed=job.run.seed,
    )
    save_as = job.folder / "statistics" / f"{i}-{name}"
    with steps.timed(f"stage {i}: calibrate"):
        if job.layerwise:
            return calibrate_layerwise(
                *model, job.domains, measurement, save_as=save_as, digest=name, dtype=job.dtype
            )
        model = _computable(job, i, model)
        return calibrate_domains(*model, job.domains, measurement, save_as=save_as, digest=name)


def _computable(job: Job, stages: int, model: Model) -> Model:
    """The model after so many stages in the dtype of computation: training leaves float32."""
    if not any(stage.distill for stage in job.run.stages[:stages]):
        return model
    leaves = leaves_like(model.params, model.config)
    return model._replace(params=cast_params(model.params, leaves, job.dtype))


def _trained(
    job: Job,
    steps: Steps,
    i: int,
    settings: TrainSettings,
    model: Model,
    original: Model,
    key: str,
) -> tuple[Model, str, Training]:
    """The model after the stage's training, its digest, and the training as the report tells it.

    While it runs, its folder holds checkpoints; once it is done, the weights alone.
    """
    params, config = model
    folder = training_folder(job.folder, i)
    facts = {**job.training_facts(i), "start": key}
    about = {**settings.facts(), **facts}
    new_key = digest(key, about)
    done = folder / DONE
    if agree(done.is_file()):
        check_same(json.loads(done.read_text()), about, folder)
        _logger.info("stage %d: training taken from %s", i, folder)
    else:
        with steps.timed(f"stage {i}: distill"):
            params = train(
                params,
                config,
                job.training_batches(i),
                settings,
                TrainingRun(
                    folder, facts, dataclasses.asdict(job.run.tracking), f"stage {i}: distill"
                ),
                teacher=None if job.teacher_cache is not None else original,
            )
            if is_writer():
                for leftover in folder.glob("params.*tmp*"):  # of a killed run
                    shutil.rmtree(leftover)
            save_params(folder / "params", params, replace=True)
            steps.write(done, about)
    if is_writer():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    # Read back either way, so that what follows does not depend on whether the run was interrupted.
    params = load_params(folder / "params", config, job.mesh)
    report = describe_training(settings, job.run.training, read_metrics(folder / "metrics.jsonl"))
    return Model(jax.tree.map(jnp.asarray, params), config), new_key, report


def _evaluated(
    job: Job, steps: Steps, i: int, name: str, model: Model, original: Model, key: str
) -> dict[str, Any]:
    """Held-out losses after a stage's cut or training, as ``name`` says."""
    windows = job.windows
    assert windows is not None  # else nothing is evaluated

    def make() -> dict[str, Any]:
        return evaluate(
            *_computable(job, i + (name == "trained"), model),
            windows,
            reference=original,
            description=f"evaluate stage {i}",
        ).to_dict()

    def read(text: str) -> dict[str, Any]:
        return Evaluation.from_dict(json.loads(text)).to_dict()

    file = f"evaluation/{i}-{name}-{digest(key, job.teacher_digest, job.evaluation_text)}.json"
    return steps.cached_json(f"stage {i}: evaluate", file, read, make, remake=True)
