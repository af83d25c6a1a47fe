"""The main job: a checkpoint in; a smaller checkpoint, a report and a model card out.

    python -m moe_jax.compress --config=configs/quickstart.py
    python -m moe_jax.compress --config=configs/quickstart.py --config.model=DIR \\
        --config.calibration.files=more.txt,code.jsonl --config.output=outputs/mine

Every step leaves a file in the output folder, named by a digest of all that it depends on. A run
that was interrupted, or is repeated with other later stages, goes on after the last step whose
file is there; calibration goes on after the last file of text, training after the last checkpoint,
to the same bits (on CPU). What was trained, or begun to be, is never silently done again: if what
it depends on has changed, the run is refused with the fields that differ. SIGTERM ends a run with
status 143, after a checkpoint if it trains; SIGINT (Ctrl-C) with 130. One run at a time may use an
output folder.

    output/run.json                     the configuration; marks the folder as a run's
    output/statistics/STAGE-DIGEST.*    calibration, by domain and merged
    output/plans/STAGE-DIGEST.json      what each stage removes
    output/cuts/STAGE-DIGEST/           weights after a sequential cut or a refit; layer by layer,
                                        after every cut
    output/training/STAGE/              checkpoints while it trains, then weights; metrics.jsonl
    output/evaluation/*.json            held-out losses, after each step of a stage
    output/model/                       the result: a Hugging Face folder with its model card
    output/export.json                  how a packed checkpoint's result is stored
    output/report.{json,html}           everything measured

A field of the configuration is changed by --config.NAME=VALUE.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moe_jax import cli
from moe_jax import report as reports
from moe_jax.data.documents import text_hashes
from moe_jax.distill import TrainSettings
from moe_jax.environment import environment, peak_memory_mib
from moe_jax.evaluate import Evaluation, evaluate_pair
from moe_jax.hf import load_hf, save_hf
from moe_jax.hf.folder import CONFIG, read_json
from moe_jax.hf.reader import open_hf, stored_dtype
from moe_jax.hf.source import Source
from moe_jax.identity import digest
from moe_jax.lineage import Lineage
from moe_jax.params import Model
from moe_jax.plan import Cut
from moe_jax.processes import agree, barrier, is_writer
from moe_jax.report import Report
from moe_jax.report.facts import Output
from moe_jax.run.config import RunConfig
from moe_jax.run.describe import describe_loader, describe_model, describe_source
from moe_jax.run.dry_run import dry_run
from moe_jax.run.job import Job, prepare
from moe_jax.run.report_warnings import describe_warnings
from moe_jax.run.self_check import check_reload, check_weights
from moe_jax.run.serving import ServeConfig, serving_warnings
from moe_jax.run.stage import StageConfig
from moe_jax.run.stages import run_stages
from moe_jax.run.store import MARKER, MODEL, Steps, owned
from moe_jax.run.stored_bytes import described_export, stored_bytes
from moe_jax.run.target import TargetConfig, stage_table
from moe_jax.settings import ExportConfig, field_help

_FIELDS = (
    ("Fields of the configuration", RunConfig),
    ("Fields of a stage", StageConfig),
    ("Fields of its cut, beside them", Cut),
    ("Fields of distill, of which steps must be given", TrainSettings),
    ("Fields of target", TargetConfig),
    ("Fields of serve", ServeConfig),
    ("Fields of export", ExportConfig),
)
__doc__ = "\n\n".join([__doc__, *(f"{title}:\n{field_help(kind)}" for title, kind in _FIELDS)])
# By name: run as a program, this module is called __main__.
_logger = logging.getLogger("moe_jax.compress")
EXPORTED = "export.json"  # what a run says of its result


def main(settings: ConfigDict, _: Sequence[str]) -> None:
    """The command line."""
    run = RunConfig.from_dict(settings.to_dict())
    if run.dry_run:
        if is_writer():
            print(dry_run(run))
        return
    report, paths = compress(run)
    if not is_writer():
        return
    print(reports.summary_table(report), end="\n\n")
    cli.print_paths(paths)


def compress(run: RunConfig) -> tuple[Report, dict[str, Path]]:
    """Carries out a run, or what is left of it.

    Everything that can be known to be wrong before weights are read is refused first.

    Returns:
        The report (see ``moe_jax.report``), also written to ``run.output``, and the paths of the
        checkpoint, the report, its page and the model card.

    Raises:
        BlockingIOError: another run is using the output folder.
        FileNotFoundError, FileExistsError, ValueError: bad input; nothing half-written.
        OSError: a file cannot be written; what was written before is whole, and used by a rerun.
    """
    with owned(run):
        found = _compress(run)
        barrier("compress")  # or a process would leave while others still need it
    return found


def _compress(run: RunConfig) -> tuple[Report, dict[str, Path]]:
    ################################################################################################
    #  1. Refuse what can be refused; from here on the folder is a run's.                          #
    ################################################################################################
    job = prepare(run)
    _announce(job)
    steps = Steps(job.folder)
    asked = run.to_dict()
    asked["calibration"]["mode"] = job.run.calibration.mode
    steps.write(job.folder / MARKER, asked)

    ################################################################################################
    #  2. The original, and the model that the first stage starts from: mostly the same.           #
    ################################################################################################
    with steps.timed("load"):
        original = model = _loaded(job, job.teacher)
        if job.teacher != job.source:
            model = _loaded(job, job.source)

    ################################################################################################
    #  3. The stages. A key is the digest of all that a model depends on, and names what is left.  #
    ################################################################################################
    key = digest(job.source_digest, run.dtype, run.seed)
    model, lineage, key, stages = run_stages(job, steps, model, original, key)

    ################################################################################################
    #  4. The result, read back from disk before it is measured: what is told is what was written. #
    ################################################################################################
    if run.export != ExportConfig():
        key = digest(key, dataclasses.asdict(run.export))
    result, output, fresh = _exported(job, steps, model, lineage, key)
    logits = None
    if fresh:
        with steps.timed("check export"):
            checked, logits = check_weights(job, model, result, lineage)
            output |= checked
    del model
    with steps.timed("read back"):
        model = _loaded(job, result)
    if fresh:
        again = "packing_error" in output
        output |= check_reload(job, model, result, logits, packed_again=again)
        steps.write(job.folder / EXPORTED, output)
    key = digest(key, job.evaluation_text)
    before, after = _evaluated(job, steps, original, model, key)

    ################################################################################################
    #  5. The report, its page and the model card.                                                 #
    ################################################################################################
    report: Report = {
        **_frame(job),
        "output": output,
        "before": describe_model(original.config, job.teacher, before),
        "after": describe_model(model.config, result, after),
        "source": describe_source(job.source, run.model, job.config, job.source_digest),
        "stages": stages,
        "loader": describe_loader(
            model.config, read_json(result / CONFIG)["model_type"], stored_dtype(result), run.serve
        ),
        "warnings": [
            *describe_warnings(stages, model.config),
            *serving_warnings(model.config, run.serve),
        ],
        "seconds": steps.seconds,
        "peak_memory_mib": peak_memory_mib(),
    }
    return report, {"checkpoint": result} | _written(report, job.folder, result)


def _announce(job: Job) -> None:
    """What the run is going to do, to the log."""
    run = job.run
    _logger.info("%s", stage_table(run.stages, run.training, job.config, job.models))
    stored, shapes = Source.at(job.source), (job.config, *job.models)
    _logger.info("%s", stored_bytes(stored, run.stages, shapes, run.export, job.plans))
    for text in serving_warnings(job.models[-1], run.serve):
        _logger.warning("%s", text)


def _written(report: Report, folder: Path, result: Path) -> dict[str, Path]:
    """Writes the report, its page and the model card; their paths by what they are."""
    if not is_writer():
        return {}
    paths = reports.write_report(report, folder, card_folder=result)
    names = {"json": "report.json", "html": "report.html", "card": "model card"}
    return {names[kind]: path for kind, path in paths.items()}


def _loaded(job: Job, folder: Path) -> Model:
    if job.layerwise:
        config, params = open_hf(folder, job.run.dtype or None)
    else:
        config, params = load_hf(folder, job.run.dtype or None, job.mesh)
    return Model(params, config)


def _exported(
    job: Job, steps: Steps, model: Model, lineage: Lineage, key: str
) -> tuple[Path, Output, bool]:
    """The folder of the result, its facts, and whether it was written now: not if it was there.

    It was there if its facts are, too: these are written once it has been checked.
    """
    folder, about = job.folder / MODEL, job.folder / EXPORTED
    marker = folder / "moe_jax_run.json"
    content = json.dumps({"digest": key}) + "\n"
    whole = about.is_file() and marker.is_file() and marker.read_bytes() == content.encode()
    if agree(whole):
        found = about.read_text() if is_writer() else ""
        return folder, json.loads(agree(found)), False
    if is_writer():
        about.unlink(missing_ok=True)  # of an earlier result
    with steps.timed("export"):
        exported = save_hf(
            folder,
            *model,
            source=job.source,
            dtype="source",
            extra_files={marker.name: content},
            lineage=lineage,
            packing=job.run.export.packing,
            cut_further=job.run.export.cut_further,
        )
    facts = described_export(exported)
    for line in facts.get("storage", ()):
        _logger.info("%s", line)
    return folder, facts, True


def _evaluated(
    job: Job, steps: Steps, original: Model, result: Model, key: str
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Held-out losses of the original and of the result, in one pass over the text."""
    windows = job.windows
    if windows is None:
        return None, None

    def read(text: str) -> dict[str, Any]:
        pair = json.loads(text)
        if not isinstance(pair, dict):
            raise ValueError("not an evaluation")
        return {k: Evaluation.from_dict(pair.get(k, {})).to_dict() for k in ("before", "after")}

    def make() -> dict[str, Any]:
        before, after = evaluate_pair(original, result, windows, description="evaluate")
        return {"before": before.to_dict(), "after": after.to_dict()}

    file = f"evaluation/{digest(job.teacher_digest, key, job.evaluation_text)}.json"
    pair = steps.cached_json("evaluate", file, read, make, remake=True)
    return pair["before"], pair["after"]


def _frame(job: Job) -> Report:
    """What a report says of any run on this machine."""
    return {
        "name": f"{job.source.resolve().name}, compressed",
        "command": shlex.join(["python", "-m", "moe_jax.compress", *sys.argv[1:]]),
        "environment": environment(),
        "seed": job.run.seed,
        "config": job.run.to_dict(),
        "data": {
            "calibration": text_hashes(job.calibration_files),
            "training": text_hashes(job.training_files),
            "evaluation": text_hashes(job.evaluation_files),
        },
    }


if __name__ == "__main__":
    cli.run_with_config(
        main, "What to compress and how, such as configs/quickstart.py.", many_processes=True
    )
