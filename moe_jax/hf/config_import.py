"""``config.json`` -> ModelConfig, driven by the family's row."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_jax.config import (
    ROUTERS,
    DefaultRope,
    DenseConfig,
    GroupedQueryAttention,
    LayerConfig,
    LongRope,
    ModelConfig,
    MoeConfig,
    RopeConfig,
)
from moe_jax.hf.checks import list_at, object_at, typed
from moe_jax.hf.families import Family, Key, find_family
from moe_jax.hf.novices import MODELING_MODULE, novice_ids

# config.json keys of our own: facts of layers that differ from each other, and whether longrope's
# long factors are used where that does not follow from the rest of the file.
LAYERS_KEY = "moe_jax_layers"
SWITCH_KEY = "longrope_switch_factor"

_OPTIONAL = {"sliding_window", "clip_qkv"}


def model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a parsed ``config.json`` describes.

    Raises:
        ValueError: unsupported ``model_type`` (the message lists the supported ones), aliases
            that disagree, values of the wrong type, or an impossible architecture.
    """
    row = find_family(hf.get("model_type"))
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act must be 'silu', got {hf['hidden_act']!r}")
    facts = read_facts(row, hf)
    slots = row.router_slots
    if slots is not None and facts["experts_per_token"] != slots:
        raise ValueError(
            f"{row.model_type}: num_experts_per_tok must be {slots}, the number that its router "
            f"always picks, got {facts['experts_per_token']}"
        )
    facts |= row.fixed
    return ModelConfig(
        family=row.model_type,
        attention=GroupedQueryAttention(**_fields(GroupedQueryAttention, facts)),
        layers=_layers(row, hf, facts),
        router=ROUTERS[row.router](**_fields(ROUTERS[row.router], facts)),
        rope=rope_config(row, hf, facts["max_positions"]),
        **_fields(ModelConfig, facts),
    )


def _fields(kind: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that are fields of ``kind``, whose other fields keep their defaults."""
    return {f.name: facts[f.name] for f in dataclasses.fields(kind) if f.name in facts}


def read_facts(row: Family, hf: Mapping[str, Any]) -> dict[str, Any]:
    """Every fact of the row, absent keys filled with what the stock class assumes."""
    facts: dict[str, Any] = {}
    for fact, key in row.keys.items():
        facts[fact] = read_fact(fact, key, hf, facts)
    switch = row.sliding_window_switch
    if switch is not None and not hf.get(switch, False):
        facts["sliding_window"] = None
    return facts


def read_fact(fact: str, key: Key, hf: Mapping[str, Any], before: dict[str, Any]) -> Any:
    """One fact, given those that stand before it in the row."""
    found = {name: hf[name] for name in key.names if name in hf}
    if not found:
        return key.default(before) if callable(key.default) else key.default
    name, value = next(iter(found.items()))
    if any(other != value for other in found.values()):
        raise ValueError(f"config keys that mean the same must agree, got {found}")
    if value is None and key.null is not None:
        return key.null(before)
    if value is None and fact in _OPTIONAL:
        return None
    return typed(name, value, key.kind)


def rope_config(row: Family, hf: Mapping[str, Any], max_positions: int) -> RopeConfig:
    """Rotary embedding from ``rope_scaling`` or ``rope_parameters`` and ``rope_theta``.

    The stock Phi-MoE class of transformers 5 recomputes its frequencies from the *short* factors
    at every call and switches only the scale beyond the original context, whereas the modelling
    code that Phi-3.5-MoE was published with, named by ``auto_map``, takes the long factors there.
    Whoever the file names defines the model: long factors are used exactly if ``auto_map`` names
    code. Files of ours that need to say otherwise carry ``longrope_switch_factor``.
    """
    scaling = object_at(hf, "rope_scaling") or object_at(hf, "rope_parameters")
    theta = typed(
        "rope_theta",
        scaling.get("rope_theta") or hf.get("rope_theta") or row.default_theta,
        float,
    )
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    supported = ("default", "longrope") if row.longrope else ("default",)
    if kind not in supported:
        raise ValueError(f"{row.model_type}: rope type must be one of {supported}, got {kind!r}")
    if (scaling.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("partial_rotary_factor must be 1, rotary embeddings cover whole heads")
    if kind == "default":
        return DefaultRope(theta)
    original = (
        hf.get("original_max_position_embeddings")
        or scaling.get("original_max_position_embeddings")
        or max_positions
    )
    return LongRope(
        theta=theta,
        original_positions=typed("original_max_position_embeddings", original, int),
        short_factor=tuple(list_at(scaling, "short_factor", float)),
        long_factor=tuple(list_at(scaling, "long_factor", float)),
        short_scale=typed("longrope's short_mscale", scaling.get("short_mscale"), float),
        long_scale=typed("longrope's long_mscale", scaling.get("long_mscale"), float),
        switch_factor=typed(SWITCH_KEY, hf.get(SWITCH_KEY, names_remote_code(hf)), bool),
    )


def names_remote_code(hf: Mapping[str, Any]) -> bool:
    """Whether ``auto_map`` names modelling code other than the file that we ship."""
    target = object_at(hf, "auto_map").get("AutoModelForCausalLM")
    return isinstance(target, str) and not target.startswith(f"{MODELING_MODULE}.")


def dense_layers(row: Family, hf: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Indices of the layers without experts."""
    if row.dense_layers is None:
        return ()
    named, period = row.dense_layers
    step = 1 if hf.get(period) is None else typed(period, hf[period], int)
    if step < 1:
        raise ValueError(f"{period} must be at least 1, got {step}")
    listed = list_at(hf, named, int)
    return tuple(i for i in range(num_layers) if i in listed or (i + 1) % step)


def _layers(row: Family, hf: Mapping[str, Any], facts: dict[str, Any]) -> tuple[LayerConfig, ...]:
    count = facts["num_layers"]
    if count < 1:
        raise ValueError(f"num_hidden_layers must be at least 1, got {count}")
    dense = set(dense_layers(row, hf, count))
    novices = novice_ids(row, hf)
    own = _own_shapes(hf, count)
    for layer in sorted(novices):
        if not 0 <= layer < count or layer in dense:
            raise ValueError(f"approximate_experts names layer {layer}, which has no experts")
    return tuple(_layer({**facts, **own[i]}, i in dense, novices.get(i, ())) for i in range(count))


def _own_shapes(hf: Mapping[str, Any], num_layers: int) -> list[dict[str, Any]]:
    """What ``moe_jax_layers`` says of each layer."""
    raw = hf.get(LAYERS_KEY) or [{}] * num_layers
    if (
        not isinstance(raw, list)
        or len(raw) != num_layers
        or not all(isinstance(layer, Mapping) for layer in raw)
    ):
        raise ValueError(f"{LAYERS_KEY} must be a list of {num_layers} objects, one per layer")
    return [
        {fact: _own_value(f"{LAYERS_KEY}: layer {i}: {fact}", fact, layer) for fact in layer}
        for i, layer in enumerate(raw)
    ]


def _own_value(name: str, fact: str, layer: Mapping[str, Any]) -> Any:
    if fact == "expert_widths":
        return tuple(list_at({name: layer[fact]}, name, int))
    return typed(name, layer[fact], bool if fact == "expert_bias" else int)


def _layer(facts: dict[str, Any], dense: bool, novices: tuple[int, ...]) -> LayerConfig:
    feed_forward: DenseConfig | MoeConfig
    if dense:
        feed_forward = DenseConfig(facts["dense_width"])
    else:
        feed_forward = MoeConfig(
            num_experts=facts["num_experts"],
            experts_per_token=facts["experts_per_token"],
            expert_width=facts["expert_width"],
            novice_ids=novices,
            expert_widths=facts.get("expert_widths", ()),
            expert_bias=facts.get("expert_bias", False),
        )
    return LayerConfig(
        num_heads=facts["num_heads"],
        num_kv_heads=facts["num_kv_heads"],
        feed_forward=feed_forward,
        sliding_window=facts.get("sliding_window"),
    )
