"""How novices are written in ``config.json``, in both published forms.

The authors of MoNE (arXiv 2507.00390) list the replaced experts per layer under
``approximate_experts``. The serving proposal of vLLM describes the same tensors under
``compression_config.transform_config.expert_substitution``, version 1. Either is read; files
that carry both must say the same in both. The proposal substitutes experts and leaves the others
as they are, of one width and without constants: models whose experts differ in width or add a
constant are written in the authors' form only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moe_jax.config import ModelConfig
from moe_jax.hf.checks import object_at
from moe_jax.hf.family import Family

EXPERTS_KEY = "approximate_experts"
TOKENS_KEY = "approximate_expert_init_tokens"

_WEIGHT_LAYOUT = "compact_retained_experts"
_ROUTER_SEMANTICS = {
    "preserve_logical_expert_ids": True,
    "preserve_router_weights": True,
    "renormalize_after_substitution": False,
}


def novice_ids(row: Family, hf: Mapping[str, Any]) -> dict[int, tuple[int, ...]]:
    """Sorted ids of the novices of each layer that has any.

    Raises:
        ValueError: malformed entries, or two forms that disagree.
    """
    listed = _from_authors(hf.get(EXPERTS_KEY) or {})
    transforms = object_at(object_at(hf, "compression_config"), "transform_config")
    described = transforms.get("expert_substitution")
    if described is None:
        return listed
    substituted = _from_substitution(row, described)
    if listed and listed != substituted:
        raise ValueError(
            f"{EXPERTS_KEY} and compression_config must name the same novices, "
            f"got {listed} and {substituted}"
        )
    return substituted


def _from_authors(raw: Any) -> dict[int, tuple[int, ...]]:
    try:
        ids = {int(layer): _sorted_ids(experts) for layer, experts in raw.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{EXPERTS_KEY} must map layers to lists of ids, got {raw!r}") from error
    return {layer: experts for layer, experts in ids.items() if experts}


def _sorted_ids(experts: Iterable[Any]) -> tuple[int, ...]:
    return tuple(sorted(map(int, experts)))


def _from_substitution(row: Family, raw: Any) -> dict[int, tuple[int, ...]]:
    if not isinstance(raw, Mapping) or raw.get("version") != 1:
        raise ValueError(f"expert_substitution must be an object of version 1, got {raw!r}")
    if raw.get("router_semantics") != _ROUTER_SEMANTICS:
        raise ValueError(
            f"expert_substitution: router_semantics must be {_ROUTER_SEMANTICS}, "
            f"got {raw.get('router_semantics')!r}"
        )
    prefix, suffix = experts_path(row, "\0").split("\0")
    ids: dict[int, tuple[int, ...]] = {}
    targets = object_at(raw, "targets")
    for path in targets:
        target = object_at(targets, path)
        layer = path.removeprefix(prefix).removesuffix(suffix)
        if path != f"{prefix}{layer}{suffix}" or not layer.isdecimal():
            raise ValueError(
                f"expert_substitution: target must be {experts_path(row, 'LAYER')}, got {path!r}"
            )
        if (layout := target.get("weight_layout")) != _WEIGHT_LAYOUT:
            raise ValueError(f"{path}: weight_layout must be {_WEIGHT_LAYOUT}, got {layout!r}")
        replacements = object_at(target, "replacements")
        for expert, novice in replacements.items():
            wanted = _replacement(path, expert)
            if novice != wanted:
                raise ValueError(f"{path}.{expert}: replacement must be {wanted}, got {novice!r}")
        ids[int(layer)] = _sorted_ids(replacements)
    return {layer: experts for layer, experts in ids.items() if experts}


def _replacement(path: str, expert: int | str) -> dict[str, Any]:
    return {"format": "constant-v1", "tensors": {"value": f"{path}.{expert}.approx_value"}}


def experts_path(row: Family, layer: int | str) -> str:
    """Module path of the experts of a layer, as in the names of its novices' tensors."""
    stored = row.layouts[row.own_layout].get("layers.{layer}.moe.novices.constant")
    if stored is None:
        raise ValueError(f"{row.model_type}: no layer has experts, so that none can be novices")
    return stored.name.split(".{novice}")[0].format(layer=layer)


def describe_novices(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` keys of the authors' form; layers without novices have empty lists.

    The second key counts, in their code, the tokens that a still adapting mean has seen; ours
    are final, hence 0.
    """
    ids = {str(i): list(config.moe(i).novice_ids) for i in config.moe_layers}
    return {EXPERTS_KEY: ids, TOKENS_KEY: {i: [0] * len(experts) for i, experts in ids.items()}}


def describe_substitution(row: Family, config: ModelConfig) -> dict[str, Any]:
    """``expert_substitution``, version 1, of the vLLM proposal."""
    targets = {}
    for i in config.moe_layers:
        moe, path = config.moe(i), experts_path(row, i)
        if moe.novice_ids:
            targets[path] = {
                "num_logical_experts": moe.num_experts,
                "weight_layout": _WEIGHT_LAYOUT,
                "replacements": {str(e): _replacement(path, e) for e in moe.novice_ids},
            }
    return {"version": 1, "router_semantics": dict(_ROUTER_SEMANTICS), "targets": targets}
