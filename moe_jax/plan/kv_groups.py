"""Which key/value groups stay."""

from __future__ import annotations

from moe_jax.config import ModelConfig
from moe_jax.plan.schema import LayerPlan
from moe_jax.plan.scores import Scores, check_scores, check_shape, highest
from moe_jax.plan.validate import check_groups_separate


def kept_groups(config: ModelConfig, layer: int, keep: int) -> int:
    """``keep`` itself, if a layer can keep so many key/value groups.

    Raises:
        ValueError: a number out of bounds, or heads that depend on each other.
    """
    check_groups_separate(config)
    groups = config.layers[layer].num_kv_heads
    if not 1 <= keep <= groups:
        raise ValueError(f"layer {layer}: kv_groups must be in [1, {groups}], got {keep}")
    return keep


def plan_groups(
    scores: Scores | None, config: ModelConfig, keep: int | None
) -> dict[int, LayerPlan]:
    """What group scores ``[G]`` of all layers remove, nothing without them; see ``make_plan``."""
    if not scores or keep is None:
        if scores or keep is not None:
            raise ValueError("group_scores and kv_groups need each other, got one of them")
        return {}
    check_groups_separate(config)
    check_scores("group_scores", scores, "layers", tuple(range(config.num_layers)))
    layers = {}
    for i, layer in enumerate(config.layers):
        check_shape("group_scores", i, scores[i], (layer.num_kv_heads,))
        kept = highest(scores[i], kept_groups(config, i, keep))
        layers[i] = LayerPlan(kv_groups=tuple(kept.tolist()))
    return layers
