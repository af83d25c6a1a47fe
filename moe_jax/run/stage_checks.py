"""What a stage may be asked for, whatever the model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, get_args

from moe_jax.plan import MERGE_RECIPES, Replacement
from moe_jax.scoring import (
    AGGREGATIONS,
    EXPERT_CRITERIA,
    GROUP_CRITERIA,
    IMPORTANCE_LOSSES,
    MODEL_CRITERIA,
    MODEL_GROUP_CRITERIA,
    NEURON_CRITERIA,
)
from moe_jax.settings import nearest

if TYPE_CHECKING:
    from moe_jax.run.stage import StageConfig

SLIM, OBS, ANGULAR, DISTILL = "slim", "obs", "angular", "distill"
NEURON_FIELDS = (
    "expert_width", "width_ratio", "round_to", "neuron_scope", "own_widths", "min_width",
    "max_buckets", "active_share", "constants", "importance", "aggregation", "kv_groups",
    "group_importance", "repair",
)  # fmt: skip
_COUNTS = ("keep_experts", "keep_ratio")
_MERGE_FIELDS = (
    "merge_similarity", "merge_weights", "merge_align", "merge_router", "merge_cap",
)  # fmt: skip
# Fields of each method that is no criterion of experts, and of which it needs one.
_FIELDS: dict[str, tuple[str, ...]] = {
    SLIM: NEURON_FIELDS,
    OBS: (
        *(name for name in NEURON_FIELDS if name not in ("importance", "aggregation")),
        "sequential",
        "repair_target",
    ),
    ANGULAR: ("drop_layers",),
    DISTILL: (),
    **dict.fromkeys(MERGE_RECIPES, (*_COUNTS, "scope", *_MERGE_FIELDS)),
}
_SIZES: dict[str, tuple[str, ...]] = {
    SLIM: ("expert_width", "width_ratio"),
    OBS: ("expert_width", "width_ratio"),
    ANGULAR: ("drop_layers",),
}
GRADIENTS = (*IMPORTANCE_LOSSES, "fisher")


def check_choice(where: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError, with the nearest choice, if ``value`` is none of them."""
    if value not in choices:
        raise ValueError(
            f"{where} must be one of {tuple(choices)}, got {value!r}{nearest(value, choices)}"
        )


def check_stage(where: str, stage: StageConfig, given: Collection[str]) -> None:
    """Raises ValueError naming the field and its bound.

    Args:
        where: the stage's place, for the message.
        stage: what to check.
        given: names of the fields that are not at their defaults, without ``distill``.
    """
    if stage.plan:
        extra = sorted(set(given) - {"plan", "method"})
        if extra:
            raise ValueError(f"{where}: a stage with a plan takes nothing else, got {extra}")
        return
    check_choice(f"{where}.method", stage.method, (*EXPERT_CRITERIA, *_FIELDS))
    check_choice(f"{where}.scope", stage.scope, ("layer", "global"))
    check_choice(f"{where}.replacement", stage.replacement, get_args(Replacement))
    check_choice(f"{where}.frequency", stage.frequency, ("routing_mass", "mean_weight"))
    check_choice(f"{where}.neuron_scope", stage.neuron_scope, ("expert", "layer", "model"))
    check_choice(f"{where}.importance", stage.importance, (*NEURON_CRITERIA, *MODEL_CRITERIA))
    check_choice(f"{where}.aggregation", stage.aggregation, ("", *AGGREGATIONS))
    of_groups = ("", *GROUP_CRITERIA, *MODEL_GROUP_CRITERIA)
    check_choice(f"{where}.group_importance", stage.group_importance, of_groups)
    for name in ("round_to", "max_buckets"):
        if getattr(stage, name) < 1:
            raise ValueError(f"{where}.{name} must be at least 1, got {getattr(stage, name)}")
    _check_widths(where, stage)
    if stage.expert_width is not None and stage.expert_width % stage.round_to:
        raise ValueError(
            f"{where}.expert_width must be a multiple of round_to = {stage.round_to}, "
            f"got {stage.expert_width}"
        )
    criteria = [stage.importance]
    criteria += [stage.group_criterion] if stage.kv_groups is not None else []
    if stage.aggregation and not set(criteria) & set(GRADIENTS):
        raise ValueError(
            f"{where}.aggregation is for gradients, not for importance {' and '.join(criteria)}"
        )
    _check_fields_in_use(where, stage, given)
    _check_sizes(where, stage)
    try:
        _ = stage.recipe
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_widths(where: str, stage: StageConfig) -> None:
    """Whether ranking neurons across experts and storing the result go together."""
    if stage.own_widths and stage.neuron_scope == "expert":
        raise ValueError(f"{where}.own_widths needs neuron_scope 'layer' or 'model', got 'expert'")
    if stage.neuron_scope == "model" and not stage.own_widths:
        raise ValueError(f"{where}.neuron_scope 'model' needs own_widths")
    if not 0 <= stage.active_share <= 1 or (stage.active_share and not stage.own_widths):
        raise ValueError(
            f"{where}.active_share must be in [0, 1] and goes with own_widths, "
            f"got {stage.active_share}"
        )
    if stage.min_width is not None and (stage.min_width < 0 or not stage.own_widths):
        raise ValueError(
            f"{where}.min_width must be at least 0 and goes with own_widths, got {stage.min_width}"
        )
    if (stage.own_widths or stage.constants) and not stage.slims_experts:
        raise ValueError(f"{where}: own_widths and constants need expert_width or width_ratio")


def _check_fields_in_use(where: str, stage: StageConfig, given: Collection[str]) -> None:
    """Whether the method looks at every field that is given."""
    merges = _MERGE_FIELDS if stage.replacement == "merge" else ()
    of_criteria = (*_COUNTS, "scope", "replacement", "frequency", *merges)
    unused = sorted(set(given) - {"method", *_FIELDS.get(stage.method, of_criteria)})
    if unused:
        hint = "; replacement 'merge' does" if set(unused) <= set(_MERGE_FIELDS) else ""
        raise ValueError(f"{where}: method {stage.method!r} does not use {unused}{hint}")


def _check_sizes(where: str, stage: StageConfig) -> None:
    if stage.method == DISTILL:
        if stage.distill is None:
            raise ValueError(f"{where}: method 'distill' needs the field distill, got none")
        return
    sizes = _SIZES.get(stage.method, _COUNTS)
    found = [name for name in sizes if getattr(stage, name) is not None]
    if len(found) > 1 or (not found and stage.kv_groups is None):
        hint = " (or kv_groups alone)" if stage.ranks_neurons else ""
        wanted = f"exactly one of {sizes}" if len(sizes) > 1 else sizes[0]
        raise ValueError(
            f"{where}: method {stage.method!r} needs {wanted}{hint}, got {found or 'none'}"
        )
    check_choice(f"{where}.repair_target", stage.repair_target, ("original", "own"))
    if stage.repair_target != "original" and not (stage.sequential and stage.repairs):
        raise ValueError(f"{where}.repair_target goes with sequential and repair")
    if stage.sequential and stage.neuron_scope == "model":
        raise ValueError(
            f"{where}: neuron_scope 'model' ranks across layers, of which a sequential stage has "
            "not measured the later ones; take 'layer'"
        )
    if stage.sequential and stage.kv_groups is not None:
        raise ValueError(
            f"{where}: kv_groups are ranked by gradients through the whole model, which sequential "
            "calibration has not; cut them in a stage of their own"
        )
    if stage.group_importance and stage.kv_groups is None:
        raise ValueError(f"{where}.group_importance ranks kv_groups, of which none are cut")
