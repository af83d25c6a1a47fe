"""Rotary embeddings as ``config.json`` spells them, both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_jax.hf.checks import list_at, object_at, typed
from moe_jax.hf.family import Family
from moe_jax.kinds import ROPES, DefaultRope, Llama3Rope, LongRope, RopeConfig, YarnRope

MODELING_MODULE = "modeling_moe_jax_novice"
# Whether longrope's long factors are used where that does not follow from the rest of the file.
SWITCH_KEY = "longrope_switch_factor"
_ORIGINAL = "original_max_position_embeddings"
_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", _ORIGINAL, SWITCH_KEY)

# By kind: keys of its scaling -> fields of its configuration.
_SCALING: Mapping[str, Mapping[str, str]] = {
    DefaultRope.kind: {},
    LongRope.kind: {
        "short_factor": "short_factor",
        "long_factor": "long_factor",
        "short_mscale": "short_scale",
        "long_mscale": "long_scale",
        _ORIGINAL: "original_positions",
    },
    Llama3Rope.kind: {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        _ORIGINAL: "original_positions",
    },
    YarnRope.kind: {
        "factor": "factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        _ORIGINAL: "original_positions",
    },
}
# Keys that may be missing or null: the field's default holds then.
_OPTIONAL = {*_SCALING[YarnRope.kind]} - {"factor", _ORIGINAL}
_SHARE, _TURNED = "partial_rotary_factor", "rotary_dim"


def names_remote_code(hf: Mapping[str, Any]) -> bool:
    """Whether ``auto_map`` names modelling code other than the file that we ship."""
    target = object_at(hf, "auto_map").get("AutoModelForCausalLM")
    return isinstance(target, str) and not target.startswith(f"{MODELING_MODULE}.")


def read_rope(row: Family, hf: Mapping[str, Any], max_positions: int) -> RopeConfig:
    """From ``rope_scaling`` or ``rope_parameters``, and ``rope_theta``.

    Longrope is read as Phi-MoE has it. The stock class of transformers 5 recomputes its frequencies
    from the *short* factors at every call and switches only the scale beyond the original context,
    whereas the modelling code that Phi-3.5-MoE was published with, named by ``auto_map``, takes the
    long factors there. Whoever the file names defines the model: long factors are used exactly if
    ``auto_map`` names code. Files of ours that need to say otherwise carry ``SWITCH_KEY``.

    Raises:
        ValueError: a kind that the family's class does not read, or values that cannot be.
    """
    scaling = object_at(hf, "rope_scaling") or object_at(hf, "rope_parameters")
    scaling = scaling or row.default_scaling
    theta = scaling.get("rope_theta") or hf.get("rope_theta") or row.default_theta
    facts = {"theta": typed("rope_theta", theta, float)}
    kind = scaling.get("rope_type", scaling.get("type", DefaultRope.kind))
    if kind not in row.ropes:
        raise ValueError(f"{row.model_type}: rope type must be one of {row.ropes}, got {kind!r}")
    rope: Any = ROPES[kind]
    for key, fact in _SCALING[kind].items():
        if key == _ORIGINAL:
            above = hf.get(key) if rope is LongRope else None
            facts[fact] = typed(key, above or scaling.get(key) or max_positions, int)
        elif isinstance(getattr(rope, fact), tuple):
            facts[fact] = tuple(list_at(scaling, key, float))
        elif key in _OPTIONAL:
            if scaling.get(key) is not None:
                kind_of_value = bool if key == "truncate" else float
                facts[fact] = typed(f"{kind}'s {key}", scaling[key], kind_of_value)
        else:
            facts[fact] = typed(f"{kind}'s {key}", scaling.get(key), float)
    if rope is LongRope:
        switches = hf.get(SWITCH_KEY, names_remote_code(hf))
        facts["switch_factor"] = typed(SWITCH_KEY, switches, bool)
    return rope(**facts)


def read_rotary_share(row: Family, hf: Mapping[str, Any], head_dim: int) -> float:
    """The share of a head that is turned.

    Raises:
        ValueError: not a number in (0, 1], or a family that turns whole heads.
    """
    scaling = object_at(hf, "rope_scaling") or object_at(hf, "rope_parameters")
    given = scaling.get(_SHARE)
    given = hf.get(_SHARE) if given is None else given
    if given is None and row.rotary_share is not None and hf.get(_TURNED) is not None:
        given = typed(_TURNED, hf[_TURNED], int) / head_dim
    if given is None:
        return 1.0 if row.rotary_share is None else row.rotary_share
    share = typed(_SHARE, given, float)
    if row.rotary_share is None and share != 1.0:
        raise ValueError(
            f"{row.model_type}: {_SHARE} must be 1, rotary embeddings cover whole heads, got "
            f"{share}"
        )
    if not 0 < share <= 1:
        raise ValueError(f"{_SHARE} must be in (0, 1], got {share}")
    return share


def write_rotary_share(row: Family, hf: dict[str, Any], share: float, head_dim: int) -> None:
    """Edits a parsed file where it does not say ``share`` already."""
    if read_rotary_share(row, hf, head_dim) != share:
        hf[_SHARE] = share
        for name in ("rope_parameters", "rope_scaling"):
            if object_at(hf, name):
                hf[name] = {**hf[name], _SHARE: share}


def write_rope(row: Family, hf: dict[str, Any], rope: RopeConfig, max_positions: int) -> None:
    """Edits a parsed file where it does not say ``rope`` already.

    What has to be written is written in both spellings, for readers before and since transformers
    5. Whether long factors are used is left to ``SWITCH_KEY``.
    """
    before = read_rope(row, hf, max_positions)
    if isinstance(before, LongRope) and isinstance(rope, LongRope):
        before = dataclasses.replace(before, switch_factor=rope.switch_factor)
    if before != rope or not set(_KEYS) & set(hf):
        for key in _KEYS:
            hf.pop(key, None)
        scaling: dict[str, Any] = {}
        for key, fact in _SCALING[rope.kind].items():
            value = getattr(rope, fact)
            if value is not None:
                scaling[key] = list(value) if isinstance(value, tuple) else value
        parameters = {"rope_type": rope.kind, "rope_theta": rope.theta, **scaling}
        hf.update({"rope_theta": rope.theta, "rope_parameters": parameters})
        if scaling:
            hf["rope_scaling"] = {"type": rope.kind, **scaling}
        if isinstance(rope, LongRope):
            hf[_ORIGINAL] = rope.original_positions
    hf.pop(SWITCH_KEY, None)
    if isinstance(rope, LongRope) and rope.switch_factor != names_remote_code(hf):
        hf[SWITCH_KEY] = rope.switch_factor
