"""How many hidden neurons an expert may keep."""

from __future__ import annotations

from dataclasses import dataclass

from moe_jax.config import MoeConfig
from moe_jax.plan.scores import check_ratio


@dataclass(frozen=True)
class NeuronLimits:
    """What the number of neurons that an expert keeps must obey.

    Attributes:
        min_width, max_width: of every expert; None for 1, or 0 with ``own_widths``, and for its
            width.
        round_to: widths are multiples of it, unless an expert keeps all.
        own_widths: experts are stored as wide as they are.
        max_buckets: how many different widths above zero a layer's experts then may have.
    """

    min_width: int | None = None
    max_width: int | None = None
    round_to: int = 1
    own_widths: bool = False
    max_buckets: int = 4

    def __post_init__(self) -> None:
        if self.round_to < 1:
            raise ValueError(f"round_to must be at least 1, got {self.round_to}")
        if self.max_buckets < 1:
            raise ValueError(f"max_buckets must be at least 1, got {self.max_buckets}")

    def bounds(self, moe: MoeConfig, layer: int) -> tuple[int, int]:
        """The fewest and the most neurons of an expert; raises ValueError if there are none."""
        fewest = 0 if self.own_widths else 1
        least = fewest if self.min_width is None else self.min_width
        most = moe.expert_width if self.max_width is None else self.max_width
        if not fewest <= least <= most <= moe.expert_width or most == 0:
            raise ValueError(
                f"layer {layer}: min_width and max_width must be in [{fewest}, "
                f"{moe.expert_width}] and in order, got {least} and {most}"
            )
        return least, most


def kept_width(
    moe: MoeConfig, layer: int, width: int | None, ratio: float | None, step: int
) -> int:
    """Neurons that each expert of a layer keeps, a multiple of ``step`` or all that it has.

    Raises:
        ValueError: a number or a share out of bounds, or a number that is no multiple.
    """
    if step < 1:
        raise ValueError(f"round_to must be at least 1, got {step}")
    if width is None:
        share = 1.0 if ratio is None else ratio
        check_ratio("width_ratio", share)
        width = min(moe.expert_width, max(1, round(moe.expert_width * share / step)) * step)
    if not 1 <= width <= moe.expert_width:
        raise ValueError(
            f"layer {layer}: expert_width must be in [1, {moe.expert_width}], got {width}"
        )
    if width % step and width != moe.expert_width:
        raise ValueError(
            f"layer {layer}: expert_width must be a multiple of round_to = {step}, or all "
            f"{moe.expert_width}, got {width}"
        )
    return width
