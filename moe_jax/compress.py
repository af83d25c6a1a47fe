"""The main job: a checkpoint in; a smaller checkpoint, a report and a model card out.

    python -m moe_jax.compress --config=configs/quickstart.py

Every step leaves a file in the output folder, named by a digest of all that it depends on. A run
that was interrupted, or is repeated with other later stages, goes on after the last step whose
file is there.

    output/run.json                     the configuration; marks the folder as a run's
    output/statistics/STAGE-DIGEST.*    calibration, by domain and merged
    output/plans/STAGE-DIGEST.json      what each stage removes
    output/evaluation/DIGEST.json       held-out losses
    output/model/                       the result: a Hugging Face folder with its model card
    output/report.{json,html}           everything measured
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moe_jax import cli
from moe_jax import report as reports
from moe_jax.calibrate import calibrate_by_domain
from moe_jax.data import fingerprint, load_tokenizer
from moe_jax.data.documents import expand_files
from moe_jax.data.evaluation import EvaluationWindows, evaluation_windows
from moe_jax.evaluate import evaluate
from moe_jax.hf import load_hf, save_hf
from moe_jax.hf.folder import find_folder
from moe_jax.hf.reader import read_config, stored_dtype
from moe_jax.plan import Plan, make_plan, validate_plan
from moe_jax.prune import apply_plan
from moe_jax.run_config import RunConfig, StageConfig, digest
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

MARKER = "run.json"
_logger = logging.getLogger(__name__)


class _Steps:
    """Files that steps leave behind, and how long each step took in this run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}

    def timed(self, name: str) -> _Timer:
        return _Timer(self.seconds, name)

    def cached_json(self, name: str, path: str, make: Callable[[], Any]) -> Any:
        """The JSON value of ``path``, made and written if it is not there yet."""
        file = self.folder / path
        if file.exists():
            _logger.info("%s: taken from %s", name, file)
            return json.loads(file.read_text())
        with self.timed(name):
            value = make()
        write_json(file, value)
        return value


class _Timer:
    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        _logger.info("%s ...", self._name)
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self._start
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + spent


def write_json(file: Path, value: Any) -> None:
    """Writes ``value`` to ``file``, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def prepare_output(run: RunConfig) -> Path:
    """Makes the output folder, or takes one of an earlier run.

    Raises:
        FileExistsError: it holds something else, or is a file.
    """
    folder = Path(run.output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output must be a folder, got the file {folder}")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise FileExistsError(
            f"output {folder} exists and is not a run's folder ({MARKER} is missing); "
            "name another one or empty it"
        )
    write_json(folder / MARKER, run.to_dict())
    return folder


def checkpoint_digest(folder: Path) -> str:
    """Sha256 (16 hex digits) over the configuration and all weights of a checkpoint."""
    total = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with open(file, "rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()[:16]


def compress(run: RunConfig) -> tuple[dict[str, Any], dict[str, Path]]:
    """Carries out a run, or what is left of it.

    Everything that can be known to be wrong before weights are read is refused first.

    Returns:
        The report (see ``moe_jax.report``), also written to ``run.output``, and the paths of the
        checkpoint, the report, its page and the model card.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: bad input; nothing half-written.
    """
    # What can be refused without reading weights.
    source = find_folder(run.model)
    config = read_config(source)
    run.check_against(config)
    mesh = make_mesh(run.mesh) if run.mesh else None
    if mesh is not None:
        check_divisible(config, mesh)
    calibration_files = expand_files(run.calibration.files) if run.calibration.files else []
    evaluation_files = expand_files(run.evaluation.files) if run.evaluation.files else []
    for stage in run.stages:
        if stage.plan:
            Plan.from_json(Path(stage.plan).read_text())
    folder = prepare_output(run)
    steps = _Steps(folder)

    # The original, and how well it predicts.
    tokenizer = load_tokenizer(source)
    with steps.timed("load"):
        config, params = load_hf(source, run.dtype or None, mesh)
        checkpoint = checkpoint_digest(source)
    original = (params, config)
    windows: dict[str, EvaluationWindows] = {}
    text_digest = ""
    if evaluation_files:
        text_digest = _text_digest(evaluation_files, tokenizer, run.evaluation, dtype=run.dtype)
        windows = evaluation_windows(
            evaluation_files,
            tokenizer,
            seq_len=run.evaluation.seq_len,
            batch_size=run.evaluation.batch_size,
            max_bytes=run.evaluation.max_bytes or None,
            vocab_size=config.vocab_size,
        )
    before = _evaluated(
        steps, "evaluate the original", windows, original, None, digest(checkpoint, text_digest)
    )

    # The cuts.
    key = digest(checkpoint, run.dtype, run.seed)
    stage_reports: list[dict[str, Any]] = []
    routing: list[dict[str, Any]] = []
    stats: Stats | None = None
    for i, stage in enumerate(run.stages):
        stats, plan, key = _planned(
            steps, run, i, stage, (params, config), original, calibration_files, tokenizer, key
        )
        old = config
        with steps.timed(f"stage {i}: prune"):
            config, params = apply_plan(params, config, plan, stats)
        stage_reports.append(describe_stage(stage, plan, stats, old, config, run.seed))
        if i == 0 and stats is not None:
            routing = describe_routing(stats, plan)

    # The result, read back from disk before it is measured.
    result = folder / "model"
    marker = result / "moe_jax_run.json"
    if not marker.exists() or json.loads(marker.read_text()).get("digest") != key:
        with steps.timed("export"):
            save_hf(
                result,
                params,
                config,
                source=source,
                dtype=stored_dtype(source),
                extra_files={marker.name: json.dumps({"digest": key}) + "\n"},
            )
    with steps.timed("read back"):
        config, params = load_hf(result, run.dtype or None, mesh)
    after = _evaluated(
        steps,
        "evaluate the result",
        windows,
        (params, config),
        original,
        digest(key, text_digest),
    )

    # The report.
    report = {
        "name": f"{source.resolve().name}, compressed",
        "source": describe_source(source, run.model, original[1]),
        "output": {"path": str(result), "dtype": stored_dtype(result)},
        "command": shlex.join(["python", "-m", "moe_jax.compress", *sys.argv[1:]]),
        "environment": reports.environment(),
        "seed": run.seed,
        "config": run.to_dict(),
        "data": {
            "calibration": _text_hashes(calibration_files),
            "evaluation": _text_hashes(evaluation_files),
        },
        "before": describe_model(original[1], source, before),
        "after": describe_model(config, result, after),
        "stages": stage_reports,
        "routing_by_domain": routing,
        "loader": describe_loader(config),
        "warnings": describe_warnings(stage_reports, config),
        "seconds": steps.seconds,
        "peak_memory_mib": reports.peak_memory_mib(),
    }
    paths = reports.write_report(report, folder, card_folder=result)
    return report, {
        "checkpoint": result,
        "report.json": paths["json"],
        "report.html": paths["html"],
        "model card": paths["card"],
    }


def _evaluated(steps, name, windows, model, reference, key) -> dict[str, Any] | None:
    if not windows:
        return None

    def make() -> dict[str, Any]:
        params, config = model
        return evaluate(params, config, windows, reference=reference).to_dict()

    return steps.cached_json(name, f"evaluation/{key}.json", make)


def _planned(
    steps: _Steps,
    run: RunConfig,
    i: int,
    stage: StageConfig,
    model,
    original,
    files,
    tokenizer,
    key,
) -> tuple[Stats | None, Plan, str]:
    """Statistics and plan of one stage, and the digest of the model that it leaves."""
    _, config = model
    if stage.plan:
        plan = Plan.from_json(Path(stage.plan).read_text())
        needs_means = any(p.novices and p.novice_value == "mean" for p in plan.layers.values())
        stats = None
        if needs_means:
            stats = _measured(steps, run, i, stage, model, original, files, tokenizer, key)
        validate_plan(plan, config)
        return stats, plan, digest(key, plan.to_json())
    stats = _measured(steps, run, i, stage, model, original, files, tokenizer, key)
    scores = score(stats, stage.criterion, seed=run.seed, **stage.score_options)
    new_key = digest(key, dataclasses.asdict(stage), stats.facts["digest"])

    def make() -> Any:
        plan = make_plan(
            scores,
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

    plan = Plan.from_json(steps.cached_json(f"stage {i}: plan", f"plans/{i}-{new_key}.json", make))
    return stats, plan, digest(new_key, plan.to_json())


def _measured(
    steps: _Steps,
    run: RunConfig,
    i: int,
    stage: StageConfig,
    model,
    original,
    files,
    tokenizer,
    key,
) -> Stats:
    """Statistics of the current model, from disk if they are there."""
    text = _text_digest(files, tokenizer, run.calibration, seed=run.seed)
    name = digest(key, text, stage.losses)
    path = steps.folder / "statistics" / f"{i}-{name}"
    if path.with_suffix(".json").exists():
        _logger.info("stage %d: statistics taken from %s", i, path)
        return Stats.load(path)
    params, config = model
    with steps.timed(f"stage {i}: calibrate"):
        stats = calibrate_by_domain(
            params,
            config,
            files,
            tokenizer,
            run.calibration,
            seed=run.seed,
            importance=stage.losses,
            teacher=original,
        )
    stats = dataclasses.replace(stats, facts={**stats.facts, "digest": name, "text": text})
    stats.save(path)
    return stats


def _text_digest(files: Sequence[str], tokenizer: Any, section: Any, **more: Any) -> str:
    """Digest of all that decides which tokens a section's settings give."""
    settings = dataclasses.asdict(section) | more
    del settings["files"]
    return fingerprint(files, tokenizer, **settings)


def _text_hashes(files: Sequence[str]) -> dict[str, str]:
    return {file: fingerprint([file]) for file in files}


def main(settings: ConfigDict, _: Sequence[str]) -> None:
    """The command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    for noisy in ("absl", "orbax", "jax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    run = RunConfig.from_dict(settings.to_dict())
    report, paths = compress(run)
    print(reports.summary_table(report))
    print()
    for name, path in paths.items():
        print(f"{name:<11} {path}")


if __name__ == "__main__":
    cli.run_with_config(main, "What to compress, and how.")
