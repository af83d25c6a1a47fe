"""The abstract parameter tree: the only place that knows which arrays a model has.

What holds for an array follows from its Leaf: the reader, the writer, pruning, merging, sharding,
optimizers, checkpoints, the Flax shell and the parameter counts all read it, and keep no list of
names beside it. To add a parameter is to add a Leaf here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moe_jax.config import Bucket, LayerConfig, ModelConfig, MoeConfig
from moe_jax.kinds import GroupedQueryAttention, LatentAttention


class Model(NamedTuple):
    """A model: its weights, shaped as ``abstract_params`` of its architecture has them."""

    params: dict[str, Any]
    config: ModelConfig


# Bytes of a stored number.
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Axis(NamedTuple):
    """What one letter of ``Leaf.axes`` stands for.

    Attributes:
        runs_over: the things that entries along it belong to.
        mesh_axis: the axis of a mesh that it is split over; None: replicated.
    """

    runs_over: str
    mesh_axis: str | None


AXES: Mapping[str, Axis] = {
    "V": Axis("tokens of the vocabulary", "tensor"),
    "D": Axis("the residual stream", "fsdp"),
    "N": Axis("query heads", "tensor"),
    "G": Axis("key/value heads", "tensor"),
    "H": Axis("dimensions of a head", None),
    # A router row is an expert or a novice; few numbers, which every device reads.
    "R": Axis("router rows", None),
    "E": Axis("experts with neurons, in stored order", "expert"),
    "F": Axis("neurons of an expert", "tensor"),
    "C": Axis("novices, which are constants", None),
    "Q": Axis("the latent vector of queries", None),
    "K": Axis("the latent vector of keys and values", None),
    "M": Axis("neurons of a dense layer", "tensor"),
    "U": Axis("neurons of a shared expert", "tensor"),
    "L": Axis("layers, where equal ones are stacked for a scan", None),
}

# What a parameter belongs to: what ``trainable`` of a training names.
Part = Literal[
    "embedding", "attention", "norms", "router", "experts", "shared", "novices", "mlp", "head"
]
PARTS: tuple[str, ...] = get_args(Part)


@dataclass(frozen=True)
class Leaf:
    """One parameter.

    Attributes:
        shape: its sizes.
        axes: a letter of ``AXES`` for each.
        part: what it belongs to.
        init: how it starts: ``normal`` has the standard deviation ``ModelConfig.init_std``.
        decay: whether it is a matrix of a product. Weight decay is for these, and so is the dtype
            of computation; norms, biases and constants have neither.
        exact: whether it stays in the dtype that it is stored in, whatever the others are read or
            written in.
    """

    shape: tuple[int, ...]
    axes: str
    part: Part
    init: Literal["normal", "ones", "zeros"] = "normal"
    decay: bool = True
    exact: bool = False

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape) or set(self.axes) - AXES.keys():
            raise ValueError(
                f"axes must be one letter of {''.join(AXES)} for each of {self.shape}, "
                f"got {self.axes!r}"
            )

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def along(self, letter: str) -> int:
        """The size of the axis that has this letter.

        Raises:
            ValueError: there is none.
        """
        return self.shape[self.axes.index(letter)]


def _scale(shape: tuple[int, ...], axes: str, part: Part) -> Leaf:
    return Leaf(shape, axes, part, "ones", decay=False)


def _bias(shape: tuple[int, ...], axes: str, part: Part) -> Leaf:
    return Leaf(shape, axes, part, "zeros", decay=False)


def abstract_params(config: ModelConfig) -> dict[str, Any]:
    """Nested dict (and a list under ``layers``) of Leaf, shaped exactly as ``params``."""
    d, v = config.width, config.vocab_size
    tree: dict[str, Any] = {
        "embed": {"embedding": Leaf((v, d), "VD", "embedding")},
        "layers": [layer_leaves(config, i) for i in range(config.num_layers)],
        "final_norm": _norm(config),
    }
    if not config.tied_embeddings:
        tree["lm_head"] = {"kernel": Leaf((d, v), "DV", "head")}
    if config.lm_head_bias:
        tree.setdefault("lm_head", {})["bias"] = _bias((v,), "V", "head")
    return tree


def _norm(config: ModelConfig) -> dict[str, Leaf]:
    leaves = {"scale": _scale((config.width,), "D", "norms")}
    if config.norm == "layer":
        leaves["bias"] = _bias((config.width,), "D", "norms")
    return leaves


def layer_leaves(config: ModelConfig, layer: int | LayerConfig) -> dict[str, Any]:
    """The tree of one layer alone: of an index, or of a layer of the model's family."""
    layer = config.layers[layer] if isinstance(layer, int) else layer
    tree = {
        "attention_norm": _norm(config),
        "attention": ATTENTION[config.attention.kind](config, layer),
        "mlp_norm": _norm(config),
    }
    if isinstance(layer.feed_forward, MoeConfig):
        return {**tree, "moe": _moe(config, layer.feed_forward)}
    return {**tree, "mlp": _gated(config.width, layer.feed_forward.width, "M", "mlp")}


def _grouped_query(config: ModelConfig, layer: LayerConfig) -> dict[str, Any]:
    d, n, g, h = config.width, layer.num_heads, layer.num_kv_heads, config.head_dim
    tree: dict[str, Any] = {
        "query": {"kernel": Leaf((d, n, h), "DNH", "attention")},
        "key": {"kernel": Leaf((d, g, h), "DGH", "attention")},
        "value": {"kernel": Leaf((d, g, h), "DGH", "attention")},
        "out": {"kernel": Leaf((n, h, d), "NHD", "attention")},
    }
    if config.attention.qkv_bias:
        tree["query"]["bias"] = _bias((n, h), "NH", "attention")
        tree["key"]["bias"] = _bias((g, h), "GH", "attention")
        tree["value"]["bias"] = _bias((g, h), "GH", "attention")
    if config.attention.out_bias:
        tree["out"]["bias"] = _bias((d,), "D", "attention")
    if getattr(config.attention, "sinks", False):
        tree["sinks"] = _bias((n,), "N", "attention")
    if config.attention.qk_norm is not None:
        full = config.attention.qk_norm == "full"
        for name, heads, letter in (("query_norm", n, "N"), ("key_norm", g, "G")):
            shape, axes = ((heads, h), f"{letter}H") if full else ((h,), "H")
            tree[name] = {"scale": _scale(shape, axes, "attention")}
    return tree


def _latent(config: ModelConfig, layer: LayerConfig) -> dict[str, Any]:
    attention: Any = config.attention
    d, n, rank = config.width, layer.num_heads, attention.latent_rank
    key_dim = attention.content_dim + attention.rope_dim
    to_latent = rank + attention.rope_dim
    expanded = (rank, layer.num_kv_heads, attention.content_dim + attention.value_dim)
    tree: dict[str, Any] = {
        "latent": {"kernel": Leaf((d, to_latent), "DK", "attention")},
        "latent_norm": {"scale": _scale((rank,), "K", "attention")},
        "key_value": {"kernel": Leaf(expanded, "KGH", "attention")},
        "out": {"kernel": Leaf((n, attention.value_dim, d), "NHD", "attention")},
    }
    if attention.qkv_bias:
        tree["latent"]["bias"] = _bias((to_latent,), "K", "attention")
    if attention.out_bias:
        tree["out"]["bias"] = _bias((d,), "D", "attention")
    if attention.query_rank is None:
        return {**tree, "query": {"kernel": Leaf((d, n, key_dim), "DNH", "attention")}}
    query = attention.query_rank
    tree["query_latent"] = {"kernel": Leaf((d, query), "DQ", "attention")}
    if attention.qkv_bias:
        tree["query_latent"]["bias"] = _bias((query,), "Q", "attention")
    tree["query_latent_norm"] = {"scale": _scale((query,), "Q", "attention")}
    return {**tree, "query_up": {"kernel": Leaf((query, n, key_dim), "QNH", "attention")}}


# By kind: (config, layer) -> the leaves of its attention.
ATTENTION: Mapping[str, Callable[[ModelConfig, LayerConfig], dict[str, Any]]] = {
    GroupedQueryAttention.kind: _grouped_query,
    LatentAttention.kind: _latent,
}


def _gated(d: int, width: int, letter: str, part: Part, experts: int = 0) -> dict[str, Any]:
    """The matrices of a gated feed-forward network, or of several of equal width, stacked."""
    stacked, of = ((experts,), "E") if experts else ((), "")
    into = Leaf((*stacked, d, width), f"{of}D{letter}", part)
    return {"gate": into, "up": into, "down": Leaf((*stacked, width, d), f"{of}{letter}D", part)}


def _experts(d: int, moe: MoeConfig, bucket: Bucket) -> dict[str, Any]:
    count, width = len(bucket.expert_ids), bucket.width
    tree = _gated(d, width, "F", "experts", count)
    if moe.neuron_bias:
        tree |= {f"{name}_bias": _bias((count, width), "EF", "experts") for name in ("gate", "up")}
    return tree


def _moe(config: ModelConfig, moe: MoeConfig) -> dict[str, Any]:
    d = config.width
    buckets = [_experts(d, moe, b) for b in moe.buckets]
    tree: dict[str, Any] = {
        "router": {"kernel": Leaf((d, moe.num_experts), "DR", "router")},
        "experts": buckets if moe.expert_widths else buckets[0],
    }
    if config.router.logit_bias:
        tree["router"]["bias"] = _bias((moe.num_experts,), "R", "router")
    if config.router.correction:
        # Differences of scores are small against it: rounded, it chooses other experts.
        tree["router"]["correction"] = dataclasses.replace(
            _bias((moe.num_experts,), "R", "router"), exact=True
        )
    if moe.expert_bias:
        tree["expert_bias"] = _bias((len(moe.expert_ids), d), "ED", "experts")
    if moe.shared is not None:
        tree["shared"] = _gated(d, moe.shared.width, "U", "shared")
        if moe.shared.gated:
            tree["shared"]["output_gate"] = {"kernel": Leaf((d,), "D", "shared")}
    if moe.novice_ids:
        tree["novices"] = {"constant": _bias((len(moe.novice_ids), d), "CD", "novices")}
    return tree


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


def leaves_like(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """``abstract_params``, its layers stacked as one ``[L, ...]`` where those of ``params`` are."""
    leaves = abstract_params(config)
    return leaves if isinstance(params["layers"], list) else stack_leaves(leaves)


def stack_leaves(leaves: dict[str, Any]) -> dict[str, Any]:
    """The tree of a model whose equal layers are stacked (see ``model.stack_layers``)."""
    count = len(leaves["layers"])

    def stack(leaf: Leaf) -> Leaf:
        return dataclasses.replace(leaf, shape=(count, *leaf.shape), axes=f"L{leaf.axes}")

    return {**leaves, "layers": jax.tree.map(stack, leaves["layers"][0])}


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
    leaves = abstract_params(config)
    total = experts = inactive = 0
    for _, leaf in leaves_with_path(leaves):
        total += leaf.size
        experts += leaf.size if leaf.part in ("experts", "novices") else 0
        inactive += leaf.size if leaf.part == "novices" else 0
    for i in config.moe_layers:
        sizes = expert_sizes(leaves["layers"][i]["moe"])
        inactive += sum(sizes[config.moe(i).experts_per_token :])
    return ParameterCount(total, total - inactive, experts)


def expert_sizes(moe: Mapping[str, Any]) -> list[int]:
    """Parameters of each expert with neurons, in stored order."""
    buckets = moe["experts"] if isinstance(moe["experts"], list) else [moe["experts"]]
    others = {name: part for name, part in moe.items() if name != "experts"}
    beside = _size_per_expert(others)
    return [
        beside + _size_per_expert(bucket)
        for bucket in buckets
        for _ in range(next(iter(bucket.values())).along("E"))
    ]


def _size_per_expert(leaves: Any) -> int:
    carrying = (leaf for _, leaf in leaves_with_path(leaves) if "E" in leaf.axes)
    return sum(leaf.size // leaf.along("E") for leaf in carrying)


def expert_leaves(config: ModelConfig, layer: int | LayerConfig) -> dict[str, Leaf]:
    """Leaves of the experts of a layer by name: where widths differ, those of the widest."""
    experts = layer_leaves(config, layer)["moe"]["experts"]
    return experts[0] if isinstance(experts, list) else experts


def stack_experts(experts: Any, leaves: Mapping[str, Leaf]) -> dict[str, Array]:
    """All experts of a layer in one array a name, ``[E_kept, ...]``, in stored order.

    Args:
        experts: as in ``params``: such a dict already, or one for each of the layer's buckets,
            whose neurons are filled up to the widest's with zeros. Zero neurons add nothing.
        leaves: from ``expert_leaves``; their sizes are not looked at.
    """
    if isinstance(experts, dict):
        return experts
    stacked = {}
    for name, leaf in leaves.items():
        arrays = [bucket[name] for bucket in experts]
        widest = [max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True)]
        filled = [
            jnp.pad(
                array,
                [
                    (0, whole - size if letter == "F" else 0)
                    for letter, size, whole in zip(leaf.axes, array.shape, widest, strict=True)
                ],
            )
            for array in arrays
        ]
        stacked[name] = jnp.concatenate(filled, leaf.axes.index("E"))
    return stacked


def split_experts(stacked: dict[str, Array], leaves: Any) -> Any:
    """Inverse of ``stack_experts``: what lies past an expert's width is dropped.

    Args:
        leaves: of the experts of a layer, one dict for each of its buckets where widths differ.
    """
    if isinstance(leaves, dict):
        return stacked
    buckets, first = [], 0
    for bucket in leaves:
        end = first + next(iter(bucket.values())).along("E")
        buckets.append(
            {
                name: stacked[name][
                    tuple(
                        slice(first, end) if letter == "E" else slice(size)
                        for letter, size in zip(leaf.axes, leaf.shape, strict=True)
                    )
                ]
                for name, leaf in bucket.items()
            }
        )
        first = end
    return buckets


def layers_are_uniform(config: ModelConfig) -> bool:
    """Whether all layers share shapes and options, so that they can be stacked."""
    return len(set(config.layers)) == 1


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """``params`` with its list of layers as one layer whose leaves are ``[L, ...]``."""
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])
    return {**params, "layers": layers}


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Inverse of ``stack_layers``, to the bit."""
    stacked = params["layers"]
    count = jax.tree.leaves(stacked)[0].shape[0]
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count)]
    return {**params, "layers": layers}


def cast_params(params: Any, leaves: Any, dtype: Any) -> Any:
    """Weights in another dtype, but for those that stay in their own (``Leaf.exact``).

    Args:
        params: all weights of a model, or of a layer.
        leaves: of the same structure, such as ``leaves_like`` gives.
    """

    def cast(leaf: Leaf, array: Array) -> Array:
        return array if leaf.exact or array.dtype == dtype else array.astype(dtype)

    return jax.tree.map(cast, leaves, params, is_leaf=lambda node: isinstance(node, Leaf))


def nest(flat: dict[tuple, Any]) -> dict[str, Any]:
    """Inverse of ``leaves_with_path``: integer path parts become list positions."""
    tree: dict = {}
    for path, leaf in flat.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf

    def as_lists(node):
        if not isinstance(node, dict):
            return node
        children = {key: as_lists(child) for key, child in node.items()}
        if children and all(isinstance(key, int) for key in children):
            return [children[key] for key in sorted(children)]
        return children

    return as_lists(tree)
