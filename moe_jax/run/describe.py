"""What a run's steps say in its report: the facts of ``moe_jax.report.facts``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.confidence import describe_confidence
from moe_jax.config import LayerConfig, ModelConfig
from moe_jax.distill import TrainSettings
from moe_jax.hf.config_export import (
    has_novices,
    has_widths_or_bias,
    needs_modeling_file,
    shared_multiple,
)
from moe_jax.hf.families import find_family
from moe_jax.kinds import GroupedQueryAttention
from moe_jax.params import ITEM_BYTES, count_params
from moe_jax.plan import LayerPlan, Plan, kept_neurons
from moe_jax.plan.scores import highest
from moe_jax.report.elements import or_warning
from moe_jax.report.facts import (
    Layer,
    Loader,
    Model,
    Record,
    Source,
    Stage,
    Training,
    gone_ids,
    importance_curve,
)
from moe_jax.run.report_warnings import coverage_warnings, moment_warnings, super_warnings
from moe_jax.run.serving import ServeConfig, serving_command
from moe_jax.run.stage import StageConfig
from moe_jax.scoring import output_deviation
from moe_jax.settings import TrainingConfig
from moe_jax.statistics import Stats
from moe_jax.text import extent, spans


@dataclass(frozen=True)
class Ranking:
    """What a cut rests on.

    Attributes:
        plan: what it removes; None if nothing is cut.
        stats: of calibration; None if nothing was measured.
        scores: by layer, of experts [E] or neurons [E, F], as the plan used them.
    """

    plan: Plan | None = None
    stats: Stats | None = None
    scores: Mapping[int, np.ndarray] | None = None


def describe_source(folder: Path, name: str, config: ModelConfig, digest: str = "") -> Source:
    """Where the model came from; ``id`` only if it is a hub repository."""
    found: Source = {"path": str(folder), "family": config.family}
    if digest:
        found["digest"] = digest
    if not Path(name).expanduser().exists():
        found["id"] = name
    return found


def describe_model(config: ModelConfig, folder: Path, evaluation: dict[str, Any] | None) -> Model:
    """Parameters, stored bytes and held-out losses."""
    described: Model = {
        "parameters": dataclasses.asdict(count_params(config)),  # type: ignore[typeddict-item]
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }
    if evaluation is not None:
        described["evaluation"] = evaluation
    return described


def describe_training(
    settings: TrainSettings, text: TrainingConfig, metrics: list[dict[str, float]]
) -> Training:
    """One training: how, on how much, and its numbers over time."""
    default = TrainSettings(settings.steps, warmup_steps=settings.warmup_steps)
    chosen = {
        name: value
        for name, value in settings.facts().items()
        if value != default.facts().get(name) or name in ("loss", "learning_rate")
    }
    speeds = [m["tokens_per_second"] for m in metrics if "tokens_per_second" in m]
    shown = Record.__annotations__
    return {
        "settings": chosen,
        "steps": settings.steps,
        "tokens": settings.steps * text.batch_size * text.seq_len,
        "tokens_per_second": float(np.median(speeds)) if speeds else None,
        "metrics": [{name: m[name] for name in shown if name in m} for m in metrics],  # type: ignore[typeddict-item, misc]
    }


def describe_loader(
    config: ModelConfig, model_type: str, dtype: str | None, serve: ServeConfig
) -> Loader:
    """What it takes to load the result, and to serve it.

    Args:
        model_type: as its config.json says.
        dtype: that its weights are stored as.
    """
    command = serving_command(config, serve)
    if not needs_modeling_file(config):
        remote = model_type in find_family(config.family).aliases
        notes = [
            f"transformers does not know {model_type}: pass trust_remote_code=True, which runs the "
            "source's own code in this folder."
            if remote
            else "The stock transformers class loads this checkpoint.",
            "vLLM and SGLang read it where they read its source.",
        ]
        if has_novices(config):
            notes.append(
                "Novices are stored as experts without weights, whose bias is the constant "
                "(approximate_experts): they take as many bytes as before."
            )
        if isinstance(config.attention, GroupedQueryAttention) and any(
            layer.num_heads * config.head_dim != config.width for layer in config.layers
        ):
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
        return {"trust_remote_code": remote, "serve": command, "notes": notes}
    notes = [
        "The stock class cannot hold this architecture: pass trust_remote_code=True, which runs "
        "the modelling file in this folder, as engines other than transformers do not."
    ]
    own_widths = has_widths_or_bias(config)
    if has_novices(config):
        served = (
            " and described in compression_config as expert_substitution (constant-v1), which "
            "serving engines with novice support read"
        )
        notes.append(
            "Novices are stored in the MoNE authors' format (approximate_experts, "
            f"experts.N.approx_value){'' if own_widths else served}."
        )
    if own_widths:
        notes.append(
            "Experts of different widths, or with constants beside their neurons, are described "
            "under moe_jax_layers."
        )
    if odd := shared_multiple(config):
        notes.append(odd)
    return {"trust_remote_code": True, "serve": command, "notes": notes}


def describe_stage(
    stage: StageConfig,
    ranking: Ranking,
    before: ModelConfig,
    after: ModelConfig,
    seed: int = 0,
    num_sequences: int = 0,
) -> Stage:
    """One stage's cut: what was measured of every expert, and what became of it.

    Layers are numbered as before the stage; of dropped ones all experts are removed.
    ``num_sequences`` are those that calibration was asked for.
    """
    plan, stats = ranking.plan, ranking.stats
    lost: list[str] = []
    dropped = list(plan.dropped_layers) if plan else []
    stayed = [i for i in range(before.num_layers) if i not in dropped]
    places = {i: after.layers[n] for n, i in enumerate(stayed)}
    described: Stage = {
        "method": plan.method if stage.plan and plan is not None else stage.method,
        "settings": _settings(stage),
        "kept": _kept(before, after, stayed) + _padding(plan),
        "parameters": dataclasses.asdict(count_params(after)),  # type: ignore[typeddict-item]
        "layers": [],
    }
    if plan is not None:
        cut = stage.cut
        asked = cut is not None and (cut.needs_second_moments or cut.sequential)
        moments = asked or _repairs(plan)
        for i in before.moe_layers:
            layer = _describe_layer(i, plan, ranking, before, places.get(i), lost)
            if stats is not None and moments and i in places:
                layer["fewer_tokens_than_neurons"] = _underdetermined(layer, before)
            described["layers"].append(layer)
    if stats is not None and plan is not None:
        told = or_warning(
            partial(_confidence, stage, plan, stats, ranking.scores, before, seed),
            "confidence of the ranking",
            lost,
        )
        described["confidence"] = told or {}  # type: ignore[typeddict-item]
    if dropped:
        described["dropped_layers"] = dropped
    measured = [] if stats is None else coverage_warnings(stats, num_sequences)
    if stats is not None and plan is not None:
        measured += super_warnings(stats, plan)
    if warnings := [*measured, *moment_warnings(described["layers"]), *lost]:
        described["warnings"] = warnings
    return described


def _describe_layer(
    i: int,
    plan: Plan,
    ranking: Ranking,
    before: ModelConfig,
    after: LayerConfig | None,
    lost: list[str],
) -> Layer:
    moe, own = before.moe(i), plan.layers.get(i, LayerPlan())
    layer: Layer = {"layer": i, "num_experts": moe.num_experts}
    layer |= fates(plan, i)
    if after is None:
        layer["removed"] = list(range(moe.num_experts))
    else:
        new = after.moe
        layer["expert_width"] = [moe.expert_width, new.expert_width]
        if moe.shared is not None and new.shared is not None:
            layer["shared_width"] = [moe.shared.width, new.shared.width]
        layer["kv_groups"] = [before.layers[i].num_kv_heads, after.num_kv_heads]
        if new.expert_widths:
            gone = {*own.vanishing, *own.novices}
            layer["widths"] = [
                0 if e in gone else kept_neurons(own, moe, e) for e in range(moe.num_experts)
            ]
    if ranking.stats is not None:
        layer |= measured_layer(ranking.stats, i)
    scores = (ranking.scores or {}).get(i)
    if scores is not None and scores.ndim == 1:
        layer["score"] = scores.tolist()
    elif scores is not None and after is not None:
        width = layer.get("widths") or layer["expert_width"][1]
        curve = or_warning(partial(importance_curve, scores, width), f"layer {i}", lost)
        if curve is not None:
            layer["importance"] = curve
    return layer


def measured_layer(stats: Stats, i: int) -> Layer:
    """What calibration tells of a layer's experts, and which domains use them."""
    arrays, frequency = stats.layers[i], {}
    for name, domain in stats.facts.get("domains", {}).items():
        count = np.asarray(domain["count"][str(i)], np.float64)
        frequency[name] = (count / max(count.sum(), 1)).tolist()
    return {
        "layer": i,
        "count": arrays["count"].tolist(),
        "routing_mass": arrays["routing_mass"].tolist(),
        "variance": (output_deviation(arrays) ** 2).tolist(),
        "unreached": np.flatnonzero(arrays["count"] == 0).tolist(),
        "frequency": frequency,
    }


def fates(plan: Plan, i: int) -> Layer:
    """Which experts of a layer a plan removes, and how."""
    layer = plan.layers.get(i, LayerPlan())
    removed, novices = list(layer.deleted), list(layer.novices)
    found: Layer = {"layer": i, "removed": removed, "novices": novices}
    if layer.merges:
        found["merged"] = [[merge.kept, *merge.removed] for merge in layer.merges]
    return found


def _repairs(plan: Plan) -> bool:
    return any(layer.repair and layer.neurons for layer in plan.layers.values())


def _underdetermined(layer: Layer, before: ModelConfig) -> list[int]:
    """Experts with neurons whose second moments, of fewer tokens than those, are singular."""
    moe = before.moe(layer["layer"])
    return [e for e in moe.expert_ids if layer["count"][e] < moe.width_of(e)]


def _confidence(
    stage: StageConfig,
    plan: Plan,
    stats: Stats,
    scores: Mapping[int, np.ndarray] | None,
    before: ModelConfig,
    seed: int,
) -> dict[str, Any]:
    """Whether calibration text was enough for the experts that the stage kept."""
    cut = stage.cut
    if cut is None or not scores or next(iter(scores.values())).ndim > 1:
        method = "A given plan" if stage.plan else stage.method
        return describe_confidence(stats, method, None)
    among = {i: before.moe(i).expert_ids for i in before.moe_layers}
    keep, by_rank = {}, True
    for i, ids in among.items():
        gone = gone_ids(fates(plan, i))
        kept = [e for e in ids if e not in gone]
        keep[i] = len(kept)
        by_rank &= kept == [ids[e] for e in highest(scores[i][list(ids)], len(kept))]
    # Clusters, too, keep one expert each, but not those of the highest scores.
    return describe_confidence(
        stats, cut.criterion, keep if by_rank else None, among=among, seed=seed,
        options=cut.score_options,
    )  # fmt: skip


def _settings(stage: StageConfig) -> dict[str, Any]:
    """The settings that differ from their defaults, and those that the method is about."""
    cut = stage.cut
    if cut is None:
        return {"plan": stage.plan} if stage.plan else {}
    always = {"slim": ("importance",), "obs": (), "angular": ()}
    shown = always.get(cut.method, ("scope", "replacement"))
    settings = {name: getattr(cut, name) for name in shown} | cut.given()
    settings.pop("method", None)
    if cut.recipe is not None:
        settings["replacement"] = "merge"
        settings |= {f"merge_{name}": v for name, v in vars(cut.recipe).items() if v is not None}
    return settings


def _kept(before: ModelConfig, after: ModelConfig, stayed: Sequence[int]) -> str:
    """Such as "48 of 64 experts per layer"; a range where layers differ."""
    parts = []
    if len(stayed) < before.num_layers:
        gone = spans(i for i in range(before.num_layers) if i not in stayed)
        parts.append(f"{len(stayed)} of {before.num_layers} layers (without {gone})")
        before = dataclasses.replace(before, layers=tuple(before.layers[i] for i in stayed))

    def compare(noun: str, old: list[int], new: list[int], same: bool) -> None:
        if not same:
            parts.append(f"{extent(new, ' to ')} of {extent(old, ' to ')} {noun}")

    old, new = [
        [len(model.moe(i).expert_ids) for i in model.moe_layers] for model in (before, after)
    ]
    compare("experts per layer", old, new, old == new)
    old, new = (
        [bucket.width for i in model.moe_layers for bucket in model.moe(i).buckets]
        for model in (before, after)
    )
    compare("neurons per expert", old, new, {*old} == {*new})
    old, new = (
        [one.width for i in model.moe_layers if (one := model.moe(i).shared)]
        for model in (before, after)
    )
    compare("neurons per shared expert", old, new, {*old} == {*new})
    old, new = ([layer.num_kv_heads for layer in model.layers] for model in (before, after))
    compare("key/value groups per layer", old, new, old == new)
    return ", ".join(parts) or "everything"


def _padding(plan: Plan | None) -> str:
    """What a stored width hides where experts keep different numbers of neurons."""
    layers = [layer for layer in plan.layers.values() if layer.padded_width] if plan else []
    if not layers:
        return ""
    kept = [len(neurons) for layer in layers for neurons in layer.neurons.values()]
    return (
        f" as stored; {extent(kept, ' to ')} are kept, {np.mean(kept):.1f} on average, and zeros "
        "fill up the rest"
    )
