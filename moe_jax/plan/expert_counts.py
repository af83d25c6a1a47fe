"""How many experts layers may keep, and how many they do keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_jax.config import ModelConfig, MoeConfig
from moe_jax.plan.scores import check_ratio

# By layer, the numbers of experts that it may keep.
Allowed = Mapping[int, range]


@dataclass(frozen=True)
class ExpertLimits:
    """What every layer's number of kept experts must obey.

    Attributes:
        min_experts: at least so many, and never fewer than K; None stands for K.
        max_experts: at most so many; None for all.
        align_experts: a divisor, such as the number of expert-parallel devices.
        num_groups: equal groups of consecutive ids (devices that hold an equal share each, or the
            groups of a group-limited router) that keep equally many.
        min_per_group: experts that each of these keeps at least.
    """

    min_experts: int | None = None
    max_experts: int | None = None
    align_experts: int = 1
    num_groups: int = 1
    min_per_group: int = 1

    def __post_init__(self) -> None:
        for name in ("align_experts", "num_groups", "min_per_group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def step(self) -> int:
        """What kept experts are multiples of."""
        return math.lcm(self.align_experts, self.num_groups)


def allowed_counts(config: ModelConfig, limits: ExpertLimits, deletes: bool) -> Allowed:
    """The numbers of experts that each layer may keep, ascending in equal steps.

    Args:
        deletes: removed experts vanish with their router rows, so that the rows that stay, older
            novices with them, must be aligned and equal in all groups, too.

    Raises:
        ValueError: there is no such number; the layer and its bounds are named.
    """
    return {i: _allowed_in_layer(i, config.moe(i), limits, deletes) for i in config.moe_layers}


def _allowed_in_layer(i: int, moe: MoeConfig, limits: ExpertLimits, deletes: bool) -> range:
    groups, step = limits.num_groups, limits.step
    if moe.num_experts % groups:
        raise ValueError(
            f"layer {i}: num_groups must divide its {moe.num_experts} experts, got {groups}"
        )
    members = [len(group) for group in grouped_ids(moe, groups)]
    if deletes and (len(moe.novice_ids) % limits.align_experts or len(set(members)) > 1):
        raise ValueError(
            f"layer {i}: its {len(moe.novice_ids)} novices stay as router rows beside those of "
            f"kept experts, which align_experts = {limits.align_experts} and num_groups = "
            f"{groups} cannot divide; replace experts instead of deleting them"
        )
    least = max(moe.experts_per_token, limits.min_experts or 0, groups * limits.min_per_group)
    most = groups * min(members)
    if limits.max_experts is not None:
        most = min(most, limits.max_experts)
    allowed = range(-(-least // step) * step, most + 1, step)
    if not allowed:
        raise ValueError(
            f"layer {i}: kept experts must be a multiple of {step} (align_experts = "
            f"{limits.align_experts}, num_groups = {groups}) in [{least}, {most}] (min_experts = "
            f"{limits.min_experts}, max_experts = {limits.max_experts}, min_per_group = "
            f"{limits.min_per_group}, experts_per_token = {moe.experts_per_token}, experts = "
            f"{len(moe.expert_ids)}), of which there is none"
        )
    return allowed


def grouped_ids(moe: MoeConfig, num_groups: int) -> list[np.ndarray]:
    """Ids of the experts with neurons in each of ``num_groups`` equal groups of router rows."""
    ids = np.array(moe.expert_ids)
    return [ids[ids // (moe.num_experts // num_groups) == group] for group in range(num_groups)]


def kept_count(
    moe: MoeConfig, layer: int, keep: int | None, ratio: float | None, step: int = 1
) -> int:
    """Experts that a layer keeps, a multiple of ``step``; checked against its K and E.

    Raises:
        ValueError: a number or a share out of bounds.
    """
    if keep is None:
        share = 1.0 if ratio is None else ratio
        check_ratio("keep_ratio", share)
        keep = max(1, min(round(moe.num_experts * share / step), moe.num_experts // step)) * step
    if not moe.experts_per_token <= keep <= len(moe.expert_ids):
        raise ValueError(
            f"layer {layer}: kept experts must be in [experts_per_token = "
            f"{moe.experts_per_token}, {len(moe.expert_ids)}], got {keep}"
        )
    if keep % step:
        raise ValueError(
            f"layer {layer}: kept experts must be a multiple of {step} (align_experts and "
            f"num_groups), got {keep}"
        )
    return keep


def check_allowed(allowed: Allowed, counts: Mapping[int, int]) -> None:
    """Raises ValueError naming the layer that keeps another number than it may."""
    for i, numbers in allowed.items():
        if counts[i] not in numbers:
            raise ValueError(
                f"layer {i}: kept experts must be in [{numbers[0]}, {numbers[-1]}], in steps of "
                f"{numbers.step}, by the limits given, got {counts[i]}"
            )


def uniform_sizes(allowed: Allowed) -> range:
    """Numbers that all layers can be asked for at once; see ``uniform_counts``."""
    ranges = list(allowed.values())
    return range(min(r[0] for r in ranges), max(r[-1] for r in ranges) + 1, ranges[0].step)


def uniform_counts(allowed: Allowed, count: int) -> dict[int, int]:
    """``count`` for every layer, or what it allows that is nearest."""
    return {i: min(max(count, numbers[0]), numbers[-1]) for i, numbers in allowed.items()}


def global_sizes(allowed: Allowed) -> range:
    """Numbers of experts that all layers together can keep."""
    ranges = list(allowed.values())
    return range(sum(r[0] for r in ranges), sum(r[-1] for r in ranges) + 1, ranges[0].step)


def global_counts(allowed: Allowed, ranked_layers: np.ndarray, total: int) -> dict[int, int]:
    """Experts that each layer keeps if ``total`` stay: the fewest allowed, then by rank.

    Raises:
        ValueError: ``total`` is out of bounds.
    """
    sizes = global_sizes(allowed)
    if total not in sizes:
        raise ValueError(
            f"all layers together must keep a number of experts in [{sizes[0]}, {sizes[-1]}], "
            f"in steps of {sizes.step}, by the limits given, got {total}"
        )
    chosen = ranked_layers[: (total - sizes[0]) // sizes.step]
    return {
        i: numbers[0] + numbers.step * int((chosen == i).sum()) for i, numbers in allowed.items()
    }
