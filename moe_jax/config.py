"""Model architecture facts: frozen, hashable dataclasses, validated where they are made.

A model is made of layers and of parts that come in kinds, see ``kinds``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from moe_jax.kinds import (
    ATTENTIONS,
    ROPES,
    ROUTERS,
    AttentionConfig,
    DefaultRope,
    LatentAttention,
    RopeConfig,
    RouterConfig,
    SoftmaxRouter,
    check_positive,
)


@dataclass(frozen=True)
class DenseConfig:
    """A gated feed-forward layer without experts: ``width`` hidden neurons."""

    kind: ClassVar[str] = "dense"

    width: int


class Bucket(NamedTuple):
    """The experts of a layer that have ``width`` hidden neurons, ascending."""

    width: int
    expert_ids: tuple[int, ...]


@dataclass(frozen=True)
class SharedExpert:
    """A feed-forward network that every token runs through beside its routed experts.

    Attributes:
        width: hidden neurons; of all shared experts together where a model counts several.
        gated: whether its output is multiplied by ``sigmoid(x . kernel)``, a number a token.
    """

    width: int
    gated: bool = False


@dataclass(frozen=True)
class Clamp:
    """Experts whose hidden activations are ``(up + 1) * gate * sigmoid(alpha * gate)`` (gpt-oss).

    Attributes:
        limit: ``gate`` is at most, and the magnitude of ``up`` at most, this before.
    """

    limit: float
    alpha: float


@dataclass(frozen=True)
class MoeConfig:
    """One Mixture-of-Experts layer.

    Attributes:
        num_experts: E, the rows of the router: experts and novices.
        experts_per_token: K.
        expert_width: F, hidden neurons of each expert that is not a novice; of the widest where
            they differ.
        novice_ids: experts that are a constant vector (MoNE), sorted.
        expert_widths: hidden neurons of each of the E experts, 0 for novices, where those with
            neurons differ; empty where they do not.
        expert_bias: whether experts with neurons add a constant vector to their output, too.
        neuron_bias: whether each neuron's gate and up projections have a bias.
        clamp: of hidden activations; None: they are ``silu(gate) * up``.
        shared: what every token runs through besides; it is no row of the router, and nothing
            that is said of experts is said of it.
    """

    kind: ClassVar[str] = "moe"

    num_experts: int
    experts_per_token: int
    expert_width: int
    novice_ids: tuple[int, ...] = ()
    expert_widths: tuple[int, ...] = ()
    expert_bias: bool = False
    neuron_bias: bool = False
    clamp: Clamp | None = None
    shared: SharedExpert | None = None

    @property
    def expert_ids(self) -> tuple[int, ...]:
        """Ids of the experts that have neurons, in the order of their stored weights."""
        return tuple(e for bucket in self.buckets for e in bucket.expert_ids)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Experts of equal width, whose weights are stored together; the widest first."""
        novices = set(self.novice_ids)
        by_width: dict[int, list[int]] = {}
        for e in range(self.num_experts):
            if e not in novices:
                by_width.setdefault(self.width_of(e), []).append(e)
        return tuple(Bucket(width, tuple(by_width[width])) for width in sorted(by_width)[::-1])

    def width_of(self, expert: int) -> int:
        """Hidden neurons of one expert; 0 for a novice."""
        if expert in self.novice_ids:
            return 0
        return self.expert_widths[expert] if self.expert_widths else self.expert_width


FEED_FORWARDS: Mapping[str, type] = {kind.kind: kind for kind in (DenseConfig, MoeConfig)}


@dataclass(frozen=True)
class LayerConfig:
    """One decoder block: N query heads, G key/value heads, and a feed-forward part."""

    num_heads: int
    num_kv_heads: int
    feed_forward: MoeConfig | DenseConfig
    sliding_window: int | None = None

    @property
    def moe(self) -> MoeConfig:
        """Its experts; raises ValueError if it is dense."""
        if not isinstance(self.feed_forward, MoeConfig):
            raise ValueError("the layer is dense, and has no experts")
        return self.feed_forward


@dataclass(frozen=True)
class ModelConfig:
    """Everything that the model's functions must know, beside its weights.

    Attributes:
        family: Hugging Face ``model_type``; a module of ``hf.families``.
        width: D, the residual stream.
        norm: ``rms`` or ``layer`` (with bias).
        embedding_scale, residual_scale: multipliers of embeddings, and of what attention and
            feed-forward layers add to the stream.
        logit_divisor: of the logits.
        kept_layers: for a model whose layers are some of another's: their indices there, which
            lists by layer in its ``config.json`` follow; empty: all. Nothing is computed from it,
            and two models that differ in it alone are equal.
    """

    family: str
    vocab_size: int
    width: int
    attention: AttentionConfig
    layers: tuple[LayerConfig, ...]
    router: RouterConfig = field(default_factory=SoftmaxRouter)
    rope: RopeConfig = field(default_factory=DefaultRope)
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    lm_head_bias: bool = False
    tied_embeddings: bool = False
    max_positions: int = 4096
    init_std: float = 0.02
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    kept_layers: tuple[int, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        validate_model(self)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def head_dim(self) -> int:
        """H, of what each head gives to the output projection."""
        return self.attention.head_dim

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        return tuple(
            i for i, layer in enumerate(self.layers) if isinstance(layer.feed_forward, MoeConfig)
        )

    def moe(self, layer: int) -> MoeConfig:
        """The MoE part of layer ``layer``.

        Raises:
            ValueError: that layer is dense, or there is no such layer.
        """
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be in [0, {self.num_layers}), got {layer}")
        feed_forward = self.layers[layer].feed_forward
        if not isinstance(feed_forward, MoeConfig):
            raise ValueError(f"layer {layer} is dense; layers with experts: {self.moe_layers}")
        return feed_forward

    def require_experts(self, what: str) -> None:
        """Raises ValueError if no layer has experts; ``what`` is what needs them."""
        if not self.moe_layers:
            raise ValueError(f"{what} needs a model with experts; {self.family} has dense layers")

    def replace_moe(self, layer: int, **changes) -> ModelConfig:
        """A copy whose layer ``layer`` has other MoE facts."""
        moe = dataclasses.replace(self.moe(layer), **changes)
        layers = list(self.layers)
        layers[layer] = dataclasses.replace(layers[layer], feed_forward=moe)
        return dataclasses.replace(self, layers=tuple(layers))

    def keep_layers(self, kept: Sequence[int]) -> ModelConfig:
        """A copy with some of the layers only."""
        before = self.kept_layers or range(self.num_layers)
        return dataclasses.replace(
            self,
            layers=tuple(self.layers[i] for i in kept),
            kept_layers=tuple(before[i] for i in kept),
        )

    def to_json(self) -> str:
        """All fields as JSON; ``from_json`` gives back an equal configuration."""
        return json.dumps(_with_kinds(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Reads what ``to_json`` wrote.

        Raises:
            ValueError: not such a text.
        """
        try:
            raw = json.loads(text)
            parts: dict[str, Any] = {
                name: _of_kind(kinds, raw.pop(name))
                for name, kinds in (("attention", ATTENTIONS), ("router", ROUTERS), ("rope", ROPES))
            }
            layers = tuple(_layer_from_dict(layer) for layer in raw.pop("layers"))
            return cls(layers=layers, **parts, **_tuples(raw))
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a model configuration: {error}") from error


def _with_kinds(part: Any) -> Any:
    """A dataclass as a dict, with the name of its kind where it is one of several."""
    if isinstance(part, tuple):
        return [_with_kinds(entry) for entry in part]
    if not dataclasses.is_dataclass(part):
        return part
    kind = {"kind": part.kind} if hasattr(part, "kind") else {}
    facts = {f.name: _with_kinds(getattr(part, f.name)) for f in dataclasses.fields(part)}
    return {**kind, **facts}


def _of_kind(kinds: Mapping[str, type], raw: dict[str, Any]) -> Any:
    fields = _tuples(raw)
    return kinds[fields.pop("kind")](**fields)


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}


def _layer_from_dict(raw: dict[str, Any]) -> LayerConfig:
    fields = raw.pop("feed_forward")
    for name, part in (("shared", SharedExpert), ("clamp", Clamp)):
        if fields.get(name) is not None:
            fields[name] = part(**fields[name])
    return LayerConfig(feed_forward=_of_kind(FEED_FORWARDS, fields), **raw)


def validate_model(config: ModelConfig) -> None:
    """Raises ValueError, naming the value, its bound and the layer, if ``config`` is impossible."""
    for name in (
        "vocab_size", "width", "norm_eps", "max_positions",
        "embedding_scale", "residual_scale", "logit_divisor",
    ):  # fmt: skip
        check_positive(name, getattr(config, name))
    if not config.layers:
        raise ValueError("a model needs at least one layer, got none")
    config.attention.check()
    config.rope.check(config.attention.rope_dim)
    for i, layer in enumerate(config.layers):
        _validate_layer(i, layer)
        if isinstance(config.attention, LatentAttention) and layer.num_heads != layer.num_kv_heads:
            raise ValueError(
                f"layer {i}: latent attention has keys and values for each of its "
                f"{layer.num_heads} heads, got num_kv_heads = {layer.num_kv_heads}"
            )
        if isinstance(layer.feed_forward, MoeConfig):
            config.router.check(i, layer.feed_forward)


def _validate_layer(i: int, layer: LayerConfig) -> None:
    for name in ("num_heads", "num_kv_heads", "sliding_window"):
        if (value := getattr(layer, name)) is not None:
            check_positive(f"layer {i}: {name}", value)
    if layer.num_heads % layer.num_kv_heads:
        raise ValueError(
            f"layer {i}: num_heads must be a multiple of num_kv_heads = {layer.num_kv_heads}, "
            f"got {layer.num_heads}"
        )
    moe = layer.feed_forward
    if isinstance(moe, DenseConfig):
        check_positive(f"layer {i}: feed-forward width", moe.width)
        return
    for name in ("num_experts", "expert_width"):
        check_positive(f"layer {i}: {name}", getattr(moe, name))
    if not 1 <= moe.experts_per_token <= moe.num_experts:
        raise ValueError(
            f"layer {i}: experts_per_token must be in [1, num_experts = {moe.num_experts}], "
            f"got {moe.experts_per_token}"
        )
    novices = moe.novice_ids
    if list(novices) != sorted(set(novices)) or any(not 0 <= e < moe.num_experts for e in novices):
        raise ValueError(
            f"layer {i}: novice_ids must be sorted, unique and in [0, {moe.num_experts}), "
            f"got {novices}"
        )
    if len(novices) == moe.num_experts:
        raise ValueError(f"layer {i}: all {moe.num_experts} experts are novices; keep at least one")
    if moe.shared is not None:
        check_positive(f"layer {i}: shared expert's width", moe.shared.width)
    if moe.clamp is not None:
        check_positive(f"layer {i}: limit of activations", moe.clamp.limit)
    if moe.expert_widths:
        _validate_widths(i, moe)


def _validate_widths(i: int, moe: MoeConfig) -> None:
    widths = moe.expert_widths
    without = tuple(e for e, width in enumerate(widths) if width == 0)
    if len(widths) != moe.num_experts or min(widths) < 0 or without != moe.novice_ids:
        raise ValueError(
            f"layer {i}: expert_widths must be {moe.num_experts} numbers, 0 for the novices "
            f"{moe.novice_ids} and positive for the others, got {widths}"
        )
    if max(widths) != moe.expert_width or len({*widths} - {0}) == 1:
        raise ValueError(
            f"layer {i}: expert_widths must differ and reach expert_width = {moe.expert_width}, "
            f"got {widths}"
        )
