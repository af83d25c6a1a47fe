"""Kinds of the parts that a model is made of: rotary embeddings, routers, attention.

A kind is a small dataclass of its own facts with a name (``kind``). What computes with a part
(``ops.rope``, ``model``) or reads and writes it (``hf``) looks its kind up in a plain dict, so that
a kind nobody handles is an error, never another kind. Each checks itself: ``check`` raises
ValueError that names the value and its bound.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from moe_jax.config import MoeConfig


def check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")


@dataclass(frozen=True)
class DefaultRope:
    """Rotary position embedding (arXiv 2104.09864) of whole heads; ``theta``: base wavelength."""

    kind: ClassVar[str] = "default"
    switch_length: ClassVar[int | None] = None

    theta: float = 10000.0

    def check(self, rope_dim: int) -> None:
        """Any base will do."""


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

    def check(self, rope_dim: int) -> None:
        for name in ("short_factor", "long_factor"):
            length = len(getattr(self, name))
            if length != rope_dim // 2:
                raise ValueError(
                    f"rope {name} must have head_dim / 2 = {rope_dim // 2} entries, got {length}"
                )
        check_positive("rope original_positions", self.original_positions)


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

    def check(self, rope_dim: int) -> None:
        low, high = self.low_freq_factor, self.high_freq_factor
        if not 0 < low < high:
            raise ValueError(f"rope low_freq_factor must be in (0, {high}), got {low}")
        check_positive("rope factor", self.factor)
        check_positive("rope original_positions", self.original_positions)


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

    def check(self, rope_dim: int) -> None:
        slow, fast = self.beta_slow, self.beta_fast
        if not 0 < slow <= fast:
            raise ValueError(f"rope beta_slow must be in (0, {fast}], got {slow}")
        check_positive("rope factor", self.factor)
        check_positive("rope original_positions", self.original_positions)

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
        deciding: experts of a group whose scores, added, are the group's.
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

    deciding: ClassVar[int]

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

    def check(self, layer: int, moe: MoeConfig) -> None:
        if not 1 <= self.chosen_groups <= self.groups:
            raise ValueError(
                f"a router chooses among 1 to all of its {self.groups} groups, got "
                f"{self.chosen_groups}"
            )
        if self.groups == 1:
            return
        if moe.num_experts % self.groups:
            raise ValueError(
                f"layer {layer}: num_experts must be a multiple of the router's {self.groups} "
                f"groups, got {moe.num_experts}"
            )
        each = moe.num_experts // self.groups
        if each < self.deciding or moe.experts_per_token > self.chosen_groups * each:
            raise ValueError(
                f"layer {layer}: groups of at least {self.deciding} experts and, in the "
                f"{self.chosen_groups} of {self.groups} groups that a token chooses, at least "
                f"experts_per_token = {moe.experts_per_token} are needed, got {each} in each"
            )


@dataclass(frozen=True)
class SoftmaxRouter(_TopKRouter):
    """Scores are a softmax over all experts; a group's is the largest of its experts'."""

    kind: ClassVar[str] = "softmax"
    deciding: ClassVar[int] = 1


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

    def check(self, layer: int, moe: MoeConfig) -> None:
        """How many experts it can choose is the family's to know."""


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

    def check(self) -> None:
        _check_sizes(self)


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

    def check(self) -> None:
        _check_sizes(self)


AttentionConfig = GroupedQueryAttention | LatentAttention
ATTENTIONS: Mapping[str, type] = {
    kind.kind: kind for kind in (GroupedQueryAttention, LatentAttention)
}


def _check_sizes(attention: AttentionConfig) -> None:
    for fact in dataclasses.fields(attention):
        value = getattr(attention, fact.name)
        sized = fact.name.endswith(("_dim", "_rank", "_share"))
        if sized and value is not None:
            check_positive(fact.name, value)
    if attention.rope_dim % 2 or attention.rope_dim < 2:
        raise ValueError(
            "head_dim, or what of it rotary embeddings turn, must be even and at least 2, got "
            f"{attention.rope_dim}"
        )
