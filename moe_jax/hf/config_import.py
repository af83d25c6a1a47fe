"""``config.json`` -> ModelConfig, driven by the family."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_jax.config import Clamp, DenseConfig, LayerConfig, ModelConfig, MoeConfig, SharedExpert
from moe_jax.hf.checks import list_at, typed
from moe_jax.hf.families import find_family
from moe_jax.hf.family import Family, Key
from moe_jax.hf.nested import text_part
from moe_jax.hf.novices import novice_ids
from moe_jax.hf.rope_keys import read_rope, read_rotary_share

# config.json key of our own: facts of layers that differ from each other.
LAYERS_KEY = "moe_jax_layers"

# More routed experts, all layers together, than any model has: beyond it a file is wrong, and
# building what it says would take for ever.
_MOST_EXPERTS = 1_000_000


def model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a parsed ``config.json`` describes.

    Raises:
        ValueError: unsupported ``model_type`` (the message lists the supported ones), aliases
            that disagree, values of the wrong type, or an impossible architecture.
    """
    hf = text_part(hf)
    row = find_family(hf.get("model_type"))
    for name, values in {"hidden_act": ("silu", "swish"), **row.switches}.items():
        if name in hf and hf[name] not in values:
            raise ValueError(f"{name} must be {values[0]!r}, got {hf[name]!r}")
    facts = {**read_facts(row, hf), **row.fixed}
    facts["rotary_share"] = read_rotary_share(row, hf, facts["head_dim"])
    if row.check is not None:
        row.check(facts)
    slots = row.router_slots
    if slots is not None and facts["experts_per_token"] != slots:
        raise ValueError(
            f"{row.model_type}: num_experts_per_tok must be {slots}, the number that its router "
            f"always picks, got {facts['experts_per_token']}"
        )
    return ModelConfig(
        family=row.model_type,
        attention=_part(row.attention, facts),
        router=_part(row.router, facts),
        rope=read_rope(row, hf, facts["max_positions"]),
        layers=_layers(row, hf, facts),
        **_fields(ModelConfig, facts),
    )


def _part(kind: Any, facts: Mapping[str, Any]) -> Any:
    return kind(**_fields(kind, facts))


def _fields(kind: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that are fields of ``kind``, whose other fields keep their defaults."""
    return {f.name: facts[f.name] for f in dataclasses.fields(kind) if f.name in facts}


def read_facts(row: Family, hf: Mapping[str, Any]) -> dict[str, Any]:
    """Every fact that has a key, absent ones filled with what the stock class assumes."""
    facts: dict[str, Any] = {}
    for fact, key in row.keys.items():
        facts[fact] = read_fact(key, hf, facts)
    return facts


def read_fact(key: Key, hf: Mapping[str, Any], before: dict[str, Any]) -> Any:
    """One fact, given those that stand before it in the family."""
    present = {name: hf[name] for name in key.names if name in hf}
    if not present:
        return _meaning(key, key.default(before) if callable(key.default) else key.default, before)
    name, value = next(iter(present.items()))
    if any(other != value for other in present.values()):
        raise ValueError(f"config keys that mean the same must agree, got {present}")
    if value is None and key.null is not None:
        return key.null(before)
    if value is None and key.optional:
        return None
    return _meaning(key, typed(name, value, key.kind), before)


def _meaning(key: Key, value: Any, before: Mapping[str, Any]) -> Any:
    """The fact that a stored value stands for."""
    if key.values is not None:
        return key.values[value]
    return value if key.per is None else value * before[key.per]


def _layers(row: Family, hf: Mapping[str, Any], facts: dict[str, Any]) -> tuple[LayerConfig, ...]:
    count = facts["num_layers"]
    if not 1 <= count <= _MOST_EXPERTS:
        raise ValueError(f"num_hidden_layers must be in [1, {_MOST_EXPERTS}], got {count}")
    own = [{**facts, **shapes} for shapes in _own_shapes(hf, count)]
    experts = sum(shapes.get("num_experts", 0) for shapes in own)
    if experts > _MOST_EXPERTS:
        raise ValueError(
            f"num_experts, all {count} layers together, must be at most {_MOST_EXPERTS}, "
            f"got {experts}"
        )
    dense = set(row.dense_layers.read(hf, count))
    windows = row.windows.read(hf, facts.get("sliding_window"), count)
    novices = novice_ids(row, hf)
    for layer in sorted(novices):
        if not 0 <= layer < count or layer in dense:
            raise ValueError(f"approximate_experts names layer {layer}, which has no experts")
    return tuple(
        LayerConfig(
            num_heads=shapes["num_heads"],
            num_kv_heads=shapes["num_kv_heads"],
            feed_forward=DenseConfig(shapes["dense_width"])
            if i in dense
            else _mixture(shapes, novices.get(i, ())),
            sliding_window=windows[i],
        )
        for i, shapes in enumerate(own)
    )


def _mixture(facts: dict[str, Any], novices: tuple[int, ...]) -> MoeConfig:
    shared = None
    if facts.get("shared_width"):
        shared = SharedExpert(facts["shared_width"], facts["shared_gated"])
    clamp = _part(Clamp, facts) if "limit" in facts else None
    parts = {"novice_ids": novices, "shared": shared, "clamp": clamp}
    return _part(MoeConfig, {**facts, **parts})


def _own_shapes(hf: Mapping[str, Any], num_layers: int) -> list[dict[str, Any]]:
    """What ``moe_jax_layers`` says of each layer."""
    raw = hf.get(LAYERS_KEY) or [{}] * num_layers
    objects = isinstance(raw, list) and all(isinstance(layer, Mapping) for layer in raw)
    if not objects or len(raw) != num_layers:
        raise ValueError(f"{LAYERS_KEY} must be a list of {num_layers} objects, one per layer")

    def value(name: str, fact: str, stated: Any) -> Any:
        if fact == "expert_widths":
            return tuple(list_at({name: stated}, name, int))
        return typed(name, stated, bool if fact == "expert_bias" else int)

    return [
        {fact: value(f"{LAYERS_KEY}: layer {i}: {fact}", fact, layer[fact]) for fact in layer}
        for i, layer in enumerate(raw)
    ]
