"""Ablations of slimming and distillation on the shipped models: tables and figures.

    python tools/ablate.py --config=configs/ablations.py

Runs every arm of every study with every seed; a seed decides the calibration sample, the order of
the training text and sampled routing. Arms with the same stages are run once. What is there
already is kept, so a rerun goes on. Writes to ``config.output``:

    runs/*.json      one per arm and seed: held-out losses by domain, losses of the training
    results.json     mean and standard deviation over seeds
    table.md         the same as tables
    studies.png, curves.png
"""

from __future__ import annotations

import json
import logging
import shutil
import statistics
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import matplotlib
from absl import app
from ml_collections import config_flags

from moe_jax.calibrate import calibrate_domains, domain_batches
from moe_jax.cli import show_progress
from moe_jax.data import (
    EvaluationWindows,
    evaluation_windows,
    fingerprint,
    load_tokenizer,
    training_dataset,
)
from moe_jax.distill import train
from moe_jax.evaluate import evaluate
from moe_jax.files import write_json
from moe_jax.hf import load_hf
from moe_jax.metrics import read_metrics
from moe_jax.prune import apply_plan
from moe_jax.run.config import CalibrationConfig, EvaluationConfig, TrainingConfig
from moe_jax.run.files import checkpoint_digest, digest
from moe_jax.run.stage import StageConfig
from moe_jax.run.stages import plan_stage
from moe_jax.shapes import count_params

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_CONFIG = config_flags.DEFINE_config_file("config", None, "Ablations, configs/ablations.py.")
_logger = logging.getLogger("moe_jax.ablate")


class Teacher:
    """One model with the text that its arms are calibrated, trained and evaluated on."""

    def __init__(self, folder: str, settings: Mapping[str, Any]) -> None:
        self.config, self.params = load_hf(folder, dtype="float32")
        self.tokenizer = load_tokenizer(folder)
        self.calibration = CalibrationConfig.from_dict(settings["calibration"])
        self.training = TrainingConfig(**settings["training"])
        evaluation = EvaluationConfig(**settings["evaluation"])
        self.windows: Mapping[str, EvaluationWindows] = evaluation_windows(
            evaluation.files,
            self.tokenizer,
            seq_len=evaluation.seq_len,
            batch_size=evaluation.batch_size,
            max_bytes=evaluation.max_bytes,
            vocab_size=self.config.vocab_size,
        )
        self._statistics: dict[str, Any] = {}

    def measured(self, params, config, stage: StageConfig, seed: int, key: str):
        """Statistics of a model; those of the teacher itself are kept for other arms."""
        key = digest(key, seed, stage.losses)
        if key not in self._statistics:
            domains = domain_batches(
                self.calibration.files, self.tokenizer, self.calibration, seed=seed
            )
            stats = calibrate_domains(
                params,
                config,
                domains,
                seed=seed,
                importance=stage.losses,
                teacher=(self.params, self.config),
            )
            if params is not self.params:
                return stats
            self._statistics[key] = stats
        return self._statistics[key]

    def run(self, stages: tuple[StageConfig, ...], seed: int, folder: Path) -> dict[str, Any]:
        """Carries out an arm: sizes, held-out losses, and the training's losses by tokens."""
        params, config = self.params, self.config
        first_batch, curve, tokens = 0, [], 0
        for i, stage in enumerate(stages):
            if stage.cuts:
                stats = self.measured(params, config, stage, seed, str(i))
                plan = plan_stage(stage, stats, config, seed)
                config, params = apply_plan(params, config, plan, stats)
            if stage.distill is None:
                continue
            dataset = training_dataset(
                self.training.files,
                self.tokenizer,
                seq_len=self.training.seq_len,
                batch_size=self.training.batch_size,
                seed=seed,
                start=first_batch,
                cache_dir=self.training.cache_dir or None,
            )
            teacher = (self.params, self.config)
            params = train(params, config, dataset, stage.distill, folder / str(i), teacher=teacher)
            per_step = self.training.batch_size * self.training.seq_len
            for record in read_metrics(folder / str(i) / "metrics.jsonl"):
                step = first_batch + record["step"]
                curve.append({"tokens": step * per_step, "stage": i, "lm": record["lm"]})
            first_batch += stage.distill.steps
            tokens = first_batch * per_step
        result = evaluate(
            params, config, self.windows, reference=(self.params, self.config)
        ).to_dict()
        counts = count_params(config)
        return {
            "parameters": counts.total,
            "active": counts.active,
            "training_tokens": tokens,
            "evaluation": result,
            "curve": curve,
        }


def with_steps(stage: Mapping[str, Any], settings: Mapping[str, Any], seed: int) -> StageConfig:
    """A stage whose share of the steps became a number."""
    raw = dict(stage)
    if "distill" in raw:
        distill = {**settings["distill"], **raw["distill"], "seed": seed}
        distill["steps"] = max(1, round(settings["steps"] * distill.pop("share")))
        raw["distill"] = distill
    return StageConfig.from_dict(raw, "stage")


def run_all(settings: Mapping[str, Any], output: Path) -> dict[str, dict[str, list[dict]]]:
    """Results by study and arm, one per seed."""
    teachers: dict[str, Teacher] = {}
    results: dict[str, dict[str, list[dict]]] = {}
    common = {k: settings[k] for k in ("calibration", "training", "evaluation")}
    texts = {k: fingerprint(section["files"]) for k, section in common.items()}
    folders = {arm["model"] for _, arms in settings["studies"] for _, arm in arms}
    sources = {folder: [checkpoint_digest(Path(folder)), texts] for folder in folders}
    for seed in settings["seeds"]:
        for study, arms in settings["studies"]:
            for arm, description in arms:
                folder, stages = description["model"], description["stages"]
                configured = tuple(with_steps(stage, settings, seed) for stage in stages)
                name = digest(sources[folder], repr(configured), seed, common)
                file = output / "runs" / f"{name}.json"
                if not file.exists():
                    _logger.info("seed %d: %s: %s", seed, study, arm)
                    if folder not in teachers:
                        teachers[folder] = Teacher(folder, settings)
                    work = output / "runs" / f"{name}.training"
                    result = teachers[folder].run(configured, seed, work)
                    write_json(file, {"study": study, "arm": arm, "seed": seed, **result})
                    shutil.rmtree(work, ignore_errors=True)
                results.setdefault(study, {}).setdefault(arm, []).append(
                    json.loads(file.read_text())
                )
        write_results(results, output)
    return results


def mean_and_spread(runs: list[dict], *path: str) -> tuple[float, float]:
    values = []
    for run in runs:
        value: Any = run
        for key in path:
            value = value[key]
        values.append(value)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def write_results(results: Mapping[str, Mapping[str, list[dict]]], output: Path) -> None:
    """Numbers, tables and figures of what there is so far."""
    summary: dict[str, Any] = {}
    lines = []
    for study, arms in results.items():
        lines += [f"### {study}", ""]
        lines += ["| | parameters | tokens | bits per byte | KL to the original | top-1 |"]
        lines += ["|---|---|---|---|---|---|"]
        for arm, runs in arms.items():
            numbers = {
                name: mean_and_spread(runs, "evaluation", "mean", key)
                for name, key in (
                    ("bits_per_byte", "bits_per_byte"),
                    ("kl", "kl"),
                    ("top1_agreement", "top1_agreement"),
                )
            }
            facts = {key: runs[0][key] for key in ("parameters", "active", "training_tokens")}
            summary.setdefault(study, {})[arm] = {**facts, **numbers, "seeds": len(runs)}
            bits, kl, top = (f"{m:.3f} ± {s:.3f}" for m, s in numbers.values())
            lines.append(
                f"| {arm} | {facts['parameters'] / 1e6:.2f}M | {facts['training_tokens']:,} "
                f"| {bits} | {kl} | {top} |"
            )
        lines.append("")
    write_json(output / "results.json", summary)
    (output / "table.md").write_text("\n".join(lines))
    draw(results, output)


def draw(results: Mapping[str, Mapping[str, list[dict]]], output: Path) -> None:
    """Every study as points with spreads; recovery as curves over tokens.

    The text is new at each step and the same for all arms: curves rise and fall together with it.
    """
    columns = 2
    rows = -(-len(results) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(12, 2.6 * rows), squeeze=False)
    for axis, (study, arms) in zip(axes.flat, results.items(), strict=False):
        numbers = [mean_and_spread(r, "evaluation", "mean", "bits_per_byte") for r in arms.values()]
        means, spreads = zip(*numbers, strict=True)
        places = range(len(arms))[::-1]
        axis.errorbar(means, list(places), xerr=spreads, fmt="o", capsize=3, color="#2563eb")
        axis.set_yticks(list(places), list(arms), fontsize=8)
        axis.set_ylim(-0.6, len(arms) - 0.4)
        axis.set_title(textwrap.fill(study, 56), fontsize=9, loc="left")
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(results) :]:
        axis.set_visible(False)
    figure.supxlabel("held-out bits per byte, mean of domains (lower is better)", fontsize=9)
    figure.tight_layout()
    figure.savefig(output / "studies.png", dpi=110)
    plt.close(figure)

    figure, axes = plt.subplots(1, 2, figsize=(12, 3.6))
    titles = [next((s for s in results if s.startswith(n)), None) for n in ("Stages", "Recovery")]
    for axis, study in zip(axes, titles, strict=True):
        if study is None:
            axis.set_visible(False)
            continue
        for arm, runs in results[study].items():
            if runs[0]["curve"]:
                tokens = [point["tokens"] / 1e3 for point in runs[0]["curve"]]
                losses = [
                    statistics.fmean(run["curve"][i]["lm"] for run in runs)
                    for i in range(len(tokens))
                ]
                axis.plot(tokens, smoothed(losses), label=arm, linewidth=1.4)
        axis.set_title(study, fontsize=9, loc="left")
        axis.set_xlabel("thousand training tokens", fontsize=8)
        axis.set_ylabel("cross-entropy of new text, nats", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(output / "curves.png", dpi=110)
    plt.close(figure)


def smoothed(values: list[float], window: int = 3) -> list[float]:
    """Centred mean over up to ``2 * window + 1`` values."""
    return [
        statistics.fmean(values[max(0, i - window) : i + window + 1]) for i in range(len(values))
    ]


def main(_: list[str]) -> None:
    show_progress()
    settings = _CONFIG.value.to_dict()
    output = Path(settings["output"])
    # The same programs serve every seed and rerun.
    jax.config.update("jax_compilation_cache_dir", str((output / "compiled").absolute()))
    run_all(settings, output)
    print((output / "table.md").read_text())


if __name__ == "__main__":
    app.run(main)
