"""A run whose every input was checked, short of the weights themselves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grain
import jax
from jax.sharding import Mesh

from moe_jax.calibrate import (
    LayerMeasurement,
    LayerWanted,
    check_losses,
    check_stream_memory,
    domain_batches,
    layer_by_layer,
    moment_copies,
    plan_second_moments,
)
from moe_jax.checkpoint import TrainingCheckpoints, check_same
from moe_jax.config import ModelConfig
from moe_jax.data import load_tokenizer, training_dataset
from moe_jax.data.documents import expand_files, text_digest
from moe_jax.data.evaluation import EvaluationWindows, evaluation_windows
from moe_jax.data.teacher_cache import DIGITS, TeacherCache, open_teacher_cache, text_facts
from moe_jax.data.tokenizer import tokenizer_digest
from moe_jax.distill import TrainSettings
from moe_jax.hf.folder import find_folder
from moe_jax.hf.reader import prevalent_dtype, read_config
from moe_jax.hf.writer import check_source
from moe_jax.identity import checkpoint_digest, digest
from moe_jax.params import ITEM_BYTES, count_params
from moe_jax.plan import LayerPlan, Plan, read_plan
from moe_jax.processes import BATCH_AXES, agree, make_mesh, spec_tree
from moe_jax.run.config import RunConfig
from moe_jax.run.store import DONE, MARKER, check_output, training_folder


@dataclass(frozen=True)
class Job:
    """What the steps of a run share.

    Attributes:
        run: with stages in the place of a target.
        source, teacher: folders of the model that the first stage starts from and of the original;
            the same unless ``run.teacher`` names another.
        folder: the output.
        dtype: of computation.
        models: what each stage makes of the source, before it is known which experts go.
        plans: by stage, those that were given as files.
        domains: calibration batches by domain; empty if no stage needs any.
        windows: held-out text by domain; None without evaluation.
        calibration_text, training_text, evaluation_text: digests of the tokens.
        layerwise: whether models stay on disk, of which one layer is in memory at a time.
        teacher_cache: predictions of the teacher, if trainings read them.
    """

    run: RunConfig
    source: Path
    teacher: Path
    folder: Path
    mesh: Mesh | None
    dtype: str
    config: ModelConfig
    models: Sequence[ModelConfig]
    plans: Mapping[int, Plan]
    tokenizer: Any
    calibration_files: Sequence[str] = ()
    training_files: Sequence[str] = ()
    evaluation_files: Sequence[str] = ()
    domains: Mapping[str, list] = field(default_factory=dict)
    windows: EvaluationWindows | None = None
    calibration_text: str = ""
    training_text: str = ""
    evaluation_text: str = ""
    layerwise: bool = False
    teacher_cache: TeacherCache | None = None

    @property
    def source_digest(self) -> str:
        return checkpoint_digest(self.source)

    @property
    def teacher_digest(self) -> str:
        return checkpoint_digest(self.teacher)

    def needs_second_moments(self, stage: int) -> bool:
        """Whether calibration for a stage must measure those of the hidden activations."""
        if stage in self.plans:
            return any(map(_uses_second_moments, self.plans[stage].layers.values()))
        cut = self.run.stages[stage].cut
        return cut is not None and cut.needs_second_moments

    def needs_attention_moments(self, stage: int) -> bool:
        """Whether calibration for a stage must measure those of the mixed heads."""
        if stage in self.plans:
            layers = self.plans[stage].layers.values()
            return any(layer.repair and layer.kv_groups is not None for layer in layers)
        cut = self.run.stages[stage].cut
        return cut is not None and cut.needs_attention_moments

    def needs_shared_moments(self, stage: int) -> bool:
        """Whether calibration for a stage, or its sequential cut, must measure shared experts'."""
        if stage in self.plans:
            layers = self.plans[stage].layers.values()
            return any(layer.repair and layer.shared_neurons is not None for layer in layers)
        cut = self.run.stages[stage].cut
        return cut is not None and cut.needs_shared_moments

    def goes_in_turn(self, stage: int) -> bool:
        """Whether a stage cuts layer by layer: by its own fields, or as its plan was made."""
        plan = self.plans.get(stage)
        if plan is None:
            return self.run.stages[stage].sequential
        # What is only sliced comes out alike either way.
        return plan.sequential and needs_statistics(plan)

    def refit_batches(self, plan: Plan) -> list[dict[str, Any]]:
        """The text that a plan's refit reads."""
        domains, wanted = self.domains, plan.settings.get("refit_sequences")
        if wanted is not None:
            settings = dataclasses.replace(self.run.calibration, num_sequences=wanted)
            domains = domain_batches(
                self.calibration_files, self.tokenizer, settings, seed=self.run.seed,
                vocab_size=self.config.vocab_size,
            )  # fmt: skip
        return [batch for domain in domains.values() for batch in domain]

    def first_batch(self, stage: int) -> int:
        """Where in the training stream a stage begins: after the ones before it."""
        return sum(s.distill.steps for s in self.run.stages[:stage] if s.distill)

    def training_batches(self, stage: int) -> grain.IterDataset:
        """The training stream from where ``stage`` begins."""
        training, start = self.run.training, self.first_batch(stage)
        if self.teacher_cache is not None:
            return self.teacher_cache.dataset(start, training.batch_size)
        return training_dataset(
            training,
            self.tokenizer,
            seed=self.run.seed,
            start=start,
            vocab_size=self.config.vocab_size,
        )

    def training_facts(self, stage: int) -> dict[str, Any]:
        """What decides a training beside its settings and the weights it starts from."""
        cache = self.teacher_cache.facts if self.teacher_cache else None
        return {
            "stage": stage,
            "model": self.source_digest,
            "dtype": self.run.dtype,
            "cuts": [s.removes for s in self.run.stages[: stage + 1]],
            "calibration": self.calibration_text,
            "text": self.training_text,
            "first_batch": self.first_batch(stage),
            "teacher": self.teacher_digest,
            "teacher_cache": cache and [cache.k, cache.log_prob_dtype, cache.compute_dtype],
        }


def prepare(run: RunConfig) -> Job:
    """Refuses what can be refused without reading weights; writes nothing but tokens.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: bad input.
    """
    source = find_folder(run.model)
    config = read_config(source)
    prevalent_dtype(source)  # a missing or damaged file of weights is found here
    teacher = find_folder(run.teacher) if run.teacher else source
    teacher_config = read_config(teacher)
    run = run.for_model(config)
    folder = check_output(run)
    plans = {i: read_plan(stage.plan) for i, stage in enumerate(run.stages) if stage.plan}
    models = run.check_against(config, plans, teacher_config)
    # And here what the export could not carry along.
    check_source(source, models[-1], run.export.cut_further)
    mesh = make_mesh(run.mesh) if any(size != 1 for size in run.mesh.values()) else None
    _check_processes(run, plans, mesh)
    if mesh is not None:
        for model in (config, teacher_config, *models):
            spec_tree(model, mesh)
        run.check_batches({name: mesh.shape[name] for name in BATCH_AXES})
    tokenizer = load_tokenizer(source)
    if teacher != source:
        _check_same_tokenizer(source, tokenizer, teacher)
    dtype = run.dtype or prevalent_dtype(teacher)
    # The original, what a stage starts from if that is another, and what it leaves.
    held = [count_params(model).total for model in {config, teacher_config}]
    held.append(max(count_params(model).total for model in models))
    layerwise = layer_by_layer(_asked_mode(run, folder, mesh), sum(held) * ITEM_BYTES[dtype])
    mode = "layerwise" if layerwise else "whole"
    run = dataclasses.replace(run, calibration=dataclasses.replace(run.calibration, mode=mode))
    job = Job(
        run, source, teacher, folder, mesh, dtype, config, models, plans, tokenizer,
        layerwise=layerwise,
    )  # fmt: skip
    job = _with_calibration(job)
    job = _with_evaluation(job)
    return _with_training(job) if run.trains else job


def _asked_mode(run: RunConfig, folder: Path, mesh: Mesh | None) -> str:
    """``calibration.mode``; one that is chosen by itself stays what it was when the run began."""
    mode = run.calibration.mode
    if mode != "auto":
        return mode
    if run.trains or mesh is not None:
        return "whole"
    marker = folder / MARKER
    if not marker.is_file():
        return mode
    return json.loads(marker.read_text()).get("calibration", {}).get("mode", mode)


def _check_processes(run: RunConfig, plans: Mapping[int, Plan], mesh: Mesh | None) -> None:
    """Raises ValueError for what many processes cannot do."""
    number = jax.process_count()
    if number == 1:
        return
    if agree(text := digest(run.to_dict())) != text:
        raise ValueError("all processes must be started with one configuration, got others")
    size, devices = (1 if mesh is None else mesh.size), jax.device_count()
    if size != devices:
        raise ValueError(
            f"the mesh must span the {devices} devices of all {number} processes, got {size} from "
            f"mesh = {dict(run.mesh)}; mesh.data = {devices} splits batches alone"
        )
    for i, stage in enumerate(run.stages):
        if stage.sequential or (i in plans and plans[i].sequential):
            raise ValueError(
                f"stages[{i}]: a cut layer by layer (sequential) runs in one process, got {number}"
            )


def _uses_second_moments(layer: LayerPlan) -> bool:
    repairs = layer.repair and bool(layer.neurons or layer.constants)
    return repairs or (bool(layer.novices) and layer.novice_value == "least_squares")


def needs_statistics(plan: Plan) -> bool:
    """Whether applying it takes statistics: for constants of experts or novices, or for repair."""
    return any(
        layer.repair or layer.constants or (layer.novices and layer.novice_value != "zero")
        for layer in plan.layers.values()
    )


def _needs_text(plan: Plan) -> bool:
    return needs_statistics(plan) or bool(plan.settings.get("refit"))


def _check_same_tokenizer(source: Path, tokenizer: Any, teacher: Path) -> None:
    if tokenizer_digest(tokenizer) != tokenizer_digest(load_tokenizer(teacher)):
        raise ValueError(
            f"teacher and student must share a tokenizer; those of {teacher} and {source} differ"
        )


def _with_calibration(job: Job) -> Job:
    run = job.run
    calibrated = [
        i
        for i, stage in enumerate(run.stages)
        if stage.cuts and (i not in job.plans or _needs_text(job.plans[i]))
    ]
    if not calibrated:
        return job
    if not run.calibration.files:
        raise ValueError(
            f"stages[{calibrated[0]}]: the plan's constants, repair or refit take text; "
            "calibration.files must name text, got none"
        )
    files = expand_files(run.calibration.files)
    job = dataclasses.replace(
        job,
        calibration_files=files,
        domains=domain_batches(
            files,
            job.tokenizer,
            run.calibration,
            seed=run.seed,
            vocab_size=job.config.vocab_size,
        ),
        calibration_text=text_digest(files, job.tokenizer, run.calibration, seed=run.seed),
    )
    for i in calibrated:
        _check_memory(job, i)
    return job


def _check_memory(job: Job, i: int) -> None:
    """Raises ValueError if what calibration for stage ``i`` measures cannot fit."""
    run, stage = job.run, job.run.stages[i]
    model, bound = job.models[i - 1] if i else job.config, run.calibration.second_moment_bytes
    target = (
        job.plans[i].settings.get("repair_target")
        if stage.cut is None
        else (stage.cut.repairs and stage.cut.repair_target)
    )
    in_turn, shared = job.goes_in_turn(i), job.needs_shared_moments(i)
    if job.layerwise:
        check_losses(stage.losses, i == 0 and job.teacher == job.source)
    if job.layerwise or in_turn:
        hidden = in_turn or job.needs_second_moments(i)
        asked = LayerMeasurement(
            LayerWanted(hidden=hidden, shared=shared),
            bound or None,
            follow_original=in_turn and target == "original",
            dtype=job.dtype,
        )
        check_stream_memory(model, job.domains, asked, in_files=job.layerwise)
    else:
        hidden, mixed = job.needs_second_moments(i), job.needs_attention_moments(i)
        copies = moment_copies(job.domains)
        plan_second_moments(model, hidden, bound or None, copies, mixed, shared)


def _with_evaluation(job: Job) -> Job:
    settings = job.run.evaluation
    if not settings.files:
        return job
    files = expand_files(settings.files)
    windows = evaluation_windows(settings, job.tokenizer, vocab_size=job.config.vocab_size)
    return dataclasses.replace(
        job,
        evaluation_files=files,
        windows=windows,
        evaluation_text=text_digest(files, job.tokenizer, settings, dtype=job.run.dtype),
    )


def _with_training(job: Job) -> Job:
    training = job.run.training
    if training.files:
        facts = text_facts(
            training.files,
            job.tokenizer,
            seq_len=training.seq_len,
            batch_size=training.batch_size,
            seed=job.run.seed,
        )
        files = expand_files(list(training.files))
        job = dataclasses.replace(job, training_files=files, training_text=facts["text"])
    else:  # the cache alone says what text it was made on
        names = ("tokenizer", "seq_len", "batch_size")
        facts = {"tokenizer": tokenizer_digest(job.tokenizer)[:DIGITS], **vars(training)}
        facts = {name: facts[name] for name in names}
    if training.teacher_cache:
        cache = open_teacher_cache(
            training.teacher_cache, expected={**facts, "teacher": job.teacher_digest}
        )
        taught = [
            (i, stage.distill)
            for i, stage in enumerate(job.run.stages)
            if stage.distill and stage.distill.needs_teacher
        ]
        cache.check_top_k(max((settings.top_k for _, settings in taught), default=1))
        start = job.first_batch(taught[0][0] if taught else 0)
        cache.check_length(job.first_batch(len(job.run.stages)) - start, start)
        job = dataclasses.replace(job, teacher_cache=cache, training_text=cache.facts.text)
    first = next(i for i, stage in enumerate(job.run.stages) if stage.distill)
    job.training_batches(first)  # tokenised now, so that bad text is found now
    for i, stage in enumerate(job.run.stages):
        if stage.distill:
            _check_resumable(job, i, stage.distill)
    return job


def _check_resumable(job: Job, stage: int, settings: TrainSettings) -> None:
    """Raises ValueError if this stage was trained, or begun to be, with other settings."""
    folder = training_folder(job.folder, stage)
    about = None
    if agree((done := folder / DONE).is_file()):
        about = json.loads(done.read_text())
    elif agree((folder / "checkpoints").is_dir()):
        with TrainingCheckpoints(folder / "checkpoints") as checkpoints:
            about = checkpoints.about()
    if about is not None:
        wanted = {**about, **settings.facts(), **job.training_facts(stage)}
        check_same(about, wanted, folder)
