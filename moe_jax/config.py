"""Model architecture facts: frozen, hashable dataclasses, validated where they are made."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one model.

    Attributes:
        theta: base wavelength.
        kind: ``default``, or ``longrope`` (per-frequency factors; arXiv 2402.13753).
        original_positions: context length above which longrope takes its long factors.
        short_factor, long_factor: ``head_dim / 2`` divisors of the frequencies each.
        short_scale, long_scale: multipliers of cos and sin below and above the switch (the
            ``short_mscale`` and ``long_mscale`` of Phi-MoE).
        switch_factor: whether ``long_factor`` is used above the switch. The modelling code that
            Phi-3.5-MoE was published with does so; the class inside transformers 5 switches the
            scale only. The checkpoint tells which of the two defines it (see ``hf.families``).
    """

    theta: float = 10000.0
    kind: Literal["default", "longrope"] = "default"
    original_positions: int = 0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    short_scale: float = 1.0
    long_scale: float = 1.0
    switch_factor: bool = True


@dataclass(frozen=True)
class RouterConfig:
    """How router logits become expert ids and weights.

    Attributes:
        kind: ``softmax`` (softmax over all experts, then top-k) or ``sparsemixer`` (K sequential
            masked softmaxes; arXiv 2310.00811 and 2409.12136).
        renormalize: divide the K softmax weights by their sum (``norm_topk_prob``).
        jitter: SparseMixer's epsilon: an expert competes for a slot if its logit is within
            ``2 * jitter`` (relative) of the slot's maximum.
        input_jitter: in train mode the MoE input is multiplied by U(1 - j, 1 + j).
    """

    kind: Literal["softmax", "sparsemixer"] = "softmax"
    renormalize: bool = False
    jitter: float = 0.0
    input_jitter: float = 0.0

    @property
    def has_train_noise(self) -> bool:
        """Whether train mode draws anything, so that a model differs from itself in eval mode."""
        return self.kind == "sparsemixer" or self.input_jitter > 0

    def check_own_teacher(self) -> None:
        """Raises ValueError if ``kd_full`` of a model against itself is zero everywhere."""
        if not self.has_train_noise:
            raise ValueError(
                "importance 'kd_full' vanishes while the model is its own teacher and its router "
                "has no train-mode noise; use 'kd_topk', 'lm' or 'fisher'"
            )


@dataclass(frozen=True)
class DenseConfig:
    """A gated feed-forward layer without experts: ``width`` hidden neurons."""

    width: int


class Bucket(NamedTuple):
    """The experts of a layer that have ``width`` hidden neurons, ascending."""

    width: int
    expert_ids: tuple[int, ...]


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
    """

    num_experts: int
    experts_per_token: int
    expert_width: int
    novice_ids: tuple[int, ...] = ()
    expert_widths: tuple[int, ...] = ()
    expert_bias: bool = False

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


@dataclass(frozen=True)
class LayerConfig:
    """One decoder block: N query heads, G key/value heads, and a feed-forward part."""

    num_heads: int
    num_kv_heads: int
    feed_forward: MoeConfig | DenseConfig
    sliding_window: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Everything that the model's functions must know, beside its weights.

    Attributes:
        family: Hugging Face ``model_type``; a row of ``hf.families``.
        width: D, the residual stream.
        head_dim: H; ``num_heads * head_dim`` may differ from ``width``.
        norm: ``rms`` or ``layer`` (with bias).
        qk_norm: RMS norm of queries and keys: over all heads together (``full``), over each
            head (``head``), or None.
        clip_qkv: clip queries, keys and values to [-clip_qkv, clip_qkv].
    """

    family: str
    vocab_size: int
    width: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    router: RouterConfig = field(default_factory=RouterConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: Literal["full", "head"] | None = None
    clip_qkv: float | None = None
    lm_head_bias: bool = False
    tied_embeddings: bool = False
    max_positions: int = 4096
    init_std: float = 0.02

    def __post_init__(self) -> None:
        validate_model(self)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

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

    def replace_moe(self, layer: int, **changes) -> ModelConfig:
        """A copy whose layer ``layer`` has other MoE facts."""
        moe = dataclasses.replace(self.moe(layer), **changes)
        layers = list(self.layers)
        layers[layer] = dataclasses.replace(layers[layer], feed_forward=moe)
        return dataclasses.replace(self, layers=tuple(layers))

    def to_json(self) -> str:
        """All fields as JSON; ``from_json`` gives back an equal configuration."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Reads what ``to_json`` wrote.

        Raises:
            ValueError: not such a text.
        """
        try:
            raw = json.loads(text)
            layers = tuple(_layer_from_dict(layer) for layer in raw.pop("layers"))
            router = RouterConfig(**raw.pop("router"))
            rope = RopeConfig(**_tuples(raw.pop("rope")))
            return cls(layers=layers, router=router, rope=rope, **raw)
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a model configuration: {error}") from error


def _tuples(fields: dict) -> dict:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}


def _layer_from_dict(raw: dict) -> LayerConfig:
    fields = _tuples(raw.pop("feed_forward"))
    feed_forward = DenseConfig(**fields) if "width" in fields else MoeConfig(**fields)
    return LayerConfig(feed_forward=feed_forward, **raw)


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def validate_model(config: ModelConfig) -> None:
    """Raises ValueError, naming the value, its bound and the layer, if ``config`` is impossible."""
    for name in ("vocab_size", "width", "head_dim", "norm_eps", "max_positions"):
        _positive(name, getattr(config, name))
    if not config.layers:
        raise ValueError("a model needs at least one layer, got none")
    if config.head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary embeddings, got {config.head_dim}")
    if config.rope.kind == "longrope":
        for name in ("short_factor", "long_factor"):
            length = len(getattr(config.rope, name))
            if length != config.head_dim // 2:
                raise ValueError(
                    f"rope {name} must have head_dim / 2 = {config.head_dim // 2} entries, "
                    f"got {length}"
                )
        _positive("rope original_positions", config.rope.original_positions)
    for i, layer in enumerate(config.layers):
        _validate_layer(i, layer)


def _validate_layer(i: int, layer: LayerConfig) -> None:
    for name in ("num_heads", "num_kv_heads"):
        _positive(f"layer {i}: {name}", getattr(layer, name))
    if layer.num_heads % layer.num_kv_heads:
        raise ValueError(
            f"layer {i}: num_heads must be a multiple of num_kv_heads = {layer.num_kv_heads}, "
            f"got {layer.num_heads}"
        )
    if layer.sliding_window is not None:
        _positive(f"layer {i}: sliding_window", layer.sliding_window)
    feed_forward = layer.feed_forward
    if isinstance(feed_forward, DenseConfig):
        _positive(f"layer {i}: feed-forward width", feed_forward.width)
        return
    moe = feed_forward
    _positive(f"layer {i}: num_experts", moe.num_experts)
    _positive(f"layer {i}: expert_width", moe.expert_width)
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
