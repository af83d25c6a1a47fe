"""What is cut beside experts: whole layers, and in all of them key/value groups, shared neurons."""

from __future__ import annotations

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.plan.cut import Cut
from moe_jax.plan.schema import LayerPlan, Plan
from moe_jax.plan.scores import Scores, check_scores, check_shape, highest
from moe_jax.plan.validate import check_kv_groups_separate
from moe_jax.statistics import Stats


def angular_plan(stats: Stats, config: ModelConfig, drop_layers: int) -> Plan:
    """Drops the block of consecutive layers over which the residual stream turns least.

    ``d(l, l + n)`` is the mean over all tokens of ``arccos(cos(x_l, x_{l+n})) / pi``, where ``x_l``
    is the stream before layer l ("The Unreasonable Ineffectiveness of the Deeper Layers", arXiv
    2403.17887; the paper takes the last token of each sequence). The block begins at
    the l that minimises it, the lowest of equal ones; it may end with the last layer.

    Args:
        stats: with ``stream["angular_distance"]`` ``[L + 1, L + 1]``, sums over ``tokens``.
        config: the model's, of L layers.
        drop_layers: n.

    Raises:
        ValueError: n out of bounds, or statistics without distances of this model.
    """
    check_drop_layers(config, drop_layers)
    depth = config.num_layers
    distance = stats.stream.get("angular_distance")
    if distance is None or distance.shape != (depth + 1, depth + 1):
        found = "none" if distance is None else list(distance.shape)
        raise ValueError(
            f"statistics must hold the stream's angular_distance [{depth + 1}, {depth + 1}] of "
            f"this model, got {found}; calibrate again"
        )
    turned = np.diagonal(np.asarray(distance, np.float64), drop_layers) / stats.tokens
    first = int(turned.argmin())
    settings = {"drop_layers": drop_layers, "angular_distance": turned.tolist()}
    return Plan({}, "angular", settings, tuple(range(first, first + drop_layers)))


def check_drop_layers(config: ModelConfig, drop_layers: int) -> None:
    """Raises ValueError unless dropping so many layers leaves at least one."""
    if not 1 <= drop_layers < config.num_layers:
        raise ValueError(f"drop_layers must be in [1, {config.num_layers}), got {drop_layers}")


def kept_kv_groups(config: ModelConfig, layer: int, keep: int) -> int:
    """``keep`` itself, if a layer can keep so many key/value groups.

    Raises:
        ValueError: a number out of bounds, or heads that depend on each other.
    """
    check_kv_groups_separate(config)
    groups = config.layers[layer].num_kv_heads
    if not 1 <= keep <= groups:
        raise ValueError(f"layer {layer}: kv_groups must be in [1, {groups}], got {keep}")
    return keep


def plan_kv_groups(
    scores: Scores | None, config: ModelConfig, keep: int | None
) -> dict[int, LayerPlan]:
    """What group scores ``[G]`` of all layers remove, nothing without them; see ``make_plan``."""
    if not scores or keep is None:
        return {}
    check_kv_groups_separate(config)
    check_scores("group_scores", scores, "layers", tuple(range(config.num_layers)))
    layers = {}
    for i, layer in enumerate(config.layers):
        check_shape("group_scores", i, scores[i], (layer.num_kv_heads,))
        kept = highest(scores[i], kept_kv_groups(config, i, keep))
        layers[i] = LayerPlan(kv_groups=tuple(kept.tolist()))
    return layers


def check_shared(config: ModelConfig, cut: Cut) -> None:
    """Raises ValueError for a cut of shared experts that a model has not, or not so wide."""
    if not cut.narrows_shared:
        return
    keep, step = cut.shared_width, cut.width_step
    asked = "rank_shared" if keep is None else f"shared_width = {keep}"
    for i in config.moe_layers:
        shared = config.moe(i).shared
        if shared is None:
            raise ValueError(f"layer {i}: {asked} needs a shared expert; {config.family} has none")
        if keep is not None and not keep <= shared.width:
            raise ValueError(f"layer {i}: shared_width must be in [1, {shared.width}], got {keep}")
        if keep is not None and keep % step and keep != shared.width:
            raise ValueError(
                f"layer {i}: shared_width must be a multiple of round_to = {step}, or all "
                f"{shared.width}, got {keep}"
            )


def plan_shared(scores: Scores, config: ModelConfig, keep: int | None) -> dict[int, LayerPlan]:
    """What scores ``[U]`` of shared experts' neurons remove if each keeps so many."""
    if keep is None:
        return {}
    return {
        i: LayerPlan(shared_neurons=tuple(highest(scores[i], keep).tolist()))
        for i in config.moe_layers
    }
