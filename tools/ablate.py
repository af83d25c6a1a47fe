"""Ablations of slimming and distillation on the shipped models: tables and figures.

    python tools/ablate.py --config=configs/ablations.py
    python tools/ablate.py --config=configs/distill_start.py

Runs every arm of every study with every seed; a seed decides the calibration sample, the order of
the training text and sampled routing. Arms with the same stages are run once. What is there
already is kept, so a rerun goes on. Writes to ``config.output``:

    runs/*.json      one per arm and seed: held-out losses by domain, losses of the training
    results.json     mean and standard deviation over seeds
    table.md         the same as tables
    studies.png, curves.png

With ``config.marks``, shares of the steps, an arm is a cut and several trainings after it, of so
many steps each (see ``course``). Then ``table.md`` tells how many tokens an arm needs for what
another one reaches, and ``course.png`` takes the place of the other figures.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import math
import shutil
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from moe_jax.calibrate import Measurement, calibrate_domains, domain_batches
from moe_jax.cli import run_with_config
from moe_jax.compare.figures import method_styles
from moe_jax.config import ModelConfig
from moe_jax.data import (
    evaluation_windows,
    fingerprint,
    load_tokenizer,
    training_dataset,
)
from moe_jax.distill import TrainingRun, TrainSettings, train
from moe_jax.distill.step import arranged, initial_state, make_step, result_of
from moe_jax.evaluate import evaluate
from moe_jax.files import write_json
from moe_jax.hf import load_hf
from moe_jax.identity import checkpoint_digest, digest
from moe_jax.metrics import read_metrics
from moe_jax.params import count_params
from moe_jax.plan import plan_cut
from moe_jax.prune import apply_plan
from moe_jax.report.figures.quality import log_scale
from moe_jax.report.figures.theme import Theme, legend_above, panels, themed
from moe_jax.run.stage import StageConfig
from moe_jax.settings import CalibrationConfig, EvaluationConfig, TrainingConfig, section

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Model = tuple[dict[str, Any], ModelConfig]
_DPI = 110
_logger = logging.getLogger("moe_jax.ablate")
_step_function = functools.cache(make_step)  # arms of one shape share their programs


class Teacher:
    """One model with the text that its arms are calibrated, trained and evaluated on."""

    def __init__(self, folder: str, settings: Mapping[str, Any]) -> None:
        self.config, self.params = load_hf(folder, dtype="float32")
        self.tokenizer = load_tokenizer(folder)
        self.calibration = section(CalibrationConfig, settings["calibration"], "calibration")
        self.training = TrainingConfig(**settings["training"])
        evaluation = EvaluationConfig(**settings["evaluation"])
        self.windows = evaluation_windows(
            evaluation, self.tokenizer, vocab_size=self.config.vocab_size
        )
        self._statistics: dict[str, Any] = {}

    def measured(self, params, config, stage: StageConfig, seed: int, key: str):
        """Statistics of a model; those of the teacher itself are kept for other arms."""
        second_moments = stage.cut.needs_second_moments
        key = digest(key, seed, stage.losses, second_moments)
        if key not in self._statistics:
            domains = domain_batches(
                self.calibration.files, self.tokenizer, self.calibration, seed=seed
            )
            stats = calibrate_domains(
                params,
                config,
                domains,
                Measurement(
                    stage.losses,
                    (self.params, self.config),
                    second_moments=second_moments,
                    seed=seed,
                ),
            )
            if params is not self.params:
                return stats
            self._statistics[key] = stats
        return self._statistics[key]

    @functools.cached_property
    def bits_per_byte(self) -> float:
        """Of the original, on the held-out text."""
        return evaluate(self.params, self.config, self.windows).mean.bits_per_byte

    def evaluated(self, params, config) -> dict[str, Any]:
        """Held-out losses."""
        original = (self.params, self.config)
        return evaluate(params, config, self.windows, reference=original).to_dict()

    def cut(self, params, config, stage: StageConfig, seed: int, key: str):
        """Weights and configuration after the stage's cut."""
        if not stage.cuts:
            return params, config
        stats = self.measured(params, config, stage, seed, key)
        config, params = apply_plan(
            params, config, plan_cut(stage.cut, stats, config, seed=seed, params=params).plan, stats
        )
        return params, config

    def batches(self, seed: int, start: int = 0):
        """The training stream from its batch ``start`` on."""
        return training_dataset(self.training, self.tokenizer, seed=seed, start=start)

    def run(self, stages: tuple[StageConfig, ...], seed: int, folder: Path) -> dict[str, Any]:
        """Carries out an arm: sizes, held-out losses, and the training's losses by tokens."""
        params, config = self.params, self.config
        first_batch, curve = 0, []
        per_step = self.training.batch_size * self.training.seq_len
        for i, stage in enumerate(stages):
            params, config = self.cut(params, config, stage, seed, str(i))
            if stage.distill is None:
                continue
            params = train(
                params,
                config,
                self.batches(seed, first_batch),
                stage.distill,
                TrainingRun(folder / str(i)),
                (self.params, self.config),
            )
            for record in read_metrics(folder / str(i) / "metrics.jsonl"):
                step = first_batch + record["step"]
                curve.append({"tokens": step * per_step, "stage": i, "lm": record["lm"]})
            first_batch += stage.distill.steps
        counts = count_params(config)
        return {
            "parameters": counts.total,
            "active": counts.active,
            "training_tokens": first_batch * per_step,
            "evaluation": self.evaluated(params, config),
            "curve": curve,
        }

    def run_course(
        self, stage: StageConfig, seed: int, marks: Iterable[float], cooldown: float
    ) -> dict[str, Any]:
        """Carries out a cut, and trainings of ``marks`` of the stage's steps: losses by tokens."""
        assert stage.distill is not None
        params, config = self.cut(self.params, self.config, stage, seed, "0")
        steps = sorted({max(1, round(stage.distill.steps * mark)) for mark in marks})
        evaluations = {0: self.evaluated(params, config)}
        for step, trained in course(
            (params, config),
            (self.params, self.config),
            self.batches(seed),
            stage.distill,
            steps,
            cooldown,
        ):
            evaluations[step] = self.evaluated(trained, config)
        per_step = self.training.batch_size * self.training.seq_len
        counts = count_params(config)
        return {
            "parameters": counts.total,
            "active": counts.active,
            "training_tokens": steps[-1] * per_step,
            "evaluation": evaluations[steps[-1]],
            "original": self.bits_per_byte,
            "course": [{**e["mean"], "tokens": n * per_step} for n, e in evaluations.items()],
        }


def course(
    student: Model,
    teacher: Model,
    batches: Iterable[Mapping[str, Any]],
    settings: TrainSettings,
    marks: Sequence[int],
    cooldown: float,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Weights after trainings of several lengths, each with a schedule of its own.

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

    def advance(state, first: int, last: int, **schedule):
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


def with_steps(stage: Mapping[str, Any], settings: Mapping[str, Any], seed: int) -> StageConfig:
    """A stage whose share of the steps became a number."""
    raw = dict(stage)
    if "distill" in raw:
        distill = {**settings["distill"], **raw["distill"], "seed": seed}
        distill["steps"] = max(1, round(settings["steps"] * distill.pop("share")))
        raw["distill"] = distill
    return StageConfig.from_dict(raw, "stage")


def changed(settings: Any) -> dict[str, Any]:
    """Fields of a dataclass that are not at their defaults: new ones leave a digest as it was."""
    values = {
        field.name: changed(value) if dataclasses.is_dataclass(value) else value
        for field in dataclasses.fields(settings)
        if (value := getattr(settings, field.name)) != _default(field)
    }
    return values | values.pop("cut", {})


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def run_all(settings: Mapping[str, Any], output: Path) -> dict[str, dict[str, list[dict]]]:
    """Results by study and arm, one per seed."""
    teachers: dict[str, Teacher] = {}
    results: dict[str, dict[str, list[dict]]] = {}
    common = {k: settings[k] for k in ("calibration", "training", "evaluation")}
    schedule = {k: settings[k] for k in ("marks", "cooldown") if k in settings}
    texts = {k: fingerprint(section["files"]) for k, section in common.items()}
    folders = {arm["model"] for _, arms in settings["studies"] for _, arm in arms}
    sources = {folder: [checkpoint_digest(Path(folder)), texts] for folder in folders}
    for seed in settings["seeds"]:
        for study, arms in settings["studies"]:
            for arm, description in arms:
                folder, stages = description["model"], description["stages"]
                configured = tuple(with_steps(stage, settings, seed) for stage in stages)
                given = [changed(stage) for stage in configured]
                name = digest(sources[folder], given, seed, common, *schedule.values())
                file = output / "runs" / f"{name}.json"
                if not file.exists():
                    _logger.info("seed %d: %s: %s", seed, study, arm)
                    if folder not in teachers:
                        teachers[folder] = Teacher(folder, settings)
                    work = output / "runs" / f"{name}.training"
                    if schedule:
                        (stage,) = configured
                        result = teachers[folder].run_course(stage, seed, **schedule)
                    else:
                        result = teachers[folder].run(configured, seed, work)
                    write_json(file, {"study": study, "arm": arm, "seed": seed, **result})
                    shutil.rmtree(work, ignore_errors=True)
                results.setdefault(study, {}).setdefault(arm, []).append(
                    json.loads(file.read_text())
                )
        write_results(results, output)
    return results


def mean_and_spread(runs: Sequence[dict], *path: str) -> tuple[float, float]:
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
        if all("course" in run for runs in arms.values() for run in runs):
            summary[study]["courses"] = courses(arms)
            lines += [*course_table(arms), ""]
    write_json(output / "results.json", summary)
    (output / "table.md").write_text("\n".join(lines))
    if all("courses" in study for study in summary.values()):
        draw_courses(results).savefig(output / "course.png", dpi=_DPI)
    else:
        draw(results, output)


def by_mark(runs: Sequence[dict]) -> list[tuple[dict, ...]]:
    """The points of a course, each with those of all seeds."""
    return list(zip(*(run["course"] for run in runs), strict=True))


def tokens_to_reach(points: Sequence[Mapping[str, float]], bits_per_byte: float) -> float | None:
    """Where a course first gets so low, on straight lines between its points; None if nowhere."""
    if points[0]["bits_per_byte"] <= bits_per_byte:
        return points[0]["tokens"]
    for before, after in itertools.pairwise(points):
        if after["bits_per_byte"] <= bits_per_byte:
            drop = before["bits_per_byte"] - after["bits_per_byte"]
            share = (before["bits_per_byte"] - bits_per_byte) / drop
            return before["tokens"] + share * (after["tokens"] - before["tokens"])
    return None


def tokens_needed(runs: Sequence[dict], others: Sequence[dict]) -> list[list[float | None]]:
    """For each mark of another arm and each seed: tokens for the bits per byte that it has."""
    return [
        [
            tokens_to_reach(run["course"], point["bits_per_byte"])
            for run, point in zip(runs, points, strict=True)
        ]
        for points in by_mark(others)
    ]


def courses(arms: Mapping[str, Sequence[dict]]) -> dict[str, Any]:
    """By arm: its points over seeds, and the tokens that it needs for each point of the others."""
    return {
        arm: {
            "points": [
                {
                    "tokens": points[0]["tokens"],
                    **{k: mean_and_spread(points, k) for k in ("bits_per_byte", "kl")},
                }
                for points in by_mark(runs)
            ],
            "needed": {o: tokens_needed(runs, others) for o, others in arms.items() if o != arm},
        }
        for arm, runs in arms.items()
    }


def course_table(arms: Mapping[str, Sequence[dict]]) -> list[str]:
    """Bits per byte by tokens, and what every arm needs for the same as each other one."""
    marks = [points[0]["tokens"] for points in by_mark(next(iter(arms.values())))]
    lines = ["| tokens | " + " | ".join(f"{tokens:,}" for tokens in marks) + " |"]
    lines += ["|---" * (len(marks) + 1) + "|"]
    for arm, runs in arms.items():
        cells = [mean_and_spread(points, "bits_per_byte") for points in by_mark(runs)]
        lines.append(f"| {arm} | " + " | ".join(f"{m:.3f} ± {s:.3f}" for m, s in cells) + " |")
    for arm, runs in arms.items():
        for other in (name for name in arms if name != arm):
            needed = [needed_text(found, marks[-1]) for found in tokens_needed(runs, arms[other])]
            lines.append(f"| {arm}: tokens for the same as {other} | " + " | ".join(needed) + " |")
    return lines


def needed_text(found: Sequence[float | None], most: int) -> str:
    """Mean and spread over seeds, and on how many ``most`` tokens were too few."""
    reached = [{"tokens": tokens} for tokens in found if tokens is not None]
    if not reached:
        return f"> {most:,}"
    mean, spread = mean_and_spread(reached, "tokens")
    if len(reached) == len(found):
        return f"{mean:,.0f} ± {spread:,.0f}"
    return f"{mean:,.0f} on {len(reached)} of {len(found)} seeds, else > {most:,}"


@themed
def draw_courses(theme: Theme, results: Mapping[str, Mapping[str, Sequence[dict]]]) -> Figure:
    """Bits per byte over the original's by tokens of distillation: a panel per study."""
    figure, places = panels(list(results), 2.9, columns=2)
    for axes, arms in zip(places, results.values(), strict=True):
        axes.grid(axis="x")
        axes.set_xlabel("thousand tokens of distillation")
        draw_course(axes, arms, theme)
    figure.supylabel("bits per byte more than the original")
    legend_above(figure, places[-1].get_legend_handles_labels()[0])
    return figure


def draw_course(axes: Axes, arms: Mapping[str, Sequence[dict]], theme: Theme) -> None:
    """Means with bands of a standard deviation over seeds.

    A dotted line goes on from where the last arm starts, to meet the others where they get there.
    """
    original = next(iter(arms.values()))[0]["original"]
    *_, focus = arms
    styles = method_styles(list(arms), focus, theme)
    lowest = math.inf
    for arm, runs in arms.items():
        tokens = [points[0]["tokens"] / 1e3 for points in by_mark(runs)]
        numbers = [mean_and_spread(points, "bits_per_byte") for points in by_mark(runs)]
        means = [mean - original for mean, _ in numbers]
        low, high = (
            [mean - original + sign * spread for mean, spread in numbers] for sign in (-1, 1)
        )
        axes.plot(tokens, means, label=arm, **styles[arm])
        axes.fill_between(tokens, low, high, color=styles[arm]["color"], alpha=0.2, linewidth=0)
        lowest = min(lowest, *low)
        if arm == focus:
            line = {"color": styles[arm]["color"], "linestyle": ":", "linewidth": 1.4}
            axes.axhline(means[0], label=f"{arm}, no distillation", **line)
    if lowest > 0:
        log_scale(axes, "+{:g}")


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


def main(config: ConfigDict, _: Sequence[str]) -> None:
    """The command line."""
    settings = config.to_dict()
    output = Path(settings["output"])
    # The same programs serve every seed and rerun.
    jax.config.update("jax_compilation_cache_dir", str((output / "compiled").absolute()))
    run_all(settings, output)
    print((output / "table.md").read_text())


if __name__ == "__main__":
    run_with_config(main, "Ablations, such as configs/ablations.py.")
