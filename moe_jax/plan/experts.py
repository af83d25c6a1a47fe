"""Which experts stay: of each layer, of each group of its ids, or of all layers together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from moe_jax.config import ModelConfig, MoeConfig
from moe_jax.plan.budget import find_budget, largest_that_fits
from moe_jax.plan.cut import Cut
from moe_jax.plan.schema import LayerPlan, NoviceValue
from moe_jax.plan.scores import Scores, check_shape, highest
from moe_jax.plan.validate import least_rows
from moe_jax.settings import check_bounds

# By layer, the numbers of experts that it may keep.
Allowed = Mapping[int, range]
# The experts of a layer that stay, if so many do.
KeptIds = Callable[[int, int], list[int]]
_NOVICE_VALUES: dict[str, NoviceValue] = {
    "novice": "mean", "weighted_novice": "weighted_mean", "zero": "zero",
}  # fmt: skip


def plan_experts(scores: Scores, config: ModelConfig, cut: Cut) -> dict[int, LayerPlan]:
    """What expert scores ``[E]`` remove; experts to be merged are deleted here."""
    for i in config.moe_layers:
        check_shape("scores", i, scores[i], (config.moe(i).num_experts,))

    def kept_ids(i: int, count: int) -> list[int]:
        values = scores[i]
        groups = grouped_ids(config.moe(i), group_count(config, cut))
        best = (ids[highest(values[ids], count // len(groups))] for ids in groups)
        return [e for ids in best for e in ids.tolist()]

    ranked = None
    if cut.scope == "global":
        ranked = _layers_by_rank(scores, config, allowed_counts(config, cut))
    return expert_layers(config, cut, kept_ids, ranked)


def expert_layers(
    config: ModelConfig, cut: Cut, kept_ids: KeptIds, ranked: np.ndarray | None = None
) -> dict[int, LayerPlan]:
    """The layers that a cut leaves, if ``kept_ids`` are those that stay of so many.

    Args:
        config: the model's.
        cut: how many stay.
        kept_ids: by layer and number.
        ranked: layers of the blocks of experts by rank, where all layers are ranked together.
    """
    allowed = allowed_counts(config, cut)

    def layers_of(counts: Mapping[int, int]) -> dict[int, LayerPlan]:
        return {i: _removed(config.moe(i), kept_ids(i, n), cut) for i, n in counts.items()}

    def counts_of(size: int) -> dict[int, int]:
        if ranked is None:
            return uniform_counts(allowed, size)
        return global_counts(allowed, ranked, size)

    budget = find_budget(cut)
    if budget is None:
        moes = {i: config.moe(i) for i in allowed}
        counts = {
            i: kept_count(moe, i, cut.keep_experts, cut.keep_ratio, _step(config, cut))
            for i, moe in moes.items()
        }
        if ranked is not None:
            return layers_of(counts_of(sum(counts.values())))
        _check_allowed(allowed, counts)
        return layers_of(counts)
    sizes = uniform_sizes(allowed) if ranked is None else global_sizes(allowed)
    size = largest_that_fits(budget, config, sizes, lambda size: layers_of(counts_of(size)))
    return layers_of(counts_of(size))


def _removed(moe: MoeConfig, kept: list[int], cut: Cut) -> LayerPlan:
    removed = tuple(e for e in moe.expert_ids if e not in set(kept))
    if _deletes(cut):
        return LayerPlan(deleted=removed)
    return LayerPlan(novices=removed, novice_value=_NOVICE_VALUES[cut.replacement])


def _deletes(cut: Cut) -> bool:
    """Whether removed experts vanish with their router rows, as merged ones do, too."""
    return cut.recipe is not None or cut.replacement == "delete"


def group_count(config: ModelConfig, cut: Cut) -> int:
    """Equal groups of consecutive router rows that must keep equally many experts.

    Those that the cut asks for, and those in which the model's own router chooses: where rows
    vanish, its groups must stay equal.
    """
    own = config.router.groups if _deletes(cut) else 1
    return math.lcm(cut.num_groups or 1, own)


def _step(config: ModelConfig, cut: Cut) -> int:
    """What kept experts are multiples of."""
    return math.lcm(cut.expert_step, group_count(config, cut))


def _layers_by_rank(scores: Scores, config: ModelConfig, allowed: Allowed) -> np.ndarray:
    """The layer of each block of experts, the best block of the model first.

    The experts that a layer keeps beyond the fewest allowed come in blocks of one step, best
    experts first, and the mean score of a block ranks it; ties go to the lower layer. With a step
    of one, a block is an expert.
    """
    ranked = []
    for i, numbers in allowed.items():
        values = scores[i][list(config.moe(i).expert_ids)].astype(np.float64)
        free = -np.sort(-values)[numbers[0] : numbers[-1]]
        blocks = free.reshape(-1, numbers.step).mean(axis=1)
        ranked += [(-float(value), i) for value in blocks]
    return np.array([i for _, i in sorted(ranked)], int)


def allowed_counts(config: ModelConfig, cut: Cut) -> Allowed:
    """The numbers of experts that each layer may keep, ascending in equal steps.

    Where removed experts vanish with their router rows, the rows that stay, older novices with
    them, must be aligned and equal in all groups, too.

    Raises:
        ValueError: there is no such number; the layer and its bounds are named.
    """
    return {i: _allowed_in_layer(i, config, cut) for i in config.moe_layers}


def _allowed_in_layer(i: int, config: ModelConfig, cut: Cut) -> range:
    moe, count, step = config.moe(i), group_count(config, cut), _step(config, cut)
    if moe.num_experts % count:
        raise ValueError(
            f"layer {i}: num_groups must divide its {moe.num_experts} experts, got {count}"
        )
    members = [len(ids) for ids in grouped_ids(moe, count)]
    if _deletes(cut) and (len(moe.novice_ids) % cut.expert_step or len(set(members)) > 1):
        raise ValueError(
            f"layer {i}: its {len(moe.novice_ids)} novices stay as router rows beside those of "
            f"experts, which align_experts = {cut.expert_step} and num_groups = {count} cannot "
            "divide; replace experts instead of deleting them"
        )
    least = max(moe.experts_per_token, cut.min_experts or 0, count * cut.min_per_group)
    if _deletes(cut):
        least = max(least, least_rows(moe, config.router))
    most = count * min(members)
    if cut.max_experts is not None:
        most = min(most, cut.max_experts)
    allowed = range(-(-least // step) * step, most + 1, step)
    if not allowed:
        raise ValueError(
            f"layer {i}: kept experts must be a multiple of {step} (align_experts = "
            f"{cut.expert_step}, num_groups = {count}) in [{least}, {most}] (min_experts = "
            f"{cut.min_experts}, max_experts = {cut.max_experts}, min_per_group = "
            f"{cut.min_per_group}, experts_per_token = {moe.experts_per_token}, experts = "
            f"{len(moe.expert_ids)}), of which there is none"
        )
    return allowed


def grouped_ids(moe: MoeConfig, count: int) -> list[np.ndarray]:
    """Ids of the experts with neurons in each of ``count`` equal groups of router rows."""
    ids = np.array(moe.expert_ids)
    return [ids[ids // (moe.num_experts // count) == group] for group in range(count)]


def kept_count(
    moe: MoeConfig, layer: int, keep: int | None, ratio: float | None, step: int = 1
) -> int:
    """Experts that a layer keeps, a multiple of ``step``; checked against its K and E.

    Raises:
        ValueError: a number or a share out of bounds.
    """
    if keep is None:
        share = 1.0 if ratio is None else ratio
        check_bounds("keep_ratio", share, "(0, 1]")
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


def _check_allowed(allowed: Allowed, counts: Mapping[int, int]) -> None:
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
