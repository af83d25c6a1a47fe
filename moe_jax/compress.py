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
    output/cuts/STAGE-DIGEST/           weights after a sequential cut
    output/training/STAGE/              checkpoints while it trains, then weights; metrics.jsonl
    output/evaluation/*.json            held-out losses, after each step of a stage
    output/model/                       the result: a Hugging Face folder with its model card
    output/report.{json,html}           everything measured

Fields of the configuration (a field of the file FILE.py is changed by --config.NAME=VALUE):
    model     checkpoint folder or hub id
    teacher   the original, if model is not it (empty: model): what trainings learn from, what
              losses of importance and the report compare with
    output    folder of all that the run makes: absent, empty, or an earlier run's
    dtype     of computation: float32, bfloat16 or float16; empty keeps the checkpoint's
    seed      of every random choice (default 0)
    mesh      sizes of the axes data, fsdp, expert, tensor (default: one device); all devices
              must belong to this one process
    calibration.files          text (.txt, .jsonl, .parquet), globs or hf:NAME; each is a domain
    calibration.num_sequences  over all files, in equal shares (default 128)
    calibration.seq_len        tokens per sequence (default 512)
    calibration.batch_size     sequences per step (default 8)
    calibration.pack           join documents instead of one per sequence (default False)
    calibration.second_moment_bytes    that second moments (obs, repair) may take on the device: the
                               text is read several times if need be (default 0: half of what is
                               free)
    training.files             text to train on, as above; or shares of tokens by name:
                               ConfigDict({"a.jsonl": 0.7, ...}, allow_dotted_keys=True)
    training.seq_len           tokens per packed row (default 512)
    training.batch_size        rows per optimizer step (default 8)
    training.cache_dir         where tokenised text is kept (default: the user's cache folder)
    training.teacher_cache     predictions made by python -m moe_jax.cache_teacher, to train without
                               running the teacher
    evaluation.files           held-out text; none, no evaluation
    evaluation.seq_len, .batch_size    as above
    evaluation.max_bytes       of each file; 0 uses all (default)
    tracking.tensorboard, .wandb_project    where numbers of trainings go beside metrics.jsonl
    stages    tuple of dicts, cuts and trainings that follow each other
    target    instead of stages: a dict, where slimming ends

Fields of a stage:
    method         what ranks experts: mone (default), mone_l1, mone_cv, mone_sum, mone_log_sum,
                   output_deviation, frequency, routing_mass, soft_count, mean_weight, ean,
                   ean_mean, reap, reap_l2, reconstruction, taylor_lm, taylor_kd_topk,
                   taylor_kd_full, taylor_fisher, router_norm or random; or what merges them:
                   m_smoe, hc_smoe or ream; slim, which narrows every expert (implied by its
                   fields); obs, which does so without training best: neurons by Optimal Brain
                   Surgeon, and those that stay are repaired; angular, which drops layers; or
                   distill, which only trains (implied if that is all there is)
    keep_experts   experts that each layer keeps, or
    keep_ratio     the share of them
    replacement    of removed experts: novice (their mean output, default), weighted_novice (the
                   mean weighted by routing), zero, delete, or merge (into the most similar one
                   that stays)
    merge_similarity, merge_weights, merge_align, merge_router, merge_cap
                   of merging: router, output, output_and_router or weights; frequency, score or
                   uniform; whether neurons are aligned first; mean or kept; experts of a group
    drop_layers    angular: how many
    scope          rank within each layer (default) or over all (global)
    frequency      of mone: routing_mass (default) or mean_weight
    expert_width   slim, obs: neurons that each expert keeps, or
    width_ratio    the share of them
    round_to       slim: widths become multiples of it (default 1; 128 suits TPUs)
    neuron_scope   slim, obs: rank neurons within each expert (default), across a layer (experts are
                   padded with zeros to the widest, so that stock loaders read them, or stored as
                   wide as they are with own_widths), or across the model (with own_widths)
    own_widths     store experts as wide as they are, at most max_buckets (default 4) different
                   widths in a layer (or the model); at least min_width (default 0: novices)
    active_share   of own_widths: 0 (default) counts a neuron's bytes, 1 its work per token
    constants      slim, obs: whether experts gain a constant beside their neurons
    importance     slim: kd_topk (default), kd_full, lm, fisher, activation_norm, energy, obs,
                   wanda, fluctuation, flap, weight_norm or random_neurons
    repair         slim, obs: the neurons (with kv_groups: the heads) that stay make up, in closed
                   form, for those that go
                   (default: with obs)
    sequential     obs: measure, cut and repair one layer after the other, each on the output of the
                   layers already cut (default False); takes the memory of one layer's second
                   moments, and of the residual stream of the text
    repair_target  of sequential: original (default: the original model's residual stream behind
                   each layer), or own (the layer's output before its cut: less memory)
    aggregation    slim: batch_abs, sequence_abs or sequence_square (default: the importance's own)
    kv_groups      slim: key/value heads, with their query heads, that each layer keeps
    group_importance   what ranks them: kd_topk, kd_full, lm, fisher or random_groups
    plan           a plan file to apply; goes with no other field but distill
    distill        a dict, how to train after the cut

Fields of distill (steps must be given):
    steps, learning_rate, warmup_steps (default: a tenth of the steps, at most 100),
    final_fraction, weight_decay, beta1, beta2, clip_norm    AdamW, warm-up and cosine decay
    accumulation   micro-batches per step (default 1)
    ema_decay      average of the weights to keep instead of the last ones (default 0: off)
    trainable      all (default), or names: router, experts, novices, attention, norms, embedding,
                   head, mlp
    loss           kd_full (default: forward KL), kd_topk, kd_topk_renormalized, kd_topk_both,
                   reverse_kl, jensen_shannon, or lm (no teacher)
    top_k, temperature, beta, lm_weight    of the loss; lm_weight mixes in the next tokens' own
    hidden_weight, hidden_layers    match the blocks' outputs; all layers unless listed
    router_weight  match the routers' distributions
    balance_weight load-balancing loss
    sample_routing run the student's routers in train mode (default True)
    compute_dtype  auto (default: bfloat16 on accelerators, float32 on CPU), float32, bfloat16
    chunk_tokens   positions whose logits are held at a time (default 512; 0: all of a
                   micro-batch; accelerators like thousands)
    remat          compute activations again in the backward pass (default False)
    scan_layers    compile one layer instead of all, where they are alike (default True)
    seed, checkpoint_every, log_every

Fields of target:
    total_params, active_params or ratio    where to end; the widest experts that fit are taken
    kv_groups      key/value heads to end with
    stages         how many (default 2)
    schedule       sizes in between: geometric (default) or linear
    round_to       widths are multiples of it
    step_shares    share of distill.steps of each stage (default: equal)
    slim, distill  fields of every stage; distill.steps is the sum over stages
"""

from __future__ import annotations

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
from moe_jax.config import ModelConfig
from moe_jax.data.documents import text_hashes
from moe_jax.environment import environment, peak_memory_mib
from moe_jax.evaluate import Evaluation, evaluate_pair
from moe_jax.files import write_json
from moe_jax.hf import load_hf, save_hf
from moe_jax.hf.reader import stored_dtype
from moe_jax.identity import digest
from moe_jax.report import Report
from moe_jax.run.config import RunConfig
from moe_jax.run.describe import (
    describe_loader,
    describe_model,
    describe_source,
    describe_warnings,
)
from moe_jax.run.files import MARKER, MODEL, Steps, owned
from moe_jax.run.job import Job, prepare
from moe_jax.run.stages import Model, run_stage
from moe_jax.run.target import stage_table

# By name: run as a program, this module is called __main__.
_logger = logging.getLogger("moe_jax.compress")


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
        return _compress(run)


def _compress(run: RunConfig) -> tuple[Report, dict[str, Path]]:
    job = prepare(run)
    _logger.info("%s", stage_table(job.run, job.config, job.models))
    steps = Steps(job.folder)
    write_json(job.folder / MARKER, run.to_dict())

    with steps.timed("load"):
        config, params = load_hf(job.source, run.dtype or None, job.mesh)
        original = (params, config)
        if job.teacher != job.source:
            config_of_teacher, params_of_teacher = load_hf(job.teacher, run.dtype or None, job.mesh)
            original = (params_of_teacher, config_of_teacher)

    # The stages.
    key = digest(job.source_digest, run.dtype, run.seed)
    model = (params, config)
    results = []
    for i in range(len(job.run.stages)):
        results.append(run_stage(job, steps, i, model, original, key))
        model, key = results[-1].model, results[-1].key
    params, config = model

    # The result, read back from disk before it is measured.
    result = _exported(job, steps, params, config, key)
    with steps.timed("read back"):
        config, params = load_hf(result, run.dtype or None, job.mesh)
    key = digest(key, job.evaluation_text)
    before, after = _evaluated(job, steps, original, (params, config), key)

    stages = [result.report for result in results]
    report: Report = {
        **_frame(job),
        "output": {"path": str(result), "dtype": stored_dtype(result)},
        "before": describe_model(original[1], job.teacher, before),
        "after": describe_model(config, result, after),
        "source": describe_source(job.source, run.model, job.config, job.source_digest),
        "stages": stages,
        "loader": describe_loader(config, stored_dtype(result)),
        "warnings": describe_warnings(stages, config),
        "seconds": steps.seconds,
        "peak_memory_mib": peak_memory_mib(),
    }
    paths = reports.write_report(report, job.folder, card_folder=result)
    names = {"json": "report.json", "html": "report.html", "card": "model card"}
    return report, {"checkpoint": result} | {names[kind]: path for kind, path in paths.items()}


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


def _exported(
    job: Job, steps: Steps, params: dict[str, Any], config: ModelConfig, key: str
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
    report, paths = compress(RunConfig.from_dict(settings.to_dict()))
    print(reports.summary_table(report), end="\n\n")
    cli.print_paths(paths)


if __name__ == "__main__":
    cli.run_with_config(main, "What to compress and how, such as configs/quickstart.py.")
