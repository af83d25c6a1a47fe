"""ModelConfig -> ``config.json``: the source's own file, edited where the architecture changed."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from moe_jax.config import (
    DenseConfig,
    LayerConfig,
    LongRope,
    ModelConfig,
    MoeConfig,
    RopeConfig,
)
from moe_jax.hf.config_import import (
    LAYERS_KEY,
    SWITCH_KEY,
    dense_layers,
    model_config,
    names_remote_code,
    read_fact,
    read_facts,
    rope_config,
)
from moe_jax.hf.families import COMPRESSED_SUFFIX, Family, find_family
from moe_jax.hf.novices import (
    EXPERTS_KEY,
    MODELING_MODULE,
    TOKENS_KEY,
    describe_novices,
    describe_substitution,
)

_ROPE_KEYS = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
    SWITCH_KEY,
)


def export_config(
    config: ModelConfig,
    source: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    compression_config: Mapping[str, Any] | None = None,
    expert_substitution: bool = True,
) -> dict[str, Any]:
    """The ``config.json`` of an export.

    With a source, its keys, their order and their spelling stay; every alias of a changed fact
    changes with it, ``head_dim`` is added where heads no longer imply it, and nothing else is
    touched. Models that stock classes cannot hold (novices, layers or experts that differ, experts
    that add a constant) get the ``auto_map`` of the modelling file that is shipped with them.

    Args:
        config: the architecture to write.
        source: the parsed ``config.json`` it was derived from.
        dtype: name of the weights' dtype, or None to leave the source's.
        compression_config: merged into the key of that name.
        expert_substitution: describe novices there too, except in models whose experts differ in
            width or add a constant: that description has no words for those.

    Raises:
        ValueError: the source is of another family, or the family cannot express ``config``.
    """
    row = find_family(config.family)
    if source is not None and find_family(source.get("model_type")) is not row:
        raise ValueError(
            f"source must be a {row.model_type} checkpoint, got {source.get('model_type')!r}"
        )
    if config.router.kind != row.router:
        raise ValueError(f"{row.model_type}: router must be {row.router}, got {config.router.kind}")
    facts = _facts(row, config)
    for name, value in row.fixed.items():
        if facts[name] != value:
            raise ValueError(f"{row.model_type}: {name} must be {value}, got {facts[name]}")
    hf = copy.deepcopy(dict(source)) if source is not None else _blank(row)
    _edit_facts(row, hf, config, new=source is None)
    _edit_dense_layers(row, hf, config)
    _edit_compression(row, hf, config, compression_config, expert_substitution)
    _edit_rope(row, hf, config)
    if dtype is not None:
        present = [name for name in ("dtype", "torch_dtype") if name in hf]
        hf.update(dict.fromkeys(present or ["dtype"], dtype))
    written = model_config(hf)
    if written != config:
        raise ValueError(
            f"{row.model_type} cannot express this architecture: wrote {written}, got {config}"
        )
    return hf


def needs_modeling_file(config: ModelConfig) -> bool:
    """Whether the stock class cannot hold the model: novices, or layers or experts that differ.

    The classes with q and k norms over all heads take their size from the width, so those cannot
    hold heads that do not add up to it either.
    """
    heads = {layer.num_heads for layer in config.layers}
    odd_norms = config.attention.qk_norm == "full" and any(
        n * config.head_dim != config.width for n in heads
    )
    odd_experts = has_novices(config) or has_widths_or_bias(config)
    return odd_norms or odd_experts or _layers_differ(config)


def has_novices(config: ModelConfig) -> bool:
    """Whether any expert is a constant."""
    return any(config.moe(i).novice_ids for i in config.moe_layers)


def has_widths_or_bias(config: ModelConfig) -> bool:
    """Whether the experts of any layer differ in width or add a constant to their output."""
    return any(_expert_facts(layer) for layer in config.layers)


def _blank(row: Family) -> dict[str, Any]:
    return {
        "architectures": [row.architecture],
        "model_type": row.model_type,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _layer_facts(layer: LayerConfig) -> dict[str, int]:
    facts = {"num_heads": layer.num_heads, "num_kv_heads": layer.num_kv_heads}
    feed_forward = layer.feed_forward
    if isinstance(feed_forward, DenseConfig):
        return {**facts, "dense_width": feed_forward.width}
    return {
        **facts,
        "num_experts": feed_forward.num_experts,
        "experts_per_token": feed_forward.experts_per_token,
        "expert_width": feed_forward.expert_width,
    }


def _expert_facts(layer: LayerConfig) -> dict[str, Any]:
    """Facts that only the modelling file knows, where they are used."""
    moe = layer.feed_forward
    facts: dict[str, Any] = {}
    if isinstance(moe, MoeConfig) and moe.expert_widths:
        facts["expert_widths"] = list(moe.expert_widths)
    if isinstance(moe, MoeConfig) and moe.expert_bias:
        facts["expert_bias"] = True
    return facts


def _layers_differ(config: ModelConfig) -> bool:
    values: dict[str, set[int]] = {}
    for layer in config.layers:
        for fact, value in _layer_facts(layer).items():
            values.setdefault(fact, set()).add(value)
    return any(len(different) > 1 for different in values.values())


def _facts(row: Family, config: ModelConfig) -> dict[str, Any]:
    """The row's facts; where layers differ, the largest value of any layer."""
    windows = {layer.sliding_window for layer in config.layers}
    if len(windows) > 1:
        raise ValueError(
            f"{row.model_type}: sliding_window must be the same in all layers, got {windows}"
        )
    facts: dict[str, Any] = {
        "num_layers": config.num_layers,
        "sliding_window": windows.pop(),
        **dataclasses.asdict(config.attention),
        **dataclasses.asdict(config.router),
    }
    for layer in config.layers:
        for fact, value in _layer_facts(layer).items():
            facts[fact] = max(value, facts.get(fact, 0))
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {**facts, **{name: own[name] for name in {*row.keys, *row.fixed} & own.keys()}}


def _edit_facts(row: Family, hf: dict[str, Any], config: ModelConfig, new: bool) -> None:
    facts = _facts(row, config)
    switch = row.sliding_window_switch
    if switch is not None and (
        new or read_facts(row, hf)["sliding_window"] != facts["sliding_window"]
    ):
        hf[switch] = facts["sliding_window"] is not None
    for fact, key in row.keys.items():
        if fact not in facts:  # no layer has it
            continue
        if fact == "sliding_window" and switch is not None and not hf.get(switch, False):
            continue
        present = [name for name in key.names if name in hf]
        unchanged = not new and read_fact(fact, key, hf, facts) == facts[fact]
        if not unchanged or key.write_all:
            names = key.names if key.write_all else present or key.names[:1]
            hf.update(dict.fromkeys(names, facts[fact]))
    hf.pop(LAYERS_KEY, None)
    if _layers_differ(config) or has_widths_or_bias(config):
        hf[LAYERS_KEY] = [
            {**_layer_facts(layer), **_expert_facts(layer)} for layer in config.layers
        ]


def _edit_dense_layers(row: Family, hf: dict[str, Any], config: ModelConfig) -> None:
    dense = [
        i for i, layer in enumerate(config.layers) if not isinstance(layer.feed_forward, MoeConfig)
    ]
    if row.dense_layers is None and dense:
        raise ValueError(
            f"{row.model_type}: every layer must have experts, layers {dense} have none"
        )
    if row.dense_layers is not None and dense != list(dense_layers(row, hf, config.num_layers)):
        named, period = row.dense_layers
        hf.update({named: dense, period: 1})


def _edit_compression(
    row: Family,
    hf: dict[str, Any],
    config: ModelConfig,
    extra: Mapping[str, Any] | None,
    substitution: bool,
) -> None:
    """Model type, ``auto_map`` and the description of novices; stale ones are removed."""
    for key in (EXPERTS_KEY, TOKENS_KEY):
        hf.pop(key, None)
    compression = {**(hf.pop("compression_config", None) or {}), **(extra or {})}
    transforms = dict(compression.pop("transform_config", None) or {})
    transforms.pop("expert_substitution", None)
    if has_novices(config):
        hf.update(describe_novices(row, config))
        if substitution and not has_widths_or_bias(config):
            transforms["expert_substitution"] = describe_substitution(row, config)
    if transforms:
        compression["transform_config"] = transforms
    if compression:
        hf["compression_config"] = compression
    if needs_modeling_file(config):
        stem = row.architecture.removesuffix("ForCausalLM") + "Compressed"
        hf["model_type"] = row.model_type + COMPRESSED_SUFFIX
        hf["auto_map"] = {
            "AutoConfig": f"{MODELING_MODULE}.{stem}Config",
            "AutoModelForCausalLM": f"{MODELING_MODULE}.{stem}ForCausalLM",
        }
    else:
        hf["model_type"] = row.model_type
        if hf.get("auto_map") and not names_remote_code(hf):
            del hf["auto_map"]


def _edit_rope(row: Family, hf: dict[str, Any], config: ModelConfig) -> None:
    rope = config.rope
    if _with_switch(rope_config(row, hf, config.max_positions), rope) != rope or not (
        set(_ROPE_KEYS) & set(hf)
    ):
        for key in _ROPE_KEYS:
            hf.pop(key, None)
        hf.update(_rope_keys(rope))
    hf.pop(SWITCH_KEY, None)
    if isinstance(rope, LongRope) and rope.switch_factor != names_remote_code(hf):
        hf[SWITCH_KEY] = rope.switch_factor
        if rope.switch_factor and not needs_modeling_file(config):
            warnings.warn(
                "the stock Phi-MoE class does not use longrope's long factors: it will differ "
                f"from this model beyond {rope.original_positions} tokens",
                stacklevel=4,
            )


def _with_switch(rope: RopeConfig, other: RopeConfig) -> RopeConfig:
    if isinstance(rope, LongRope) and isinstance(other, LongRope):
        return dataclasses.replace(rope, switch_factor=other.switch_factor)
    return rope


def _rope_keys(rope: RopeConfig) -> dict[str, Any]:
    """Both spellings, for readers before and since transformers 5."""
    parameters: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    keys: dict[str, Any] = {"rope_theta": rope.theta, "rope_parameters": parameters}
    if isinstance(rope, LongRope):
        scaling = {
            "short_factor": list(rope.short_factor),
            "long_factor": list(rope.long_factor),
            "short_mscale": rope.short_scale,
            "long_mscale": rope.long_scale,
            "original_max_position_embeddings": rope.original_positions,
        }
        parameters.update(scaling)
        keys["rope_scaling"] = {"type": "longrope", **scaling}
        keys["original_max_position_embeddings"] = rope.original_positions
    return keys
