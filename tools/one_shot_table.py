"""Held-out loss after every one-shot method at several sizes: the tables of the README.

    python tools/one_shot_table.py --model=moe_jax/assets/olmoe --output=outputs/one_shot_olmoe

Removes experts by several criteria and slims them by every importance, from one calibration, and
writes ``results.json`` and ``table.md``. Existing results are kept, so a rerun goes on.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from absl import app, flags

from moe_jax.calibrate import calibrate_by_domain
from moe_jax.data import load_tokenizer
from moe_jax.data.documents import expand_files
from moe_jax.data.evaluation import evaluation_windows
from moe_jax.evaluate import evaluate
from moe_jax.files import write_json
from moe_jax.hf import load_hf
from moe_jax.plan import make_plan
from moe_jax.prune import apply_plan
from moe_jax.run.config import CalibrationConfig
from moe_jax.run.files import digest
from moe_jax.scoring import IMPORTANCE_LOSSES, score
from moe_jax.shapes import count_params
from moe_jax.statistics import Stats

_MODEL = flags.DEFINE_string("model", "moe_jax/assets/olmoe", "Checkpoint folder.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the results.", required=True)
_CALIBRATION = flags.DEFINE_string(
    "calibration", "moe_jax/assets/text/calibration/*.jsonl.xz", "Calibration text."
)
_EVALUATION = flags.DEFINE_string(
    "evaluation", "moe_jax/assets/text/evaluation/*.jsonl.xz", "Held-out text."
)
_SEQUENCES = flags.DEFINE_integer("sequences", 128, "Calibration sequences.")
_MAX_BYTES = flags.DEFINE_integer("max_bytes", 24_000, "Held-out bytes per domain.")

# Row name -> (criterion, what becomes of a removed expert).
EXPERT_ROWS = {
    "random, deleted": ("random", "delete"),
    "frequency, deleted": ("frequency", "delete"),
    "MoNE score, deleted": ("mone", "delete"),
    "MoNE score, zero instead of novice": ("mone", "zero"),
    "frequency, novices": ("frequency", "novice"),
    "output deviation, novices": ("output_deviation", "novice"),
    "MoNE (novices)": ("mone", "novice"),
}
REMOVED = (0.25, 0.5)
NEURON_ROWS = {
    "random": ("random_neurons", ""),
    "weight norm": ("weight_norm", ""),
    "activation norm": ("activation_norm", ""),
    "LM loss, absolute sum of each batch": ("lm", "batch_abs"),
    "KD top-8, absolute sum of each batch": ("kd_topk", "batch_abs"),
    "KD top-8, absolute sum of each sequence": ("kd_topk", "sequence_abs"),
    "KD full vocabulary, train-mode routing": ("kd_full", "batch_abs"),
    "Fisher": ("fisher", ""),
}
WIDTHS = (0.75, 0.5, 0.25, 0.15)
RANDOM_SEEDS = (0, 1, 2)


def main(_: list[str]) -> None:
    output = Path(_OUTPUT.value)
    config, params = load_hf(_MODEL.value, "float32")
    tokenizer = load_tokenizer(_MODEL.value)
    windows = evaluation_windows(
        expand_files(_EVALUATION.value),
        tokenizer,
        seq_len=512,
        batch_size=8,
        max_bytes=_MAX_BYTES.value,
    )
    losses = [n for n in IMPORTANCE_LOSSES if n != "kd_full" or config.router.kind != "softmax"]
    settings = CalibrationConfig(num_sequences=_SEQUENCES.value)
    path = output / "statistics"
    if not path.with_suffix(".json").exists():
        stats = calibrate_by_domain(
            params,
            config,
            expand_files(_CALIBRATION.value),
            tokenizer,
            settings,
            importance=losses,
        )
        stats.save(path)
    stats = Stats.load(path)
    results_file = output / "results.json"
    results = json.loads(results_file.read_text()) if results_file.exists() else {}

    def measure(name: str, model: tuple) -> dict:
        key = digest(name, stats.tokens, _MAX_BYTES.value)
        if key not in results:
            small, weights = model
            evaluation = evaluate(weights, small, windows, description=name)
            results[key] = {
                "name": name,
                "parameters": count_params(small).total,
                "bits_per_byte": evaluation.mean.bits_per_byte,
                "domains": {d: e.bits_per_byte for d, e in evaluation.domains.items()},
            }
            write_json(results_file, results)
            print(f"{name}: {results[key]['bits_per_byte']:.4f}", flush=True)
        return results[key]

    original = measure("original", (config, params))
    lines = [f"Original: {original['bits_per_byte']:.4f} bits per byte.", ""]
    lines += _header("method", [f"{share:.0%} removed" for share in REMOVED])
    for row, (criterion, replacement) in EXPERT_ROWS.items():
        cells = []
        for share in REMOVED:
            seeds = RANDOM_SEEDS if criterion == "random" else (0,)
            values = []
            for seed in seeds:
                scores = score(stats, criterion, seed=seed)
                plan = make_plan(scores, config, keep_ratio=1 - share, replacement=replacement)
                model = apply_plan(params, config, plan, stats)
                values.append(measure(f"{row} {share:.0%} seed {seed}", model)["bits_per_byte"])
            cells.append(_cell(values))
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    lines += ["", *_header("importance", [f"{ratio:.0%} width" for ratio in WIDTHS])]
    for row, (criterion, aggregation) in NEURON_ROWS.items():
        if criterion == "kd_full" and "kd_full" not in losses:
            continue
        cells = []
        for ratio in WIDTHS:
            options = {"aggregation": aggregation} if aggregation else {}
            scores = score(stats, criterion, **options)
            plan = make_plan(scores, config, width_ratio=ratio)
            model = apply_plan(params, config, plan)
            cells.append(f"{measure(f'{row} {ratio:.0%}', model)['bits_per_byte']:.3f}")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    (output / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _header(first: str, columns: list[str]) -> list[str]:
    return [f"| {first} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]


def _cell(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    app.run(main)
