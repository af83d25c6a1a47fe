"""Which experts stay: of each layer, of each group of its ids, or of all layers together."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moe_jax.config import ModelConfig, MoeConfig
from moe_jax.plan.budget import Budget, largest_that_fits
from moe_jax.plan.expert_counts import (
    Allowed,
    ExpertLimits,
    allowed_counts,
    check_allowed,
    global_counts,
    global_sizes,
    grouped_ids,
    kept_count,
    uniform_counts,
    uniform_sizes,
)
from moe_jax.plan.schema import LayerPlan, NoviceValue, Replacement
from moe_jax.plan.scores import Scores, check_shape, highest

Layers = dict[int, LayerPlan]
_NOVICE_VALUES: dict[str, NoviceValue] = {
    "novice": "mean", "weighted_novice": "weighted_mean", "zero": "zero",
}  # fmt: skip


def plan_experts(
    scores: Scores,
    config: ModelConfig,
    keep_experts: int | None,
    keep_ratio: float | None,
    budget: Budget | None,
    scope: str,
    limits: ExpertLimits,
    replacement: Replacement,
) -> Layers:
    """What expert scores ``[E]`` remove; see ``make_plan``."""
    if replacement != "delete" and replacement not in _NOVICE_VALUES:
        raise ValueError(
            f"replacement must be one of {(*_NOVICE_VALUES, 'delete')} here (merge_plan merges "
            f"what a plan deletes), got {replacement!r}"
        )
    for i in config.moe_layers:
        check_shape("scores", i, scores[i], (config.moe(i).num_experts,))
    allowed = allowed_counts(config, limits, replacement == "delete")
    ranked = _layers_by_rank(scores, config, allowed) if scope == "global" else None

    def counts_of(size: int) -> dict[int, int]:
        if ranked is None:
            return uniform_counts(allowed, size)
        return global_counts(allowed, ranked, size)

    def layers_of(counts: Mapping[int, int]) -> Layers:
        return {
            i: _removed(config, i, _highest(scores[i], config.moe(i), n, limits), replacement)
            for i, n in counts.items()
        }

    if budget is None:
        counts = {
            i: kept_count(config.moe(i), i, keep_experts, keep_ratio, limits.step) for i in allowed
        }
        if ranked is not None:
            return layers_of(counts_of(sum(counts.values())))
        check_allowed(allowed, counts)
        return layers_of(counts)
    sizes = uniform_sizes(allowed) if ranked is None else global_sizes(allowed)
    size = largest_that_fits(budget, config, sizes, lambda size: layers_of(counts_of(size)))
    return layers_of(counts_of(size))


def _removed(config: ModelConfig, i: int, kept: list[int], replacement: Replacement) -> LayerPlan:
    removed = tuple(e for e in config.moe(i).expert_ids if e not in set(kept))
    if replacement == "delete":
        return LayerPlan(deleted=removed)
    return LayerPlan(novices=removed, novice_value=_NOVICE_VALUES[replacement])


def _highest(values: np.ndarray, moe: MoeConfig, count: int, limits: ExpertLimits) -> list[int]:
    """Ids of the ``count`` experts that stay: the highest of each group."""
    kept: list[int] = []
    for ids in grouped_ids(moe, limits.num_groups):
        kept += ids[highest(values[ids], count // limits.num_groups)].tolist()
    return kept


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
