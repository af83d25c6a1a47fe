"""The abstract parameter tree: the only place that knows which arrays a model has.

Shapes, logical axes and initialisers of every leaf follow from a ModelConfig here. The reader,
the writer, sharding, checkpoints, the Flax shell and the parameter counts all derive from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array

from moe_jax.config import LayerConfig, ModelConfig, MoeConfig

# Bytes of a stored number.
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Leaf:
    """One parameter: its shape, the name of each axis, and how it starts.

    ``axes`` are logical names (``vocab embed heads kv_heads head_dim expert mlp novice``) that
    ``processes`` maps to mesh axes. ``init`` is ``normal`` (``ModelConfig.init_std``), ``ones``
    or ``zeros``.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Literal["normal", "ones", "zeros"] = "normal"

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def abstract_params(config: ModelConfig) -> dict[str, Any]:
    """Nested dict (and a list under ``layers``) of Leaf, shaped exactly as ``params``."""
    d, v = config.width, config.vocab_size
    tree: dict[str, Any] = {
        "embed": {"embedding": Leaf((v, d), ("vocab", "embed"))},
        "layers": [_layer(config, layer) for layer in config.layers],
        "final_norm": _norm(config),
    }
    if not config.tied_embeddings:
        tree["lm_head"] = {"kernel": Leaf((d, v), ("embed", "vocab"))}
    if config.lm_head_bias:
        tree.setdefault("lm_head", {})["bias"] = Leaf((v,), ("vocab",), "zeros")
    return tree


def _norm(config: ModelConfig) -> dict[str, Leaf]:
    leaves = {"scale": Leaf((config.width,), ("embed",), "ones")}
    if config.norm == "layer":
        leaves["bias"] = Leaf((config.width,), ("embed",), "zeros")
    return leaves


def _layer(config: ModelConfig, layer: LayerConfig) -> dict[str, Any]:
    part = "moe" if isinstance(layer.feed_forward, MoeConfig) else "mlp"
    return {
        "attention_norm": _norm(config),
        "attention": _attention(config, layer),
        "mlp_norm": _norm(config),
        part: _moe(config, layer.feed_forward)
        if isinstance(layer.feed_forward, MoeConfig)
        else _mlp(config.width, layer.feed_forward.width),
    }


def _attention(config: ModelConfig, layer: LayerConfig) -> dict[str, Any]:
    d, n, g, h = config.width, layer.num_heads, layer.num_kv_heads, config.head_dim
    tree: dict[str, Any] = {
        "query": {"kernel": Leaf((d, n, h), ("embed", "heads", "head_dim"))},
        "key": {"kernel": Leaf((d, g, h), ("embed", "kv_heads", "head_dim"))},
        "value": {"kernel": Leaf((d, g, h), ("embed", "kv_heads", "head_dim"))},
        "out": {"kernel": Leaf((n, h, d), ("heads", "head_dim", "embed"))},
    }
    if config.qkv_bias:
        tree["query"]["bias"] = Leaf((n, h), ("heads", "head_dim"), "zeros")
        tree["key"]["bias"] = Leaf((g, h), ("kv_heads", "head_dim"), "zeros")
        tree["value"]["bias"] = Leaf((g, h), ("kv_heads", "head_dim"), "zeros")
    if config.attention_out_bias:
        tree["out"]["bias"] = Leaf((d,), ("embed",), "zeros")
    if config.qk_norm == "full":
        tree["query_norm"] = {"scale": Leaf((n, h), ("heads", "head_dim"), "ones")}
        tree["key_norm"] = {"scale": Leaf((g, h), ("kv_heads", "head_dim"), "ones")}
    elif config.qk_norm == "head":
        tree["query_norm"] = {"scale": Leaf((h,), ("head_dim",), "ones")}
        tree["key_norm"] = {"scale": Leaf((h,), ("head_dim",), "ones")}
    return tree


def _mlp(d: int, f: int) -> dict[str, Leaf]:
    return {
        "gate": Leaf((d, f), ("embed", "mlp")),
        "up": Leaf((d, f), ("embed", "mlp")),
        "down": Leaf((f, d), ("mlp", "embed")),
    }


def _moe(config: ModelConfig, moe: MoeConfig) -> dict[str, Any]:
    d = config.width
    buckets = [_experts(d, bucket.width, len(bucket.expert_ids)) for bucket in moe.buckets]
    tree: dict[str, Any] = {
        "router": {"kernel": Leaf((d, moe.num_experts), ("embed", "router"))},
        "experts": buckets if moe.expert_widths else buckets[0],
    }
    if moe.expert_bias:
        tree["expert_bias"] = Leaf((len(moe.expert_ids), d), ("expert", "embed"), "zeros")
    if moe.novice_ids:
        tree["novices"] = {"constant": Leaf((len(moe.novice_ids), d), ("novice", "embed"), "zeros")}
    return tree


def _experts(d: int, f: int, e: int) -> dict[str, Leaf]:
    return {
        "gate": Leaf((e, d, f), ("expert", "embed", "mlp")),
        "up": Leaf((e, d, f), ("expert", "embed", "mlp")),
        "down": Leaf((e, f, d), ("expert", "mlp", "embed")),
    }


def leaves_with_path(tree: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """(path, leaf) pairs of a nested dict/list, in the order of ``jax.tree.leaves``."""
    if isinstance(tree, dict):
        for key in sorted(tree):
            yield from leaves_with_path(tree[key], (*path, key))
    elif isinstance(tree, (list, tuple)):
        for i, child in enumerate(tree):
            yield from leaves_with_path(child, (*path, i))
    else:
        yield path, tree


def path_name(path: tuple) -> str:
    """``("layers", 3, "moe", "router", "kernel")`` -> ``layers.3.moe.router.kernel``."""
    return ".".join(str(part) for part in path)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model.

    ``active`` counts what one token reads: both embedding matrices whole (the convention that
    reproduces the published counts of Phi-3.5-MoE and Phi-mini-MoE), K of the E experts. With
    novices it is the count of a token that is routed to real experts only, and where experts
    differ in width to the widest ones: an upper bound.
    """

    total: int
    active: int
    experts: int


def count_params(config: ModelConfig) -> ParameterCount:
    """Counts from the configuration alone; nothing is allocated."""
    total = sum(leaf.size for _, leaf in leaves_with_path(abstract_params(config)))
    experts = inactive = 0
    for i in config.moe_layers:
        moe = config.moe(i)
        constant = config.width
        sizes = [
            3 * config.width * bucket.width + constant * moe.expert_bias
            for bucket in moe.buckets
            for _ in bucket.expert_ids
        ]
        novices = len(moe.novice_ids) * constant
        experts += sum(sizes) + novices
        inactive += sum(sizes[moe.experts_per_token :]) + novices
    return ParameterCount(total, total - inactive, experts)


# Which axis of a projection runs over hidden neurons.
NEURON_AXIS = {"gate": 2, "up": 2, "down": 1}


def stack_experts(experts: Any, moe: MoeConfig) -> dict[str, Array]:
    """All experts as ``gate, up [E_kept, D, F]`` and ``down [E_kept, F, D]``, in stored order.

    Args:
        experts: as in ``params``: such a dict already, or one of each of ``moe.buckets``, whose
            experts are filled up to ``moe.expert_width`` with zeros. Zero neurons add nothing.
        moe: the layer.
    """
    if not moe.expert_widths:
        return experts
    return {
        name: jnp.concatenate([_widened(part[name], axis, moe.expert_width) for part in experts])
        for name, axis in NEURON_AXIS.items()
    }


def split_experts(stacked: dict[str, Array], moe: MoeConfig) -> Any:
    """Inverse of ``stack_experts``: what lies past an expert's width is dropped."""
    if not moe.expert_widths:
        return stacked
    buckets, first = [], 0
    for width, ids in moe.buckets:
        own = slice(first, first + len(ids))
        buckets.append(
            {
                name: leaf[own, :width] if NEURON_AXIS[name] == 1 else leaf[own, :, :width]
                for name, leaf in stacked.items()
            }
        )
        first = own.stop
    return buckets


def _widened(leaf: Array, axis: int, width: int) -> Array:
    padding = [(0, 0)] * leaf.ndim
    padding[axis] = (0, width - leaf.shape[axis])
    return jnp.pad(leaf, padding)
