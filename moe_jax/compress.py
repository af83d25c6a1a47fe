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
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_jax import report as reports
from moe_jax.calibrate import calibrate, warn_unreached
from moe_jax import cli
from moe_jax.config import ModelConfig
from moe_jax.data import calibration_batches, fingerprint, load_tokenizer
from moe_jax.data.documents import domain_names, expand_files
from moe_jax.data.evaluation import EvaluationWindows, evaluation_windows
from moe_jax.evaluate import evaluate
from moe_jax.hf import load_hf, save_hf
from moe_jax.hf.folder import find_folder
from moe_jax.hf.reader import read_config, stored_dtype
from moe_jax.plan import Plan, make_plan, validate_plan
from moe_jax.prune import apply_plan
from moe_jax.run_config import CalibrationConfig, RunConfig, StageConfig, digest
from moe_jax.scoring import NEURON_CRITERIA, score
from moe_jax.sharding import check_divisible, make_mesh
from moe_jax.shapes import count_params
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


def compress(run: RunConfig) -> dict[str, Any]:
    """Carries out a run, or what is left of it.

    Everything that can be known to be wrong before weights are read is refused first.

    Returns:
        The report (see ``moe_jax.report``), also written to ``run.output``.

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
        settings = dataclasses.asdict(run.evaluation) | {"files": None, "dtype": run.dtype}
        text_digest = fingerprint(evaluation_files, tokenizer, **settings)
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
    stage_reports = []
    stats: Stats | None = None
    for i, stage in enumerate(run.stages):
        stats, plan, key = _planned(
            steps, run, i, stage, (params, config), original, calibration_files, tokenizer, key
        )
        old = config
        with steps.timed(f"stage {i}: prune"):
            config, params = apply_plan(params, config, plan, stats)
        stage_reports.append(_stage_report(stage, plan, stats, old, config))

    # The result, read back from disk before it is measured.
    result = folder / "model"
    report = _describe(run, source, checkpoint, calibration_files, evaluation_files, stage_reports)
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
        steps, "evaluate the result", windows, (params, config), original, digest(key, text_digest)
    )
    _finish(report, steps, result, original[1], config, before, after)
    return report


def _evaluated(steps, name, windows, model, reference, key) -> dict[str, Any] | None:
    if not windows:
        return None
    make = lambda: evaluate(*model, windows, reference=reference).to_dict()  # noqa: E731
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
    params, config = model
    if stage.plan:
        plan = Plan.from_json(Path(stage.plan).read_text())
        needs_means = any(p.novices and p.novice_value == "mean" for p in plan.layers.values())
        stats = None
        if needs_means:
            stats = _measured(steps, run, i, stage, model, original, files, tokenizer, key)
        validate_plan(plan, config)
        return stats, plan, digest(key, plan.to_json())
    stats = _measured(steps, run, i, stage, model, original, files, tokenizer, key)
    options: dict[str, Any] = {}
    if stage.method == "mone":
        options["frequency"] = stage.frequency
    if stage.method == "slim" and stage.aggregation:
        options["aggregation"] = stage.aggregation
    scores = score(stats, stage.criterion, seed=run.seed, **options)
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
    settings = dataclasses.asdict(run.calibration) | {"files": None, "seed": run.seed}
    text = fingerprint(files, tokenizer, **settings)
    name = digest(key, text, stage.losses)
    path = steps.folder / "statistics" / f"{i}-{name}"
    if path.with_suffix(".json").exists():
        _logger.info("stage %d: statistics taken from %s", i, path)
        return Stats.load(path)
    with steps.timed(f"stage {i}: calibrate"):
        stats = calibrate_by_domain(
            *model,
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


def calibrate_by_domain(
    params: dict[str, Any],
    config: ModelConfig,
    files: Sequence[str],
    tokenizer: Any,
    settings: CalibrationConfig,
    *,
    seed: int = 0,
    importance: Sequence[str] = (),
    teacher: tuple[dict[str, Any], ModelConfig] | None = None,
) -> Stats:
    """Calibrates on each file in turn and merges.

    Merging is exact, and so the routing of every domain comes for nothing:
    ``facts["domains"][name]`` holds its ``tokens`` and, by layer, ``count`` [E].
    """
    names = domain_names(files)
    shares = _shares(settings.num_sequences, len(files))
    merged: Stats | None = None
    domains = {}
    for name, file, share in zip(names, files, shares, strict=True):
        if not share:
            continue
        batches = calibration_batches(
            [file],
            tokenizer,
            num_sequences=share,
            seq_len=settings.seq_len,
            batch_size=settings.batch_size,
            seed=seed,
            pack=settings.pack,
            vocab_size=config.vocab_size,
        )
        stats = calibrate(
            params,
            config,
            batches,
            importance=importance,
            teacher=teacher,
            seed=seed,
            description=f"calibrate on {name}",
            warn=False,
        )
        domains[name] = {
            "tokens": stats.tokens,
            "count": {str(i): layer["count"].tolist() for i, layer in stats.layers.items()},
        }
        merged = stats if merged is None else merged.merge(stats)
    if merged is None:
        raise ValueError(
            f"calibration.num_sequences must be positive, got {settings.num_sequences}"
        )
    warn_unreached(merged)
    return dataclasses.replace(merged, facts={"domains": domains})


def _shares(total: int, parts: int) -> list[int]:
    """``total`` in nearly equal parts."""
    return [total // parts + (i < total % parts) for i in range(parts)]
