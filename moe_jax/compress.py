"""The main job: a checkpoint in; a smaller checkpoint, a report and a model card out.

    python -m moe_jax.compress --config=configs/quickstart.py
    python -m moe_jax.compress --config=configs/quickstart.py --config.model=DIR \\
        --config.calibration.files=more.txt,code.jsonl --config.output=outputs/mine

Every step leaves a file in the output folder, named by a digest of all that it depends on. A run
that was interrupted, or is repeated with other later stages, goes on after the last step whose
file is there; calibration goes on after the last file of text.

    output/run.json                     the configuration; marks the folder as a run's
    output/statistics/STAGE-DIGEST.*    calibration, by domain and merged
    output/plans/STAGE-DIGEST.json      what each stage removes
    output/evaluation/DIGEST.json       held-out losses
    output/model/                       the result: a Hugging Face folder with its model card
    output/report.{json,html}           everything measured

Fields of the configuration (a field of the file FILE.py is changed by --config.NAME=VALUE):
    model     checkpoint folder or hub id
    output    folder of all that the run makes: absent, empty, or an earlier run's
    dtype     of computation: float32, bfloat16 or float16; empty keeps the checkpoint's
    seed      of every random choice (default 0)
    mesh      sizes of the axes data, fsdp, expert, tensor (default: one device)
    calibration.files          text (.txt, .jsonl, .parquet), globs or hf:NAME; each is a domain
    calibration.num_sequences  over all files, in equal shares (default 128)
    calibration.seq_len        tokens per sequence (default 512)
    calibration.batch_size     sequences per step (default 8)
    calibration.pack           join documents instead of one per sequence (default False)
    evaluation.files           held-out text; none, no evaluation
    evaluation.seq_len, .batch_size    as above
    evaluation.max_bytes       of each file; 0 uses all (default)
    stages    tuple of dicts, cuts that follow each other

Fields of a stage:
    method         what ranks experts: mone (default), frequency, routing_mass, output_deviation,
                   ean, reap or random; or slim, which narrows every expert
    keep_experts   experts that each layer keeps, or
    keep_ratio     the share of them
    replacement    of removed experts: novice (a constant, default), zero or delete
    scope          rank within each layer (default) or over all (global)
    frequency      of mone: routing_mass (default) or mean_weight
    expert_width   slim: neurons that each expert keeps, or
    width_ratio    the share of them
    round_to       slim: widths become multiples of it (default 1)
    importance     slim: kd_topk (default), kd_full, lm, fisher, activation_norm, weight_norm or
                   random_neurons
    aggregation    slim: batch_abs, sequence_abs or sequence_square (default: the importance's own)
    plan           a plan file to apply; goes with no other field
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from moe_jax import cli
from moe_jax import report as reports
from moe_jax.calibrate import calibrate_domains, domain_batches
from moe_jax.config import ModelConfig
from moe_jax.data.documents import expand_files
from moe_jax.data.evaluation import EvaluationWindows, evaluation_windows
from moe_jax.evaluate import Evaluation, evaluate_pair
from moe_jax.files import write_json
from moe_jax.hf import load_hf, save_hf
from moe_jax.hf.folder import find_folder
from moe_jax.hf.reader import read_config, stored_dtype
from moe_jax.plan import Plan, make_plan, validate_plan
from moe_jax.prune import apply_plan
from moe_jax.run_config import RunConfig, StageConfig
from moe_jax.run_files import (
    MARKER,
    MODEL,
    Steps,
    check_output,
    checkpoint_digest,
    digest,
    parse_plan,
    read_plan,
    read_tokenizer,
    text_digest,
    text_hashes,
)
from moe_jax.run_report import (
    describe_loader,
    describe_model,
    describe_routing,
    describe_source,
    describe_stage,
    describe_warnings,
)
from moe_jax.scoring import score
from moe_jax.sharding import check_divisible, make_mesh
from moe_jax.statistics import Stats

Model = tuple[dict[str, Any], ModelConfig]


@dataclass(frozen=True)
class _Job:
    """A run whose every input was checked, short of the weights themselves.

    Attributes:
        plans: by stage, those that were given as files.
        domains: calibration batches by domain; empty if no stage needs any.
        calibration_text, evaluation_text: digests of the tokens.
    """

    run: RunConfig
    source: Path
    folder: Path
    mesh: Mesh | None
    plans: Mapping[int, Plan]
    calibration_files: Sequence[str]
    evaluation_files: Sequence[str]
    domains: Mapping[str, list] = field(default_factory=dict)
    windows: Mapping[str, EvaluationWindows] = field(default_factory=dict)
    calibration_text: str = ""
    evaluation_text: str = ""


def compress(run: RunConfig) -> tuple[dict[str, Any], dict[str, Path]]:
    """Carries out a run, or what is left of it.

    Everything that can be known to be wrong before weights are read is refused first.

    Returns:
        The report (see ``moe_jax.report``), also written to ``run.output``, and the paths of the
        checkpoint, the report, its page and the model card.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: bad input; nothing half-written.
        OSError: a file cannot be written; what was written before is whole, and used by a rerun.
    """
    job = _prepare(run)
    steps = Steps(job.folder)
    write_json(job.folder / MARKER, run.to_dict())

    with steps.timed("load"):
        config, params = load_hf(job.source, run.dtype or None, job.mesh)
        checkpoint = checkpoint_digest(job.source)
    original = (params, config)

    # The cuts.
    key = digest(checkpoint, run.dtype, run.seed)
    stages: list[dict[str, Any]] = []
    measured: list[Stats | None] = []
    routing: list[dict[str, Any]] = []
    for i, stage in enumerate(run.stages):
        stats, plan, key = _planned(job, steps, i, (params, config), original, key)
        old = config
        with steps.timed(f"stage {i}: prune"):
            config, params = apply_plan(params, config, plan, stats)
        stages.append(describe_stage(stage, plan, stats, old, config, run.seed))
        measured.append(stats)
        if i == 0 and stats is not None:
            routing = describe_routing(stats, plan)

    # The result, read back from disk before it is measured.
    result = _exported(job, steps, params, config, key)
    with steps.timed("read back"):
        config, params = load_hf(result, run.dtype or None, job.mesh)
    key = digest(key, job.evaluation_text)
    before, after = _evaluated(job, steps, original, (params, config), checkpoint, key)

    report = _frame(job) | {
        "output": {"path": str(result), "dtype": stored_dtype(result)},
        "before": describe_model(original[1], job.source, before),
        "after": describe_model(config, result, after),
        "source": describe_source(job.source, run.model, original[1]),
        "stages": stages,
        "routing_by_domain": routing,
        "loader": describe_loader(config, stored_dtype(result)),
        "warnings": describe_warnings(stages, measured, run.calibration.num_sequences, config),
        "seconds": steps.seconds,
        "peak_memory_mib": reports.peak_memory_mib(),
    }
    paths = reports.write_report(report, job.folder, card_folder=result)
    return report, {
        "checkpoint": result,
        "report.json": paths["json"],
        "report.html": paths["html"],
        "model card": paths["card"],
    }


def _prepare(run: RunConfig) -> _Job:
    """Refuses what can be refused without reading weights; writes nothing."""
    source = find_folder(run.model)
    config = read_config(source)
    stored_dtype(source)  # a missing or damaged file of weights is found here
    folder = check_output(run)
    plans = {i: read_plan(stage.plan) for i, stage in enumerate(run.stages) if stage.plan}
    models = run.check_against(config, plans)
    mesh = make_mesh(run.mesh) if run.mesh else None
    if mesh is not None:
        for model in (config, *models):
            check_divisible(model, mesh)
    calibrated = [i for i in range(len(run.stages)) if i not in plans or _needs_means(plans[i])]
    if calibrated and not run.calibration.files:
        raise ValueError(
            f"stages[{calibrated[0]}]: novices with mean outputs need statistics; "
            "calibration.files must name text, got none"
        )
    files = expand_files(run.calibration.files) if calibrated else []
    held_out = expand_files(run.evaluation.files) if run.evaluation.files else []
    tokenizer = read_tokenizer(source)
    job = _Job(run, source, folder, mesh, plans, files, held_out)
    if files:
        job = dataclasses.replace(
            job,
            domains=domain_batches(
                files, tokenizer, run.calibration, seed=run.seed, vocab_size=config.vocab_size
            ),
            calibration_text=text_digest(files, tokenizer, run.calibration, seed=run.seed),
        )
    if held_out:
        windows = evaluation_windows(
            held_out,
            tokenizer,
            seq_len=run.evaluation.seq_len,
            batch_size=run.evaluation.batch_size,
            max_bytes=run.evaluation.max_bytes or None,
            vocab_size=config.vocab_size,
        )
        text = text_digest(held_out, tokenizer, run.evaluation, dtype=run.dtype)
        job = dataclasses.replace(job, windows=windows, evaluation_text=text)
    return job


def _needs_means(plan: Plan) -> bool:
    return any(layer.novices and layer.novice_value == "mean" for layer in plan.layers.values())


def _frame(job: _Job) -> dict[str, Any]:
    """What a report says of any run on this machine."""
    return {
        "name": f"{job.source.resolve().name}, compressed",
        "command": shlex.join(["python", "-m", "moe_jax.compress", *sys.argv[1:]]),
        "environment": reports.environment(),
        "seed": job.run.seed,
        "config": job.run.to_dict(),
        "data": {
            "calibration": text_hashes(job.calibration_files),
            "evaluation": text_hashes(job.evaluation_files),
        },
    }


def _evaluated(
    job: _Job, steps: Steps, original: Model, result: Model, checkpoint: str, key: str
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Held-out losses of the original and of the result, in one pass over the text."""
    if not job.windows:
        return None, None

    def read(text: str) -> dict[str, Any]:
        pair = json.loads(text)
        if not isinstance(pair, dict):
            raise ValueError("not an evaluation")
        return {k: Evaluation.from_dict(pair.get(k, {})).to_dict() for k in ("before", "after")}

    def make() -> dict[str, Any]:
        before, after = evaluate_pair(original, result, job.windows, description="evaluate")
        return {"before": before.to_dict(), "after": after.to_dict()}

    file = f"evaluation/{digest(checkpoint, key, job.evaluation_text)}.json"
    pair = steps.cached_json("evaluate", file, read, make, remake=True)
    return pair["before"], pair["after"]


def _planned(
    job: _Job, steps: Steps, i: int, model: Model, original: Model, key: str
) -> tuple[Stats | None, Plan, str]:
    """Statistics and plan of one stage, and the digest of the model that it leaves."""
    stage, config = job.run.stages[i], model[1]
    if i in job.plans:
        plan = job.plans[i]
        stats = None
        if _needs_means(plan):
            stats = _measured(job, steps, i, model, original, key)
        return stats, plan, digest(key, plan.to_json(), stats.facts["digest"] if stats else "")
    stats = _measured(job, steps, i, model, original, key)
    settings = {**dataclasses.asdict(stage)}
    new_key = digest(key, settings, stats.facts["digest"])
    name = f"plans/{i}-{new_key}.json"

    def read(text: str) -> Plan:
        plan = parse_plan(text, steps.folder / name)
        validate_plan(plan, config)
        return plan

    make = partial(_make_plan, stage, stats, config, job.run.seed)
    plan = steps.cached_json(f"stage {i}: plan", name, read, make)
    return stats, plan, digest(new_key, plan.to_json())


def _make_plan(stage: StageConfig, stats: Stats, config: ModelConfig, seed: int) -> Any:
    plan = make_plan(
        score(stats, stage.criterion, seed=seed, **stage.score_options),
        config,
        keep_experts=stage.keep_experts,
        keep_ratio=stage.keep_ratio,
        expert_width=stage.expert_width,
        width_ratio=stage.width_ratio,
        round_to=stage.round_to,
        scope=stage.scope,  # type: ignore[arg-type]
        replacement=stage.replacement,
        method=stage.criterion,
    )
    return json.loads(plan.to_json())


def _measured(job: _Job, steps: Steps, i: int, model: Model, original: Model, key: str) -> Stats:
    """Statistics of the current model, from disk if they are there."""
    losses = job.run.stages[i].losses
    name = digest(key, job.calibration_text, losses)
    params, config = model
    with steps.timed(f"stage {i}: calibrate"):
        return calibrate_domains(
            params,
            config,
            job.domains,
            seed=job.run.seed,
            importance=losses,
            teacher=original,
            save_as=job.folder / "statistics" / f"{i}-{name}",
            digest=name,
        )


def _exported(
    job: _Job, steps: Steps, params: dict[str, Any], config: ModelConfig, key: str
) -> Path:
    """The folder of the result, written unless it holds this very model already."""
    folder = job.folder / MODEL
    marker = folder / "moe_jax_run.json"
    content = json.dumps({"digest": key}) + "\n"
    if marker.is_file() and marker.read_bytes() == content.encode():
        return folder
    with steps.timed("export"):
        save_hf(
            folder,
            params,
            config,
            source=job.source,
            dtype=stored_dtype(job.source),
            extra_files={marker.name: content},
        )
    return folder


def main(settings: ConfigDict, _: Sequence[str]) -> None:
    """The command line."""
    cli.show_progress()
    run = RunConfig.from_dict(settings.to_dict())
    report, paths = compress(run)
    print(reports.summary_table(report))
    print()
    for name, path in paths.items():
        print(f"{name:<11} {path}")


if __name__ == "__main__":
    cli.run_with_config(main, "What to compress and how, such as configs/quickstart.py.")
