"""What a stage's cut says in the report: what was measured of every expert, and what went."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.confidence import describe_confidence
from moe_jax.config import LayerConfig, ModelConfig, MoeConfig
from moe_jax.params import count_params
from moe_jax.plan import LayerPlan, Plan
from moe_jax.plan.scores import highest
from moe_jax.plan.validate import kept_neurons
from moe_jax.report import importance_curve
from moe_jax.report.tables import gone_ids
from moe_jax.run.stage import StageConfig
from moe_jax.run.stage_checks import ANGULAR, OBS, SLIM
from moe_jax.scoring import output_deviation, score
from moe_jax.statistics import Stats
from moe_jax.text import extent, spans


def describe_stage(
    stage: StageConfig,
    plan: Plan | None,
    stats: Stats | None,
    before: ModelConfig,
    after: ModelConfig,
    seed: int,
    params: dict[str, Any],
) -> dict[str, Any]:
    """One stage: what was measured of every expert, and what became of it.

    ``params`` are the weights that the stage began with. Layers are numbered as before the stage;
    dropped ones are named, but not described.
    """
    scores = {} if stats is None else _scores(stage, stats, seed, (params, before))
    dropped = list(plan.dropped_layers) if plan else []
    stayed = [i for i in range(before.num_layers) if i not in dropped]
    layers = []
    if plan is not None:
        layers = [
            _describe_layer(i, plan, stats, scores.get(i), before, after.layers[position])
            for position, i in enumerate(stayed)
            if i in before.moe_layers
        ]
    uses = stage.needs_second_moments or stage.sequential or _repairs(plan)
    if stats is not None and uses:
        for layer in layers:
            layer["fewer_tokens_than_neurons"] = _underdetermined(layer, before)
    described = {
        "method": plan.method if stage.plan and plan is not None else stage.method,
        "settings": _settings(stage),
        "kept": _kept(before, after, stayed) + _padding(plan),
        "parameters": dataclasses.asdict(count_params(after)),
        "layers": layers,
    }
    if stats is not None and plan is not None:
        described["confidence"] = _confidence(stage, plan, stats, scores, before, seed)
    return described | ({"dropped_layers": dropped} if dropped else {})


def _describe_layer(
    i: int,
    plan: Plan,
    stats: Stats | None,
    scores: np.ndarray | None,
    before: ModelConfig,
    after: LayerConfig,
) -> dict[str, Any]:
    old, new = before.moe(i), after.feed_forward
    assert isinstance(new, MoeConfig)
    layer: dict[str, Any] = {
        "layer": i,
        "num_experts": old.num_experts,
        **fates(plan, i),
        "expert_width": [old.expert_width, new.expert_width],
        "kv_groups": [before.layers[i].num_kv_heads, after.num_kv_heads],
    }
    if new.expert_widths:
        layer["widths"] = _kept_neurons(plan.layers.get(i, LayerPlan()), old)
    if stats is not None:
        arrays = stats.layers[i]
        layer |= {
            "count": arrays["count"].tolist(),
            "routing_mass": arrays["routing_mass"].tolist(),
            "variance": (output_deviation(arrays) ** 2).tolist(),
            "unreached": np.flatnonzero(arrays["count"] == 0).tolist(),
        }
    if scores is not None and scores.ndim == 1:
        layer["score"] = scores.tolist()
    elif scores is not None:
        layer["importance"] = importance_curve(scores, layer.get("widths", new.expert_width))
    return layer


def _kept_neurons(layer: LayerPlan, moe: MoeConfig) -> list[int]:
    """Of each router row before the cut; 0 of experts that are novices, or gone."""
    gone = {*layer.vanishing, *layer.novices}
    return [0 if e in gone else kept_neurons(layer, moe, e) for e in range(moe.num_experts)]


def _repairs(plan: Plan | None) -> bool:
    layers = plan.layers.values() if plan is not None else ()
    return any(layer.repair and layer.neurons for layer in layers)


def _underdetermined(layer: Mapping[str, Any], before: ModelConfig) -> list[int]:
    """Experts with neurons whose second moments, of fewer tokens than those, are singular."""
    moe = before.moe(layer["layer"])
    return [e for e in moe.expert_ids if layer["count"][e] < moe.width_of(e)]


def fates(plan: Plan, i: int) -> dict[str, Any]:
    """Which experts of a layer a plan removes, and how."""
    layer = plan.layers.get(i, LayerPlan())
    found: dict[str, Any] = {"removed": list(layer.deleted), "novices": list(layer.novices)}
    if layer.merges:
        found["merged"] = [[merge.kept, *merge.removed] for merge in layer.merges]
    return found


def _scores(stage: StageConfig, stats: Stats, seed: int, model) -> dict[int, np.ndarray]:
    by_experts = not stage.ranks_neurons or stage.slims_experts
    if stage.plan or stage.method == ANGULAR or not by_experts:
        return {}
    if stage.sequential:  # its second moments are gone
        return {i: layer["removal_cost"] for i, layer in stats.layers.items()}
    options: dict[str, Any] = stage.score_options
    return score(stats, stage.criterion, seed=seed, model=model, **options)


def _confidence(
    stage: StageConfig,
    plan: Plan,
    stats: Stats,
    scores: dict[int, np.ndarray],
    before: ModelConfig,
    seed: int,
) -> dict[str, Any]:
    """Whether calibration text was enough for the experts that the stage kept."""
    if stage.plan or not scores or next(iter(scores.values())).ndim > 1:
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
        stats, stage.criterion, keep if by_rank else None, among=among, seed=seed,
        options=stage.score_options,
    )  # fmt: skip


def _settings(stage: StageConfig) -> dict[str, Any]:
    """The settings that differ from their defaults, and those that the method is about."""
    shown = vars(stage)
    default = vars(StageConfig())
    always = set() if stage.method in (OBS, ANGULAR) else {"scope", "replacement"}
    if stage.method == SLIM:
        always = {"importance"}
    settings = {
        name: value
        for name, value in shown.items()
        if name not in ("method", "distill") and (value != default[name] or name in always)
    }
    if stage.recipe is not None:
        settings["replacement"] = "merge"
        settings |= {f"merge_{name}": v for name, v in vars(stage.recipe).items() if v is not None}
    return settings


def _kept(before: ModelConfig, after: ModelConfig, stayed: Sequence[int]) -> str:
    """Such as "48 of 64 experts per layer"; a range where layers differ."""
    parts = []
    if len(stayed) < before.num_layers:
        gone = spans([i for i in range(before.num_layers) if i not in stayed])
        parts.append(f"{len(stayed)} of {before.num_layers} layers (without {gone})")
        before = dataclasses.replace(before, layers=tuple(before.layers[i] for i in stayed))
    old = [len(before.moe(i).expert_ids) for i in before.moe_layers]
    new = [len(after.moe(i).expert_ids) for i in after.moe_layers]
    if old != new:
        parts.append(f"{extent(new, ' to ')} of {extent(old, ' to ')} experts per layer")
    old = [bucket.width for i in before.moe_layers for bucket in before.moe(i).buckets]
    new = [bucket.width for i in after.moe_layers for bucket in after.moe(i).buckets]
    if {*old} != {*new}:
        parts.append(f"{extent(new, ' to ')} of {extent(old, ' to ')} neurons per expert")
    old = [layer.num_kv_heads for layer in before.layers]
    new = [layer.num_kv_heads for layer in after.layers]
    if old != new:
        parts.append(f"{extent(new, ' to ')} of {extent(old, ' to ')} key/value groups per layer")
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
