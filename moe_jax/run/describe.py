"""What a run's steps say in its report: plain data in the schema of ``moe_jax.report``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.distill import TrainSettings
from moe_jax.hf.config_export import has_novices, has_widths_or_bias, needs_modeling_file
from moe_jax.params import ITEM_BYTES, count_params
from moe_jax.plan import Plan
from moe_jax.report.tables import underdetermined_experts
from moe_jax.run.describe_stage import fates
from moe_jax.settings import TrainingConfig
from moe_jax.statistics import Stats

# Below this many tokens an expert's mean and variance say little.
_FEW_TOKENS = 32
# What serving kernels like expert widths to be multiples of.
_ALIGNMENT = 32
_SHOWN_NAMES = 5
_SHOWN_METRICS = ("step", "loss", "distill", "lm", "hidden", "router", "balance", "learning_rate")


def describe_source(folder: Path, name: str, config: ModelConfig) -> dict[str, Any]:
    """Where the model came from; ``id`` only if it is a hub repository."""
    found = {"path": str(folder), "family": config.family}
    return found if Path(name).expanduser().exists() else {**found, "id": name}


def describe_model(
    config: ModelConfig, folder: Path, evaluation: dict[str, Any] | None
) -> dict[str, Any]:
    """Parameters, stored bytes and held-out losses."""
    described: dict[str, Any] = {
        "parameters": dataclasses.asdict(count_params(config)),
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }
    return described if evaluation is None else {**described, "evaluation": evaluation}


def describe_training(
    settings: TrainSettings, text: TrainingConfig, metrics: list[dict[str, float]]
) -> dict[str, Any]:
    """One training: how, on how much, and its numbers over time."""
    default = TrainSettings(settings.steps, warmup_steps=settings.warmup_steps)
    chosen = {
        name: value
        for name, value in settings.facts().items()
        if value != default.facts().get(name) or name in ("loss", "learning_rate")
    }
    speeds = [m["tokens_per_second"] for m in metrics if "tokens_per_second" in m]
    return {
        "settings": chosen,
        "steps": settings.steps,
        "tokens": settings.steps * text.batch_size * text.seq_len,
        "tokens_per_second": float(np.median(speeds)) if speeds else None,
        "metrics": [{name: m[name] for name in _SHOWN_METRICS if name in m} for m in metrics],
    }


def describe_routing(stats: Stats, plan: Plan) -> list[dict[str, Any]]:
    """Share of each domain's selections that went to each expert, by layer."""
    domains = stats.facts.get("domains", {})
    routing = []
    for i in sorted(stats.layers):
        frequency = {}
        for name, domain in domains.items():
            count = np.asarray(domain["count"][str(i)], np.float64)
            frequency[name] = (count / max(count.sum(), 1)).tolist()
        gone = fates(plan, i)
        if i in plan.dropped_layers:
            gone["removed"] = list(range(len(stats.layers[i]["count"])))
        routing.append({"layer": i, "frequency": frequency, **gone})
    return routing


def describe_loader(config: ModelConfig, dtype: str | None) -> dict[str, Any]:
    """What it takes to load the result, whose weights are stored as ``dtype``."""
    if not needs_modeling_file(config):
        notes = ["The stock transformers class loads this checkpoint."]
        if any(layer.num_heads * config.head_dim != config.width for layer in config.layers):
            notes.append(
                "transformers reads head_dim from config.json; a loader that derives it from "
                "hidden_size / num_attention_heads gets it wrong."
            )
        itemsize = ITEM_BYTES.get(dtype or "", 2)
        if any(config.moe(i).expert_width * itemsize % 16 for i in config.moe_layers):
            notes.append(
                'transformers runs this expert width with experts_implementation="eager" only: '
                f"torch's grouped matmul wants multiples of {16 // itemsize}."
            )
        return {"trust_remote_code": False, "notes": notes}
    notes = [
        "The stock class cannot hold this architecture: pass trust_remote_code=True, which runs "
        "the modelling file in this folder."
    ]
    if has_novices(config):
        notes.append(
            "Novices are stored in the MoNE authors' format (approximate_experts, "
            "experts.N.approx_value)"
            + (
                "."
                if has_widths_or_bias(config)
                else " and described in compression_config as expert_substitution (constant-v1), "
                "which serving engines with novice support read."
            )
        )
    if has_widths_or_bias(config):
        notes.append(
            "Experts of different widths, or with constants beside their neurons, are described "
            "under moe_jax_layers."
        )
    return {"trust_remote_code": True, "notes": notes}


def describe_warnings(
    stages: list[dict[str, Any]],
    measured: Sequence[Stats | None],
    num_sequences: int,
    config: ModelConfig,
) -> list[str]:
    """Sentences on what a reader should not miss.

    Args:
        stages: what ``describe_stage`` gave of each.
        measured: the statistics of each.
        num_sequences: that calibration was asked for.
        config: of the result.
    """
    warnings = []
    for n, (stage, stats) in enumerate(zip(stages, measured, strict=True)):
        texts = [] if stats is None else _coverage_warnings(stats, num_sequences)
        warnings += [f"Stage {n}: {text}" for text in (*texts, *_moment_warnings(stage))]
    widths = {config.moe(i).expert_width for i in config.moe_layers}
    odd = sorted(width for width in widths if width % _ALIGNMENT)
    if odd and any(
        stage["layers"] and stage["layers"][0]["expert_width"][0] not in widths for stage in stages
    ):
        warnings.append(
            f"Expert width {odd[0]} is not a multiple of {_ALIGNMENT}, which serving kernels "
            "prefer; set round_to."
        )
    return warnings


def _moment_warnings(stage: dict[str, Any]) -> list[str]:
    """Where second moments are singular."""
    lines = underdetermined_experts(stage)
    if not lines:
        return []
    few = sum(len(layer["fewer_tokens_than_neurons"]) for layer in stage["layers"])
    more = len(lines) - _SHOWN_NAMES
    names = "; ".join(lines[:_SHOWN_NAMES]) + (f"; and {more} more layers" if more > 0 else "")
    every = sum(layer["num_experts"] for layer in stage["layers"])
    return [
        f"{few} of {every} experts were reached by fewer tokens than they have neurons ({names}): "
        "their second moments are singular, and the ridge decides what the text leaves open; "
        "calibrate on more text."
    ]


def _coverage_warnings(stats: Stats, num_sequences: int) -> list[str]:
    """What calibration text was too little for."""
    warnings = []
    if stats.sequences < num_sequences:
        found = ", ".join(
            f"{name} {domain['sequences']}" for name, domain in stats.facts["domains"].items()
        )
        warnings.append(
            f"{stats.sequences} of the {num_sequences} calibration sequences wanted were found "
            f"({found}); set pack to cut long documents into several, or give more text."
        )
    counts = np.concatenate([layer["count"] for layer in stats.layers.values()])
    unreached = stats.unreached()
    if unreached:
        more = len(unreached) - _SHOWN_NAMES
        names = ", ".join(unreached[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
        warnings.append(
            f"no calibration token reached {len(unreached)} of {counts.size} experts ({names}); "
            "their scores are 0."
        )
    few = int((counts < _FEW_TOKENS).sum()) - len(unreached)
    if few:
        warnings.append(
            f"{few} of {counts.size} experts were reached by fewer than {_FEW_TOKENS} "
            "calibration tokens; calibrate on more text to rank them."
        )
    return warnings
