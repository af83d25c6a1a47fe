"""What ``python -m moe_jax.plan`` is asked for: fields, defaults, and checks before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from moe_jax.config import ModelConfig
from moe_jax.plan.budget import item_bytes
from moe_jax.plan.groups import check_clusters
from moe_jax.plan.layers import angular_plan
from moe_jax.plan.make import make_plan
from moe_jax.plan.merge import merge_plan
from moe_jax.plan.recipes import MERGE_RECIPES
from moe_jax.plan.schema import Plan, Replacement
from moe_jax.plan.score_file import SavedScores, check_name
from moe_jax.plan.widths import neuron_prices
from moe_jax.scoring import EXPERT_CRITERIA, GROUP_CRITERIA, NEURON_CRITERIA, score
from moe_jax.settings import mapping, nearest, section
from moe_jax.statistics import Stats

# Which experts or neurons go: exactly one, or none with kv_groups.
_SIZES = (
    "keep_experts", "keep_ratio", "expert_width", "width_ratio",
    "total_params", "active_params", "total_bytes", "drop_layers",
)  # fmt: skip
# Fields that ``make_plan`` takes under the same names.
_PASSED_ON = (
    *_SIZES[:-1], "round_to", "min_width", "max_width", "scope", "min_experts", "max_experts",
    "align_experts", "num_groups", "min_per_group", "neuron_scope", "own_widths", "max_buckets",
    "repair", "constants", "kv_groups",
)  # fmt: skip


@dataclass(frozen=True)
class PlanRequest:
    """Fields of the configuration; the docstring of ``moe_jax.plan.__main__`` describes them."""

    model: str = ""
    statistics: str = ""
    plan: str = ""
    output: str = ""
    scores: str = ""
    dtype: str = ""
    seed: int = 0
    method: str = "mone"
    options: Mapping[str, Any] = field(default_factory=dict)
    group_importance: str = ""
    group_options: Mapping[str, Any] = field(default_factory=dict)
    keep_experts: int | None = None
    keep_ratio: float | None = None
    expert_width: int | None = None
    width_ratio: float | None = None
    total_params: int | None = None
    active_params: int | None = None
    total_bytes: int | None = None
    drop_layers: int | None = None
    kv_groups: int | None = None
    round_to: int = 1
    min_width: int | None = None
    max_width: int | None = None
    neuron_scope: str = "expert"
    own_widths: bool = False
    max_buckets: int = 4
    active_share: float = 0.0
    repair: bool = False
    constants: bool = False
    scope: str = "layer"
    min_experts: int | None = None
    max_experts: int | None = None
    align_experts: int = 1
    num_groups: int | None = None
    min_per_group: int = 1
    replacement: Replacement = "novice"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> PlanRequest:
        """Builds and checks a request.

        Raises:
            ValueError: an unknown field (with the nearest known one), a value of the wrong kind,
                or fields that do not go together.
        """
        values = dict(raw)
        for name in ("options", "group_options"):
            given = mapping(values.get(name), name)
            values[name] = {key: value for key, value in given.items() if value not in ("", None)}
        request = section(cls, values)
        if not request.model:
            raise ValueError("model must be given")
        if request.dtype:
            item_bytes(request.dtype)
        if request.scores:
            check_name(request.scores)
        if not request.statistics and not request.plan:
            raise ValueError("statistics or plan must be given")
        request._check_plan_alone() if request.plan else request._check_choices()
        return request

    @property
    def sizes(self) -> list[str]:
        """Names of the sizes that are given."""
        return [name for name in _SIZES if getattr(self, name) is not None]

    @property
    def criterion(self) -> str:
        """What ranks experts or neurons."""
        recipe = MERGE_RECIPES.get(self.method)
        return self.method if recipe is None else recipe.criterion

    @property
    def group_criterion(self) -> str:
        """What ranks key/value groups."""
        if self.group_importance:
            return self.group_importance
        return self.method if self.method in GROUP_CRITERIA else "kd_topk"

    def _check_plan_alone(self) -> None:
        taken = {"model", "statistics", "plan", "output", "dtype", "seed", "method"}
        if extra := self._given() - taken:
            raise ValueError(f"{min(extra)} does not go with plan, which is made already")

    def _given(self) -> set[str]:
        """Names of fields that are not at their defaults."""
        default = PlanRequest()
        return {name for name, value in vars(self).items() if value != getattr(default, name)}

    def _check_choices(self) -> None:
        given = self.sizes
        if len(given) > 1 or (not given and self.kv_groups is None):
            raise ValueError(
                f"exactly one of {_SIZES} must be given (or kv_groups alone), got {given or 'none'}"
            )
        taken = {"model", "statistics", "output", "dtype", "seed", "drop_layers"}
        if self.drop_layers is not None and (extra := self._given() - taken):
            raise ValueError(
                f"drop_layers goes without {min(extra)}: no expert, neuron or group is ranked"
            )
        if not 0 <= self.active_share <= 1 or (self.active_share and not self.own_widths):
            raise ValueError(
                f"active_share must be in [0, 1] and goes with own_widths, got {self.active_share}"
            )
        for name in ("group_importance", "group_options"):
            if self.kv_groups is None and getattr(self, name):
                raise ValueError(f"{name} ranks kv_groups, of which none are cut")
        if self.options and not given:
            raise ValueError("options rank experts or neurons, of which none are cut")
        if self.method in MERGE_RECIPES and self.replacement != PlanRequest.replacement:
            raise ValueError(f"{self.method} merges experts; it takes no replacement")
        if self.method in MERGE_RECIPES and MERGE_RECIPES[self.method].grouping == "clusters":
            check_clusters(self.scope)
        methods = (*EXPERT_CRITERIA, *MERGE_RECIPES, *NEURON_CRITERIA)
        for name, value, choices in (
            ("method", self.method, methods),
            ("group_importance", self.group_criterion, tuple(GROUP_CRITERIA)),
            ("replacement", self.replacement, get_args(Replacement)),
        ):
            if value not in choices:
                hint = nearest(value, choices)
                raise ValueError(f"{name} must be one of {choices}, got {value!r}{hint}")
        of_neurons = self.method in NEURON_CRITERIA
        for size in (
            ("keep_experts", "keep_ratio") if of_neurons else ("expert_width", "width_ratio")
        ):
            if size in given:
                fitting = NEURON_CRITERIA if not of_neurons else [*EXPERT_CRITERIA, *MERGE_RECIPES]
                raise ValueError(
                    f"{size} needs a method that ranks {'experts' if of_neurons else 'neurons'}, "
                    f"one of {tuple(fitting)}, got {self.method!r}"
                )


def plan_from_statistics(
    request: PlanRequest, config: ModelConfig, stats: Stats, dtype: str
) -> tuple[Plan, SavedScores]:
    """Scores and the plan that follows from them; no weights.

    Args:
        dtype: that ``total_bytes`` are counted for.

    Raises:
        ValueError: see ``scoring.score``, ``make_plan``, ``merge_plan`` and ``angular_plan``.
    """
    if request.drop_layers is not None:
        return angular_plan(stats, config, request.drop_layers), SavedScores()
    experts = groups = None
    if request.sizes:
        experts = score(stats, request.criterion, seed=request.seed, **request.options)
    if request.kv_groups is not None:
        criterion, options = request.group_criterion, request.group_options
        groups = score(stats, criterion, of="attention", seed=request.seed, **options)
    recipe = MERGE_RECIPES.get(request.method)
    plan = make_plan(
        experts,
        config,
        **{name: getattr(request, name) for name in _PASSED_ON},
        neuron_prices=neuron_prices(stats, request.active_share),
        replacement=request.replacement if recipe is None or experts is None else "delete",
        dtype=dtype,
        group_scores=groups,
        method=request.method if experts is not None else request.group_criterion,
    )
    if recipe is not None and experts is not None:
        plan = merge_plan(plan, stats, config, experts, recipe)
    about = {
        "method": request.criterion if experts is not None else None,
        "options": dict(request.options),
        "group_importance": request.group_criterion if groups is not None else None,
        "group_options": dict(request.group_options),
        "seed": request.seed,
        "statistics": request.statistics,
        "digest": stats.facts.get("digest"),
    }
    return plan, SavedScores(experts or {}, groups or {}, about)
