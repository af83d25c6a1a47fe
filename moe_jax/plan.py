"""Plans: what to remove, as plain data that can be saved, read, edited and applied again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from moe_jax.config import ModelConfig, MoeConfig

_FORMAT = "moe_jax.plan"
_VERSION = 1
Replacement = Literal["novice", "zero", "delete"]


@dataclass(frozen=True)
class LayerPlan:
    """What happens to the experts of one layer; ids are router rows before the plan.

    Attributes:
        deleted: experts that vanish with their router rows; their tokens go to other experts.
        novices: experts that become a constant, still chosen and weighted by the router.
        novice_value: ``mean`` (the expert's mean output, from statistics) or ``zero``.
        neurons: by expert id, the hidden neurons that stay, ascending; an expert that is not
            listed keeps all of them.
    """

    deleted: tuple[int, ...] = ()
    novices: tuple[int, ...] = ()
    novice_value: Literal["mean", "zero"] = "mean"
    neurons: dict[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """One layer plan per changed layer, and how they came about.

    Attributes:
        layers: by layer index.
        method: the criterion.
        settings: its settings, for the record.
    """

    layers: dict[int, LayerPlan]
    method: str = "manual"
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The plan as JSON text."""
        layers = {
            str(i): {
                "deleted": list(layer.deleted),
                "novices": list(layer.novices),
                "novice_value": layer.novice_value,
                "neurons": {str(e): list(kept) for e, kept in layer.neurons.items()},
            }
            for i, layer in sorted(self.layers.items())
        }
        return json.dumps(
            {
                "format": _FORMAT,
                "version": _VERSION,
                "method": self.method,
                "settings": self.settings,
                "layers": layers,
            }
        )

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> Plan:
        """Reads what ``to_json`` wrote, or the same as a dict.

        Raises:
            ValueError: not a plan, another version, or a field of the wrong kind (named).
        """
        try:
            raw = json.loads(text) if isinstance(text, str) else text
        except json.JSONDecodeError as error:
            raise ValueError(f"a plan must be JSON: {error}") from error
        if not isinstance(raw, Mapping) or raw.get("format") != _FORMAT:
            raise ValueError(f"a plan must be a JSON object with format {_FORMAT!r}")
        if raw.get("version") != _VERSION:
            raise ValueError(f"plan version must be {_VERSION}, got {raw.get('version')!r}")
        if not isinstance(raw.get("layers"), Mapping):
            raise ValueError(f"plan layers must be an object, got {raw.get('layers')!r}")
        if not all(str(i).isdigit() for i in raw["layers"]):
            raise ValueError(f"plan layers must be numbered, got {sorted(raw['layers'])[:5]}")
        layers = {int(i): _layer_from_json(i, layer) for i, layer in raw["layers"].items()}
        return cls(layers, raw.get("method", "manual"), dict(raw.get("settings", {})))


def _layer_from_json(name: str, raw: Mapping[str, Any]) -> LayerPlan:
    known = {"deleted", "novices", "novice_value", "neurons"}
    unknown = set(raw) - known
    if unknown:
        raise ValueError(
            f"plan layer {name}: fields must be among {sorted(known)}, got {sorted(unknown)}"
        )
    value = raw.get("novice_value", "mean")
    if value not in ("mean", "zero"):
        raise ValueError(f"plan layer {name}: novice_value must be 'mean' or 'zero', got {value!r}")
    try:
        return LayerPlan(
            tuple(int(e) for e in raw.get("deleted", ())),
            tuple(int(e) for e in raw.get("novices", ())),
            value,
            {int(e): tuple(int(n) for n in kept) for e, kept in raw.get("neurons", {}).items()},
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"plan layer {name}: ids must be integers ({error})") from error


def make_plan(
    scores: Mapping[int, np.ndarray],
    config: ModelConfig,
    *,
    keep_experts: int | None = None,
    keep_ratio: float | None = None,
    expert_width: int | None = None,
    width_ratio: float | None = None,
    round_to: int = 1,
    scope: Literal["layer", "global"] = "layer",
    replacement: Replacement = "novice",
    method: str = "manual",
) -> Plan:
    """Keeps the highest scores.

    Expert scores ``[E]`` need ``keep_experts`` (per layer) or ``keep_ratio``; neuron scores
    ``[E, F]`` need ``expert_width`` or ``width_ratio``. Ties go to the lower id.

    Args:
        scores: by layer index, from ``score``.
        config: the model's; already present novices stay novices and count as removed.
        keep_experts: experts with neurons that each layer keeps (on average, if global).
        keep_ratio: share of a layer's router rows to keep, in (0, 1].
        expert_width: hidden neurons that each expert keeps.
        width_ratio: share of them, in (0, 1], rounded to the nearest multiple of ``round_to``.
        round_to: 128 suits TPUs and GPU kernels.
        scope: rank within each layer, or across all layers (which keeps at least K per layer;
            layers then differ, which needs the shipped modelling file to load).
        replacement: what becomes of a removed expert: its mean output, zero, or nothing.
        method: for the record.

    Raises:
        ValueError: no or several sizes, a size out of bounds (named with them), or scores that
            do not fit the model.
    """
    missing = set(config.moe_layers) - set(scores)
    if missing or set(scores) - set(config.moe_layers):
        raise ValueError(
            f"scores must cover the MoE layers {config.moe_layers}, got {sorted(scores)}"
        )
    for i, values in scores.items():
        if not np.isfinite(values).all():
            raise ValueError(f"scores of layer {i} hold a NaN or infinity")
    kinds = {np.ndim(values) for values in scores.values()}
    settings: dict[str, Any] = {"scope": scope}
    if kinds == {2}:
        _one_of(expert_width=expert_width, width_ratio=width_ratio)
        layers = _plan_neurons(scores, config, expert_width, width_ratio, round_to)
        settings |= {"expert_width": expert_width, "width_ratio": width_ratio}
    elif kinds == {1}:
        _one_of(keep_experts=keep_experts, keep_ratio=keep_ratio)
        layers = _plan_experts(scores, config, keep_experts, keep_ratio, scope, replacement)
        settings |= {
            "keep_experts": keep_experts,
            "keep_ratio": keep_ratio,
            "replacement": replacement,
        }
    else:
        raise ValueError(f"scores must all be [E] or all [E, F], got {sorted(kinds)} axes")
    return Plan(layers, method, settings)


def _one_of(**sizes: float | None) -> None:
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
    if width is None:
        share = 1.0 if ratio is None else ratio
        _check_ratio("width_ratio", share)
        width = min(moe.expert_width, max(1, round(moe.expert_width * share / step)) * step)
    if not 1 <= width <= moe.expert_width:
        raise ValueError(
            f"layer {layer}: expert_width must be in [1, {moe.expert_width}], got {width}"
        )
    return width


def _highest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` highest values, ascending; ties go to the lower index."""
    return np.sort(np.argsort(-values, kind="stable")[:count])


def _plan_experts(scores, config, keep_experts, keep_ratio, scope, replacement):
    if scope not in ("layer", "global"):
        raise ValueError(f"scope must be 'layer' or 'global', got {scope!r}")
    if replacement not in ("novice", "zero", "delete"):
        raise ValueError(f"replacement must be 'novice', 'zero' or 'delete', got {replacement!r}")
    counts = {}
    for i in config.moe_layers:
        moe = config.moe(i)
        if scores[i].shape != (moe.num_experts,):
            raise ValueError(
                f"scores of layer {i} must be [{moe.num_experts}], got {scores[i].shape}"
            )
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


def _keep_globally(scores, config, total: int) -> dict[int, list[int]]:
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


def _plan_neurons(scores, config, expert_width, width_ratio, round_to):
    if round_to < 1:
        raise ValueError(f"round_to must be at least 1, got {round_to}")
    layers = {}
    for i in config.moe_layers:
        moe = config.moe(i)
        expected = (moe.num_experts, moe.expert_width)
        if scores[i].shape != expected:
            raise ValueError(f"scores of layer {i} must be {expected}, got {scores[i].shape}")
        width = kept_width(moe, i, expert_width, width_ratio, round_to)
        layers[i] = LayerPlan(
            neurons={e: tuple(_highest(scores[i][e], width).tolist()) for e in moe.expert_ids}
        )
    return layers


def validate_plan(plan: Plan, config: ModelConfig) -> None:
    """Raises ValueError naming the layer, the value and its bound if the plan does not fit."""
    for i, layer in plan.layers.items():
        moe = config.moe(i)
        _check_ids(i, "deleted", layer.deleted, moe.num_experts)
        _check_ids(i, "novices", layer.novices, moe.num_experts)
        both = set(layer.deleted) & set(layer.novices)
        if both:
            raise ValueError(f"plan layer {i}: experts {sorted(both)} are deleted and novices")
        rows = moe.num_experts - len(layer.deleted)
        if rows < moe.experts_per_token:
            raise ValueError(
                f"plan layer {i}: must leave at least experts_per_token = "
                f"{moe.experts_per_token} router rows, leaves {rows}"
            )
        gone = set(layer.deleted) | set(layer.novices)
        left = [e for e in moe.expert_ids if e not in gone]
        if not left:
            raise ValueError(f"plan layer {i}: no expert with neurons would be left")
        _check_ids(i, "neurons", layer.neurons, moe.num_experts)
        widths = {e: len(layer.neurons.get(e, range(moe.expert_width))) for e in left}
        if len(set(widths.values())) > 1:
            raise ValueError(
                f"plan layer {i}: all experts must keep the same number of neurons, "
                f"got {min(widths.values())} to {max(widths.values())}"
            )
        for e, kept in layer.neurons.items():
            _check_ids(i, f"neurons of expert {e}", kept, moe.expert_width)
            if not kept:
                raise ValueError(f"plan layer {i}: expert {e} must keep at least one neuron")


def _check_ids(layer: int, what: str, ids, bound: int) -> None:
    ids = list(ids)
    wrong = [e for e in ids if not 0 <= e < bound]
    if wrong:
        raise ValueError(f"plan layer {layer}: {what} must be in [0, {bound}), got {wrong[:5]}")
    if len(set(ids)) != len(ids):
        raise ValueError(f"plan layer {layer}: {what} are listed twice")
