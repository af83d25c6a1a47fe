"""From scores to a plan: the highest stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from moe_jax.config import ModelConfig, MoeConfig
from moe_jax.plan.schema import LayerPlan, Plan, Replacement
from moe_jax.plan.validate import check_groups_separate

Scores = Mapping[int, np.ndarray]


def make_plan(
    scores: Scores | None,
    config: ModelConfig,
    *,
    keep_experts: int | None = None,
    keep_ratio: float | None = None,
    expert_width: int | None = None,
    width_ratio: float | None = None,
    round_to: int = 1,
    scope: Literal["layer", "global"] = "layer",
    neuron_scope: Literal["expert", "layer"] = "expert",
    replacement: Replacement = "novice",
    group_scores: Scores | None = None,
    kv_groups: int | None = None,
    method: str = "manual",
) -> Plan:
    """Keeps the highest scores.

    Expert scores ``[E]`` need ``keep_experts`` (per layer) or ``keep_ratio``; neuron scores
    ``[E, F]`` need ``expert_width`` or ``width_ratio``; group scores ``[G]``, alone or beside one
    of the two, need ``kv_groups``. Ties go to the lower id.

    Args:
        scores: of the layers with experts by index, from ``score``; None cuts groups only.
        config: the model's; already present novices stay novices and count as removed.
        keep_experts: experts with neurons that each layer keeps (on average, if global).
        keep_ratio: share of a layer's router rows to keep, in (0, 1].
        expert_width: hidden neurons that each expert keeps (on average, if ``neuron_scope`` is
            ``layer``).
        width_ratio: share of them, in (0, 1], rounded to the nearest multiple of ``round_to``.
        round_to: 128 suits TPUs and GPU kernels.
        scope: rank experts within each layer, or across all layers (which keeps at least K per
            layer; layers then differ, which needs the shipped modelling file to load).
        neuron_scope: rank neurons within each expert, or across the experts of each layer, of
            which each keeps at least one. Experts then differ, and all are filled up with zero
            neurons to the largest number that any of the model keeps, rounded up to ``round_to``:
            stock loaders, which know one width, read that, but what is stored exceeds what was
            kept. Scores must be comparable between experts, as gradients of a loss are.
        replacement: what becomes of a removed expert: its mean output, zero, or nothing.
        group_scores: of all layers by index, from ``score(..., of="attention")``.
        kv_groups: key/value heads, each with its query heads, that every layer keeps.
        method: for the record.

    Raises:
        ValueError: no or several sizes, a size out of bounds (named with them), scores that do
            not fit the model, or groups that cannot be removed from it.
    """
    layers: dict[int, LayerPlan] = {}
    settings: dict[str, Any] = {}
    experts = {"keep_experts": keep_experts, "keep_ratio": keep_ratio}
    widths = {"expert_width": expert_width, "width_ratio": width_ratio}
    if scores:
        axes = _check_scores("scores", scores, "MoE layers", config.moe_layers)
        if axes == {1}:
            _one_of(experts)
            layers = _plan_experts(scores, config, keep_experts, keep_ratio, scope, replacement)
            settings |= {**experts, "scope": scope, "replacement": replacement}
        elif axes == {2}:
            _one_of(widths)
            layers = _plan_neurons(
                scores, config, expert_width, width_ratio, round_to, neuron_scope
            )
            settings |= {**widths, "neuron_scope": neuron_scope}
        else:
            raise ValueError(f"scores must all be [E] or all [E, F], got {sorted(axes)} axes")
    elif sizes := [name for name, size in {**experts, **widths}.items() if size is not None]:
        raise ValueError(f"{sizes[0]} needs scores, got none")
    if group_scores and kv_groups is not None:
        for i, kept in _kept_groups(group_scores, config, kv_groups).items():
            layers[i] = dataclasses.replace(layers.get(i, LayerPlan()), kv_groups=kept)
        settings["kv_groups"] = kv_groups
    elif group_scores or kv_groups is not None:
        raise ValueError("group_scores and kv_groups need each other, got one of them")
    if not layers:
        raise ValueError("a plan needs scores or group_scores, got neither")
    return Plan(layers, method, settings)


def _check_scores(name: str, scores: Scores, what: str, layers: tuple[int, ...]) -> set[int]:
    """How many axes the scores have."""
    if set(scores) != set(layers):
        raise ValueError(f"{name} must cover the {what} {layers}, got {sorted(scores)}")
    for i, values in scores.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{name} of layer {i} hold a NaN or infinity")
    return {np.ndim(values) for values in scores.values()}


def _check_shape(name: str, layer: int, values: np.ndarray, expected: tuple[int, ...]) -> None:
    if values.shape != expected:
        raise ValueError(f"{name} of layer {layer} must be {list(expected)}, got {values.shape}")


def _one_of(sizes: Mapping[str, float | None]) -> None:
    given = [name for name, value in sizes.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"exactly one of {sorted(sizes)} must be given, got {given or 'none'}")


def _check_ratio(name: str, ratio: float) -> None:
    if not 0 < ratio <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {ratio}")


def kept_count(moe: MoeConfig, layer: int, keep: int | None, ratio: float | None) -> int:
    """Experts that a layer keeps; checked against its K and E."""
    if keep is None:
        share = 1.0 if ratio is None else ratio
        _check_ratio("keep_ratio", share)
        keep = round(moe.num_experts * share)
    if not moe.experts_per_token <= keep <= len(moe.expert_ids):
        raise ValueError(
            f"layer {layer}: kept experts must be in [experts_per_token = "
            f"{moe.experts_per_token}, {len(moe.expert_ids)}], got {keep}"
        )
    return keep


def kept_width(
    moe: MoeConfig, layer: int, width: int | None, ratio: float | None, step: int
) -> int:
    """Neurons that each expert of a layer keeps; checked against its width."""
    if step < 1:
        raise ValueError(f"round_to must be at least 1, got {step}")
    if width is None:
        share = 1.0 if ratio is None else ratio
        _check_ratio("width_ratio", share)
        width = min(moe.expert_width, max(1, round(moe.expert_width * share / step)) * step)
    if not 1 <= width <= moe.expert_width:
        raise ValueError(
            f"layer {layer}: expert_width must be in [1, {moe.expert_width}], got {width}"
        )
    return width


def kept_groups(config: ModelConfig, layer: int, keep: int) -> int:
    """Key/value groups that a layer keeps; checked against its number and the model's norms."""
    check_groups_separate(config)
    groups = config.layers[layer].num_kv_heads
    if not 1 <= keep <= groups:
        raise ValueError(f"layer {layer}: kv_groups must be in [1, {groups}], got {keep}")
    return keep


def _highest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` highest values, ascending; ties go to the lower index."""
    return np.sort(np.argsort(-values, kind="stable")[:count])


def _plan_experts(
    scores: Scores,
    config: ModelConfig,
    keep_experts: int | None,
    keep_ratio: float | None,
    scope: str,
    replacement: Replacement,
) -> dict[int, LayerPlan]:
    if scope not in ("layer", "global"):
        raise ValueError(f"scope must be 'layer' or 'global', got {scope!r}")
    if replacement not in ("novice", "zero", "delete"):
        raise ValueError(f"replacement must be 'novice', 'zero' or 'delete', got {replacement!r}")
    counts = {}
    for i in config.moe_layers:
        moe = config.moe(i)
        _check_shape("scores", i, scores[i], (moe.num_experts,))
        counts[i] = kept_count(moe, i, keep_experts, keep_ratio)
    kept = (
        _keep_globally(scores, config, sum(counts.values()))
        if scope == "global"
        else {i: _keep_in_layer(scores[i], config.moe(i), counts[i]) for i in counts}
    )
    layers = {}
    for i, ids in kept.items():
        removed = tuple(e for e in config.moe(i).expert_ids if e not in set(ids))
        if replacement == "delete":
            layers[i] = LayerPlan(deleted=removed)
        else:
            layers[i] = LayerPlan(
                novices=removed, novice_value="mean" if replacement == "novice" else "zero"
            )
    return layers


def _keep_in_layer(values: np.ndarray, moe: MoeConfig, count: int) -> list[int]:
    ids = np.array(moe.expert_ids)
    return ids[_highest(values[ids], count)].tolist()


def _keep_globally(scores: Scores, config: ModelConfig, total: int) -> dict[int, list[int]]:
    """The ``total`` highest of all layers, after each layer's own K highest."""
    kept = {
        i: _keep_in_layer(scores[i], config.moe(i), config.moe(i).experts_per_token)
        for i in config.moe_layers
    }
    rest = [
        (-float(scores[i][e]), i, e)
        for i in kept
        for e in config.moe(i).expert_ids
        if e not in set(kept[i])
    ]
    for _, i, e in sorted(rest)[: total - sum(map(len, kept.values()))]:
        kept[i].append(e)
    return kept


def _plan_neurons(
    scores: Scores,
    config: ModelConfig,
    expert_width: int | None,
    width_ratio: float | None,
    round_to: int,
    scope: str,
) -> dict[int, LayerPlan]:
    if scope not in ("expert", "layer"):
        raise ValueError(f"neuron_scope must be 'expert' or 'layer', got {scope!r}")
    layers = {}
    for i in config.moe_layers:
        moe = config.moe(i)
        _check_shape("scores", i, scores[i], (moe.num_experts, moe.expert_width))
        width = kept_width(moe, i, expert_width, width_ratio, round_to)
        values = scores[i][list(moe.expert_ids)]
        if scope == "layer":
            kept = _highest_in_layer(values, len(values) * width)
        else:
            kept = [_highest(row, width) for row in values]
        neurons = (tuple(row.tolist()) for row in kept)
        layers[i] = LayerPlan(neurons=dict(zip(moe.expert_ids, neurons, strict=True)))
    return _padded(layers, config, round_to) if scope == "layer" else layers


def _padded(layers: dict[int, LayerPlan], config: ModelConfig, step: int) -> dict[int, LayerPlan]:
    """The same, stored at the one width that holds the largest expert of any layer."""
    most = max(len(kept) for layer in layers.values() for kept in layer.neurons.values())
    width = -(-most // step) * step
    return {
        i: dataclasses.replace(layer, padded_width=min(width, config.moe(i).expert_width))
        for i, layer in layers.items()
    }


def _highest_in_layer(values: np.ndarray, total: int) -> list[np.ndarray]:
    """Each expert's share of the ``total`` highest of ``[E, F]``, its own highest first of all."""
    ranked = values.astype(np.float64)
    ranked[np.arange(len(values)), values.argmax(1)] = np.inf
    chosen = np.zeros(values.size, bool)
    chosen[_highest(ranked.reshape(-1), total)] = True
    return [np.flatnonzero(row) for row in chosen.reshape(values.shape)]


def _kept_groups(scores: Scores, config: ModelConfig, keep: int) -> dict[int, tuple[int, ...]]:
    check_groups_separate(config)
    _check_scores("group_scores", scores, "layers", tuple(range(config.num_layers)))
    kept = {}
    for i, layer in enumerate(config.layers):
        _check_shape("group_scores", i, scores[i], (layer.num_kv_heads,))
        kept[i] = tuple(_highest(scores[i], kept_groups(config, i, keep)).tolist())
    return kept
