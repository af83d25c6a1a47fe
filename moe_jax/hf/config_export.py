"""ModelConfig -> ``config.json``: the source's own file, edited where the architecture changed."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from moe_jax.config import DenseConfig, LayerConfig, ModelConfig
from moe_jax.hf.config_import import LAYERS_KEY, model_config, read_fact, read_facts
from moe_jax.hf.families import find_family
from moe_jax.hf.family import COMPRESSED_SUFFIX, Family
from moe_jax.hf.layer_patterns import follow_layers
from moe_jax.hf.novices import EXPERTS_KEY, TOKENS_KEY, describe_novices, describe_substitution
from moe_jax.hf.rope_keys import MODELING_MODULE, names_remote_code, write_rope, write_rotary_share
from moe_jax.kinds import LongRope


def export_config(
    config: ModelConfig,
    source: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    compression_config: Mapping[str, Any] | None = None,
    expert_substitution: bool = True,
    quantization_config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The ``config.json`` of an export.

    With a source, its keys, their order and their spelling stay; every alias of a changed fact
    changes with it, lists with an entry for each layer follow layers that were dropped,
    ``head_dim`` is added where heads no longer imply it, and nothing else is touched. Models that
    stock classes cannot hold (novices, layers or experts that differ, experts that add a constant)
    get the ``auto_map`` of the modelling file that is shipped with them.

    Args:
        source: the parsed ``config.json`` it was derived from.
        dtype: name of the weights' dtype, or None to leave the source's.
        expert_substitution: describe novices there too, except in models whose experts differ in
            width or add a constant: that description has no words for those.
        quantization_config: how the weights are packed; None: they are not.

    Raises:
        ValueError: the source is of another family, or the family cannot express ``config``.
    """
    row = find_family(config.family)
    if source is not None and find_family(source.get("model_type")) is not row:
        raise ValueError(
            f"source must be a {row.model_type} checkpoint, got {source.get('model_type')!r}"
        )
    facts = _facts(row, config)
    _check_fixed(row, config, facts)
    hf = copy.deepcopy(dict(source)) if source is not None else _blank(row)
    hf.pop(LAYERS_KEY, None)
    if quantization_config is None:
        hf.pop("quantization_config", None)
    else:
        hf["quantization_config"] = copy.deepcopy(dict(quantization_config))
    if source is not None:
        before = read_facts(row, hf)["num_layers"]
        if before != config.num_layers:
            follow_layers(hf, before, config.kept_layers, config.num_layers)
    _edit_facts(row, hf, facts, new=source is None)
    if _layers_differ(config) or has_widths_or_bias(config) or _shared_is_odd(row, config):
        hf[LAYERS_KEY] = [
            {**_layer_facts(layer), **_expert_facts(row, layer)} for layer in config.layers
        ]
    dense = [i for i in range(config.num_layers) if i not in config.moe_layers]
    row.dense_layers.write(hf, dense, config.num_layers)
    default: Any = row.keys["sliding_window"].default if "sliding_window" in row.keys else None
    row.windows.write(hf, default, tuple(layer.sliding_window for layer in config.layers))
    _edit_compression(row, hf, config, compression_config, expert_substitution)
    write_rope(row, hf, config.rope, config.max_positions)
    share = getattr(config.attention, "rotary_share", 1.0)
    write_rotary_share(row, hf, share, config.head_dim)
    _warn_of_long_factors(config, hf)
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
    row = find_family(config.family)
    odd_norms = row.norms_of_model_width and any(n * config.head_dim != config.width for n in heads)
    novices = has_novices(config) and not row.holds_constants
    odd_experts = novices or has_widths_or_bias(config)
    odd_shared = _shared_is_odd(row, config)
    return odd_norms or odd_experts or odd_shared or _layers_differ(config)


def shared_multiple(config: ModelConfig) -> str:
    """A sentence on a shared expert that the file cannot count in routed ones; else empty."""
    if not _shared_is_odd(find_family(config.family), config):
        return ""
    moe = next(
        moe
        for moe in map(config.moe, config.moe_layers)
        if moe.shared is not None and moe.shared.width % moe.expert_width
    )
    shared = moe.shared.width if moe.shared is not None else 0
    below = next(w for w in range(moe.expert_width, 0, -1) if shared % w == 0)
    return (
        f"The shared expert's {shared} neurons are no multiple of the {moe.expert_width} of a "
        f"routed one, in which this family's config.json counts them; {below} would be."
    )


def _shared_is_odd(row: Family, config: ModelConfig) -> bool:
    """Whether a shared expert is no multiple of a routed one's width, which the file counts in."""
    key = row.keys.get("shared_width")
    return (
        key is not None
        and key.per is not None
        and any(
            moe.shared is not None and moe.shared.width % moe.expert_width
            for moe in map(config.moe, config.moe_layers)
        )
    )


def has_novices(config: ModelConfig) -> bool:
    """Whether any expert is a constant."""
    return any(config.moe(i).novice_ids for i in config.moe_layers)


def has_widths_or_bias(config: ModelConfig) -> bool:
    """Whether experts of any layer differ in width, or add a constant that the class does not."""
    row = find_family(config.family)
    return any(_expert_facts(row, layer) for layer in config.layers)


def _blank(row: Family) -> dict[str, Any]:
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    stock = {"architectures": [f"{row.stem}ForCausalLM"], "model_type": row.model_type}
    return {**stock, "hidden_act": "silu", **tokens}


def _check_fixed(row: Family, config: ModelConfig, facts: dict[str, Any]) -> None:
    for name in ("attention", "router"):
        kind, wanted = getattr(config, name).kind, getattr(row, name).kind
        if kind != wanted:
            raise ValueError(f"{row.model_type}: {name} must be {wanted}, got {kind}")
    for name, value in row.fixed.items():
        if facts.get(name, value) != value:
            raise ValueError(f"{row.model_type}: {name} must be {value}, got {facts[name]}")


def _layer_facts(layer: LayerConfig) -> dict[str, int]:
    facts = {"num_heads": layer.num_heads, "num_kv_heads": layer.num_kv_heads}
    moe = layer.feed_forward
    if isinstance(moe, DenseConfig):
        return {**facts, "dense_width": moe.width}
    shared = {} if moe.shared is None else {"shared_width": moe.shared.width}
    names = ("num_experts", "experts_per_token", "expert_width")
    return {**facts, **{name: getattr(moe, name) for name in names}, **shared}


def _expert_facts(row: Family, layer: LayerConfig) -> dict[str, Any]:
    """Facts that only the modelling file knows, where they are used."""
    moe = layer.feed_forward
    if isinstance(moe, DenseConfig):
        return {}
    widths = {"expert_widths": list(moe.expert_widths)} if moe.expert_widths else {}
    bias = moe.expert_bias and not row.holds_constants
    return {**widths, **({"expert_bias": True} if bias else {})}


def _layers_differ(config: ModelConfig) -> bool:
    facts = {fact for layer in config.layers for fact in _layer_facts(layer).items()}
    return len(facts) > len(dict(facts))


def _facts(row: Family, config: ModelConfig) -> dict[str, Any]:
    """Every fact that the family has a key or a fixed value for, and shapes of layers.

    Where layers differ, the largest value of any; facts that no layer has are left out.
    """
    clamps = {config.moe(i).clamp for i in config.moe_layers} - {None}
    parts: tuple[Any, ...] = (config, config.attention, config.router, *clamps)
    facts = {f.name: getattr(part, f.name) for part in parts for f in dataclasses.fields(part)}
    facts = {name: facts[name] for name in facts.keys() & {*row.keys, *row.fixed}}
    facts["num_layers"] = config.num_layers
    for layer in config.layers:
        for fact, value in _layer_facts(layer).items():
            facts[fact] = max(value, facts.get(fact, 0))
    if config.moe_layers and "shared_width" in row.keys:
        facts.setdefault("shared_width", 0)
    return facts


def _edit_facts(row: Family, hf: dict[str, Any], facts: dict[str, Any], new: bool) -> None:
    for fact, key in row.keys.items():
        if fact not in facts:  # no layer has it, or its pattern writes it
            if new and key.implied is not None:
                hf[key.names[0]] = key.implied(facts)
            continue
        present = [name for name in key.names if name in hf]
        unchanged = not new and read_fact(key, hf, facts) == facts[fact]
        stored = key.stored(facts[fact], facts)
        if stored is None and key.per is not None:  # the layers' own facts say it
            continue
        if not unchanged or key.write_all:
            names = key.names if key.write_all else present or key.names[:1]
            hf.update(dict.fromkeys(names, stored))


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
        hf.update(describe_novices(config))
        if substitution and needs_modeling_file(config) and not has_widths_or_bias(config):
            transforms["expert_substitution"] = describe_substitution(row, config)
    if transforms:
        compression["transform_config"] = transforms
    if compression:
        hf["compression_config"] = compression
    if needs_modeling_file(config):
        hf["model_type"] = row.model_type + COMPRESSED_SUFFIX
        hf["auto_map"] = {
            "AutoConfig": f"{MODELING_MODULE}.{row.stem}CompressedConfig",
            "AutoModelForCausalLM": f"{MODELING_MODULE}.{row.stem}CompressedForCausalLM",
        }
    else:
        if hf["model_type"] not in row.aliases:
            hf["model_type"] = row.model_type
        if hf.get("auto_map") and not names_remote_code(hf):
            del hf["auto_map"]


def _warn_of_long_factors(config: ModelConfig, hf: Mapping[str, Any]) -> None:
    rope = config.rope
    switches = isinstance(rope, LongRope) and rope.switch_factor
    if switches and not names_remote_code(hf) and not needs_modeling_file(config):
        warnings.warn(
            "the stock Phi-MoE class does not use longrope's long factors: it will differ "
            f"from this model beyond {rope.switch_length} tokens",
            stacklevel=3,
        )
