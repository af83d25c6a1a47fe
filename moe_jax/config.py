"""Model architecture facts: frozen, hashable dataclasses, validated where they are made.

A model is made of parts: attention, routers, feed-forward layers, rotary embeddings. Each comes in
kinds, and a kind is a small dataclass of its own facts with a name (``kind``). What computes with a
part (``ops.rope``, ``model``) or reads and writes it (``hf``) looks its kind up in a plain dict, so
that a kind nobody handles is an error, never another kind.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple


@dataclass(frozen=True)
class DefaultRope:
    """Rotary position embedding (arXiv 2104.09864) of whole heads; ``theta``: base wavelength."""

    kind: ClassVar[str] = "default"
    switch_length: ClassVar[int | None] = None

    theta: float = 10000.0


@dataclass(frozen=True)
class LongRope:
    """Per-frequency factors that change with the length of the sequence (arXiv 2402.13753).

    Attributes:
        theta: base wavelength.
        original_positions: context length above which a sequence takes the long factors.
        short_factor, long_factor: ``head_dim / 2`` divisors of the frequencies each.
        short_scale, long_scale: multipliers of cos and sin below and above the switch (the
            ``short_mscale`` and ``long_mscale`` of Phi-MoE).
        switch_factor: whether ``long_factor`` is used above the switch. The modelling code that
            Phi-3.5-MoE was published with does so; the class inside transformers 5 switches the
            scale only. The checkpoint tells which of the two defines it (see ``hf.rope_keys``).
    """

    kind: ClassVar[str] = "longrope"

    theta: float = 10000.0
    original_positions: int = 0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    short_scale: float = 1.0
    long_scale: float = 1.0
    switch_factor: bool = True

    @property
    def switch_length(self) -> int | None:
        """Sequences longer than this turn *all* of their tokens otherwise than shorter ones do."""
        return self.original_positions


@dataclass(frozen=True)
class Llama3Rope:
    """Low frequencies divided by a factor, high ones kept, smoothed between (Llama 3.1).

    Attributes:
        theta: base wavelength.
        factor: divisor of the frequencies whose wavelengths exceed ``original_positions /
            low_freq_factor``; those below ``original_positions / high_freq_factor`` stay.
        original_positions: context length before it was extended.
    """

    kind: ClassVar[str] = "llama3"
    switch_length: ClassVar[int | None] = None

    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 0


@dataclass(frozen=True)
class YarnRope:
    """Fast frequencies kept, slow ones divided, a ramp between (YaRN; arXiv 2309.00071).

    Attributes:
        theta: base wavelength.
        factor: divisor of the slow frequencies.
        original_positions: context length before it was extended.
        beta_fast, beta_slow: turns within it from which a frequency counts as fast, and up to
            which as slow.
        truncate: whether the ramp starts and ends at whole dimensions.
        attention_factor: multiplier of cos and sin; None: it follows from the two below.
        mscale, mscale_all_dim: of the logarithm of ``factor`` in it. DeepSeek's attention
            multiplies its logits by the square of the second one's, too; None or 0: it does not.
    """

    kind: ClassVar[str] = "yarn"
    switch_length: ClassVar[int | None] = None

    theta: float = 10000.0
    factor: float = 1.0
    original_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    @property
    def table_scale(self) -> float:
        """What cos and sin are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    @property
    def logit_scale(self) -> float:
        """What DeepSeek's attention multiplies its logits by."""
        return self._magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _magnitude(self, scale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0


RopeConfig = DefaultRope | LongRope | Llama3Rope | YarnRope
ROPES: Mapping[str, type] = {
    rope.kind: rope for rope in (DefaultRope, LongRope, Llama3Rope, YarnRope)
}


@dataclass(frozen=True)
class _TopKRouter:
    """The K largest scores; which score, says the kind.

    Attributes:
        renormalize: divide the K weights by their sum (``norm_topk_prob``).
        least_sum: that sum counts as at least so much.
        scale: the weights are multiplied by it in the end (``routed_scaling_factor``).
        correction: a learned number for each expert is added to its score where experts are
            chosen, and not to its weight (DeepSeek-V3; arXiv 2408.15664).
        groups: equal groups of consecutive experts; a token chooses among the experts of the
            best ``chosen_groups`` of them.
        logit_bias: whether the logits have one.
        input_jitter: in train mode the MoE input is multiplied by U(1 - j, 1 + j).
    """

    renormalize: bool = False
    least_sum: float = 0.0
    scale: float = 1.0
    correction: bool = False
    groups: int = 1
    chosen_groups: int = 1
    logit_bias: bool = False
    input_jitter: float = 0.0

    @property
    def has_train_noise(self) -> bool:
        """Whether train mode draws anything, so that a model differs from itself in eval mode."""
        return self.input_jitter > 0


@dataclass(frozen=True)
class SoftmaxRouter(_TopKRouter):
    """Scores are a softmax over all experts; a group's is the largest of its experts'."""

    kind: ClassVar[str] = "softmax"
    deciding: ClassVar[int] = 1  # experts of a group whose scores, added, are the group's


@dataclass(frozen=True)
class SigmoidRouter(_TopKRouter):
    """Each expert's score is a sigmoid of its logit; a group's is the sum of its two largest."""

    kind: ClassVar[str] = "sigmoid"
    deciding: ClassVar[int] = 2


@dataclass(frozen=True)
class SparseMixerRouter:
    """K sequential masked softmaxes (SparseMixer; arXiv 2310.00811 and 2409.12136).

    Attributes:
        jitter: epsilon: an expert competes for a slot if its logit is within ``2 * jitter``
            (relative) of the slot's maximum.
        input_jitter: in train mode the MoE input is multiplied by U(1 - j, 1 + j).
    """

    kind: ClassVar[str] = "sparsemixer"
    has_train_noise: ClassVar[bool] = True  # in train mode it samples
    correction: ClassVar[bool] = False
    logit_bias: ClassVar[bool] = False
    groups: ClassVar[int] = 1

    jitter: float = 0.0
    input_jitter: float = 0.0


def check_own_teacher(router: RouterConfig) -> None:
    """Raises ValueError if ``kd_full`` of a model against itself is zero everywhere."""
    if not router.has_train_noise:
        raise ValueError(
            "importance 'kd_full' vanishes while the model is its own teacher and its router "
            "has no train-mode noise; use 'kd_topk', 'lm' or 'fisher'"
        )


RouterConfig = SoftmaxRouter | SigmoidRouter | SparseMixerRouter
ROUTERS: Mapping[str, type] = {
    router.kind: router for router in (SoftmaxRouter, SigmoidRouter, SparseMixerRouter)
}


@dataclass(frozen=True)
class GroupedQueryAttention:
    """What the attention of all layers has in common; heads and windows are a layer's own.

    Attributes:
        head_dim: H; ``num_heads * head_dim`` may differ from the model's width.
        qkv_bias, out_bias: whether these projections have biases.
        qk_norm: RMS norm of queries and keys: over all heads together (``full``), over each
            head (``head``), or None.
        clip_qkv: clip queries, keys and values to [-clip_qkv, clip_qkv].
        logit_scale: of products of queries and keys; None: ``1 / sqrt(head_dim)``.
        rotary_share: of a head's dimensions, the share of the first ones that are turned by their
            positions (``partial_rotary_factor``).
        interleaved: dimensions that are turned against each other are neighbours, not halves.
        sinks: every query head has one more logit, a learned number, whose value is zero.
    """

    kind: ClassVar[str] = "grouped_query"

    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["full", "head"] | None = None
    clip_qkv: float | None = None
    logit_scale: float | None = None
    rotary_share: float = 1.0
    interleaved: bool = False
    sinks: bool = False

    @property
    def rope_dim(self) -> int:
        """Dimensions of a head that are turned."""
        return int(self.head_dim * self.rotary_share)


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2; arXiv 2405.04434), keys and values expanded.

    Every head has a key and a value of its own, made of one latent vector a token. A key is that
    part, which is not turned, and a part of its own that is, the same one for all heads.

    Attributes:
        content_dim, rope_dim: dimensions of a head's queries and keys that are not turned, and
            that are.
        value_dim: H, of what a head gives to the output projection.
        latent_rank: of keys and values.
        query_rank: of the latent vector that queries are made of; None: of the layer's input.
        qkv_bias, out_bias: whether the projections to latent vectors, and the output's, have
            biases.
        interleaved: dimensions that are turned against each other are neighbours, not halves.
    """

    kind: ClassVar[str] = "latent"
    qk_norm: ClassVar[None] = None

    content_dim: int
    rope_dim: int
    value_dim: int
    latent_rank: int
    query_rank: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    interleaved: bool = True

    @property
    def head_dim(self) -> int:
        return self.value_dim


AttentionConfig = GroupedQueryAttention | LatentAttention
ATTENTIONS: Mapping[str, type] = {
    kind.kind: kind for kind in (GroupedQueryAttention, LatentAttention)
}


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


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def validate_model(config: ModelConfig) -> None:
    """Raises ValueError, naming the value, its bound and the layer, if ``config`` is impossible."""
    for name in (
        "vocab_size", "width", "norm_eps", "max_positions",
        "embedding_scale", "residual_scale", "logit_divisor",
    ):  # fmt: skip
        _positive(name, getattr(config, name))
    if not config.layers:
        raise ValueError("a model needs at least one layer, got none")
    _validate_attention(config.attention)
    if isinstance(config.rope, LongRope):
        _validate_longrope(config.rope, config.attention.rope_dim)
    if isinstance(config.rope, Llama3Rope):
        low, high = config.rope.low_freq_factor, config.rope.high_freq_factor
        if not 0 < low < high:
            raise ValueError(f"rope low_freq_factor must be in (0, {high}), got {low}")
        _positive("rope factor", config.rope.factor)
        _positive("rope original_positions", config.rope.original_positions)
    if isinstance(config.rope, YarnRope):
        slow, fast = config.rope.beta_slow, config.rope.beta_fast
        if not 0 < slow <= fast:
            raise ValueError(f"rope beta_slow must be in (0, {fast}], got {slow}")
        _positive("rope factor", config.rope.factor)
        _positive("rope original_positions", config.rope.original_positions)
    for i, layer in enumerate(config.layers):
        _validate_layer(i, layer)
        if isinstance(config.attention, LatentAttention) and layer.num_heads != layer.num_kv_heads:
            raise ValueError(
                f"layer {i}: latent attention has keys and values for each of its "
                f"{layer.num_heads} heads, got num_kv_heads = {layer.num_kv_heads}"
            )
        _validate_router(i, layer, config.router)


def _validate_attention(attention: AttentionConfig) -> None:
    for fact in dataclasses.fields(attention):
        value = getattr(attention, fact.name)
        sized = fact.name.endswith(("_dim", "_rank", "_share"))
        if sized and value is not None:
            _positive(fact.name, value)
    if attention.rope_dim % 2 or attention.rope_dim < 2:
        raise ValueError(
            "head_dim, or what of it rotary embeddings turn, must be even and at least 2, got "
            f"{attention.rope_dim}"
        )


def _validate_router(i: int, layer: LayerConfig, router: RouterConfig) -> None:
    moe = layer.feed_forward
    if isinstance(moe, DenseConfig) or isinstance(router, SparseMixerRouter):
        return
    if not 1 <= router.chosen_groups <= router.groups:
        raise ValueError(
            f"a router chooses among 1 to all of its {router.groups} groups, got "
            f"{router.chosen_groups}"
        )
    if router.groups == 1:
        return
    if moe.num_experts % router.groups:
        raise ValueError(
            f"layer {i}: num_experts must be a multiple of the router's {router.groups} groups, "
            f"got {moe.num_experts}"
        )
    each = moe.num_experts // router.groups
    if each < router.deciding or moe.experts_per_token > router.chosen_groups * each:
        raise ValueError(
            f"layer {i}: groups of at least {router.deciding} experts and, in the "
            f"{router.chosen_groups} of {router.groups} groups that a token chooses, at least "
            f"experts_per_token = {moe.experts_per_token} are needed, got {each} in each"
        )


def _validate_longrope(rope: LongRope, head_dim: int) -> None:
    for name in ("short_factor", "long_factor"):
        length = len(getattr(rope, name))
        if length != head_dim // 2:
            raise ValueError(
                f"rope {name} must have head_dim / 2 = {head_dim // 2} entries, got {length}"
            )
    _positive("rope original_positions", rope.original_positions)


def _validate_layer(i: int, layer: LayerConfig) -> None:
    for name in ("num_heads", "num_kv_heads", "sliding_window"):
        if (value := getattr(layer, name)) is not None:
            _positive(f"layer {i}: {name}", value)
    if layer.num_heads % layer.num_kv_heads:
        raise ValueError(
            f"layer {i}: num_heads must be a multiple of num_kv_heads = {layer.num_kv_heads}, "
            f"got {layer.num_heads}"
        )
    moe = layer.feed_forward
    if isinstance(moe, DenseConfig):
        _positive(f"layer {i}: feed-forward width", moe.width)
        return
    for name in ("num_experts", "expert_width"):
        _positive(f"layer {i}: {name}", getattr(moe, name))
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
        _positive(f"layer {i}: shared expert's width", moe.shared.width)
    if moe.clamp is not None:
        _positive(f"layer {i}: limit of activations", moe.clamp.limit)
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
