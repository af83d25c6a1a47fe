"""What can be ranked, by which methods, and what each field of a cut applies to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from moe_jax.plan.merge import MERGE_RECIPES
from moe_jax.scoring import (
    EXPERT_CRITERIA,
    GROUP_CRITERIA,
    MODEL_CRITERIA,
    MODEL_GROUP_CRITERIA,
    NEURON_CRITERIA,
    criterion_options,
)

if TYPE_CHECKING:
    from moe_jax.plan.cut.cut import Cut

SLIM, OBS, ANGULAR = "slim", "obs", "angular"
BUDGETS = ("total_params", "active_params", "total_bytes")
# How much stays, by what is ranked.
SIZES: dict[str, tuple[str, ...]] = {
    "experts": ("keep_experts", "keep_ratio", *BUDGETS),
    "neurons": ("expert_width", "width_ratio", *BUDGETS),
    "layers": ("drop_layers",),
}
RANKS_NEURONS = (*NEURON_CRITERIA, *MODEL_CRITERIA)
RANKS_GROUPS = tuple(dict.fromkeys((*GROUP_CRITERIA, *MODEL_GROUP_CRITERIA)))
METHODS = tuple(
    dict.fromkeys((*EXPERT_CRITERIA, *MERGE_RECIPES, SLIM, OBS, *RANKS_NEURONS, ANGULAR))
)


class Needs(NamedTuple):
    """What a field applies to: in words, and whether a cut has it."""

    what: str
    holds: Callable[[Cut], bool]


EXPERTS = Needs("a ranking of experts", lambda cut: cut.ranks == "experts")
REPLACED = Needs(
    "a ranking of experts that are not merged anyway",
    lambda cut: cut.ranks == "experts" and cut.method not in MERGE_RECIPES,
)
MERGED = Needs("a method that merges, or replacement 'merge'", lambda cut: cut.recipe is not None)
NEURONS = Needs("a ranking of neurons", lambda cut: cut.ranks == "neurons")
NARROWED = Needs(
    "a ranking of neurons, and how many stay (such as expert_width)",
    lambda cut: cut.ranks == "neurons" and cut.sized,
)
RANKED = Needs("a ranking of experts or neurons", lambda cut: cut.ranks != "layers")
SIZED = Needs(
    "experts or neurons to be cut, such as keep_ratio",
    lambda cut: cut.ranks != "layers" and cut.sized,
)
SCORED = Needs(
    "experts or neurons to be cut, such as keep_ratio or shared_width",
    lambda cut: cut.ranks != "layers" and cut.scored,
)
OWN = Needs(
    "own_widths, of experts and not of layers",
    lambda cut: cut.own_widths and cut.neuron_scope != "layer_width",
)
KV = Needs("kv_groups", lambda cut: cut.kv_groups is not None)
ROUTER_GROUPS = Needs("scope 'group'", lambda cut: cut.scope == "group")
FREQUENCY = Needs(
    "a criterion with a frequency: mone or a variant of it",
    lambda cut: "frequency" in criterion_options(cut.criterion),
)
GRADIENTS = Needs(
    "a criterion of gradients (kd_topk, kd_full, lm, fisher, or taylor_... of experts)",
    lambda cut: (
        "aggregation" in criterion_options(cut.criterion)
        or (
            cut.kv_groups is not None
            and "aggregation" in criterion_options(cut.kv_criterion, "attention")
        )
    ),
)
SLIMMED = Needs("method 'slim'", lambda cut: cut.method == SLIM)
IN_TURN = Needs(
    "method 'obs' with expert_width or width_ratio",
    lambda cut: cut.method == OBS and not (cut.expert_width is cut.width_ratio is None),
)
REPAIRED_IN_TURN = Needs("sequential and repair", lambda cut: cut.sequential and cut.repairs)
BYTES = Needs("total_bytes", lambda cut: cut.total_bytes is not None)
