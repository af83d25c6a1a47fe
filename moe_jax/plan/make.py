"""From scores to a plan: the highest stay."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.plan.budget import Budget, find_budget
from moe_jax.plan.expert_counts import ExpertLimits
from moe_jax.plan.experts import plan_experts
from moe_jax.plan.kv_groups import plan_groups
from moe_jax.plan.neuron_limits import NeuronLimits
from moe_jax.plan.neurons import plan_neurons
from moe_jax.plan.schema import LayerPlan, Plan, Replacement
from moe_jax.plan.scores import Scores, check_scores
from moe_jax.plan.validate import planned_config

_SCOPES = ("layer", "global", "group")
Made = tuple[dict[int, LayerPlan], dict[str, Any]]  # layers, and settings for the record


def make_plan(
    scores: Scores | None,
    config: ModelConfig,
    *,
    keep_experts: int | None = None,
    keep_ratio: float | None = None,
    expert_width: int | None = None,
    width_ratio: float | None = None,
    total_params: int | None = None,
    active_params: int | None = None,
    total_bytes: int | None = None,
    dtype: str | None = None,
    round_to: int = 1,
    min_width: int | None = None,
    max_width: int | None = None,
    scope: Literal["layer", "global", "group"] = "layer",
    min_experts: int | None = None,
    max_experts: int | None = None,
    align_experts: int = 1,
    num_groups: int | None = None,
    min_per_group: int = 1,
    neuron_scope: Literal["expert", "layer", "model"] = "expert",
    own_widths: bool = False,
    max_buckets: int = 4,
    neuron_prices: Scores | None = None,
    replacement: Replacement = "novice",
    repair: bool = False,
    constants: bool = False,
    group_scores: Scores | None = None,
    kv_groups: int | None = None,
    method: str = "manual",
) -> Plan:
    """Keeps the highest scores.

    Expert scores ``[E]`` and neuron scores ``[E, F]`` need exactly one size: a number, a share, or
    a budget, of which the largest plan that fits is taken. Group scores ``[G]``, alone or beside
    one of the two, need ``kv_groups``. Ties go to the lower id, and between layers to the lower
    layer.

    Args:
        scores: of the layers with experts by index, from ``score``; None cuts groups only.
        config: the model's; already present novices stay novices and count as removed.
        keep_experts: experts with neurons that each layer keeps (on average, if global).
        keep_ratio: share of a layer's router rows to keep, in (0, 1], rounded to the nearest
            number that ``align_experts`` and ``num_groups`` divide.
        expert_width: hidden neurons that each expert keeps (on average, unless ``neuron_scope``
            is ``expert``).
        width_ratio: share of them, in (0, 1], rounded to the nearest multiple of ``round_to``.
        total_params, active_params, total_bytes: budgets: what the model may have at most in
            parameters, in parameters that a token reads (see ``params.ParameterCount``; they
            hardly depend on how many experts there are), or in bytes of its weights. One that the
            model meets already removes nothing, with a warning. In the global scope, experts are
            taken by rank until the next one exceeds it.
        dtype: of the weights that ``total_bytes`` are counted for.
        round_to: 128 suits TPUs and GPU kernels.
        min_width, max_width: neurons that each expert keeps at least (None: 1, with
            ``own_widths`` 0) and at most.
        scope: rank experts within each layer; across all layers (which keeps at least K per
            layer; layers then differ, which needs the shipped modelling file to load); or within
            ``num_groups`` equal groups of consecutive ids in each layer that keep equally many, as
            expert-parallel devices and group-limited routers have them.
        min_experts, max_experts: experts that each layer keeps at least (None: K, which is also
            the least that it may be) and at most.
        align_experts: a number, such as of expert-parallel devices, that must divide each layer's
            kept experts; with ``delete`` also its router rows, older novices among them. In the
            global scope, experts of a layer then stay or go in blocks of so many, by rank.
        min_per_group: experts that each group keeps at least.
        neuron_scope: rank neurons within each expert, or across the experts of each layer, or of
            all layers (with ``own_widths``). Experts then differ, and all are filled up with zero
            neurons to the largest number that any of the model keeps, rounded up to ``round_to``:
            stock loaders, which know one width, read that, but what is stored exceeds what was
            kept. Scores must be comparable between experts, as gradients of a loss and costs of
            removal are, and for all layers also between layers, as gradients are.
        own_widths: store experts as wide as they are instead, all of them multiples of
            ``round_to``, in buckets that the shipped modelling file reads. What an expert keeps is
            found in whole blocks; one that keeps nothing becomes a novice.
        max_buckets: different widths above zero that a layer (or model) may then have.
        neuron_prices: what a neuron of each expert then costs, ``[E]`` by layer: equal prices, the
            default, count bytes, routing frequencies count the work per token.
        replacement: what becomes of a removed expert: ``novice`` (its mean output),
            ``weighted_novice`` (the mean weighted by its routing weights), ``zero``, or ``delete``.
        repair: neurons that stay make up for those that go, and heads that stay for those of
            removed groups (see ``LayerPlan``); applying the plan then needs statistics with second
            moments (and those of attention).
        constants: experts also gain a constant (see ``LayerPlan``), which the shipped modelling
            file reads.
        group_scores: of all layers by index, from ``score(..., of="attention")``.
        kv_groups: key/value heads, each with its query heads, that every layer keeps.
        method: for the record.

    Raises:
        ValueError: no or several sizes, a size out of bounds (named with them), a budget below the
            smallest plan (both numbers are named), limits that cannot be met, arguments about
            experts with scores of neurons and the reverse, scores that do not fit the model, or
            groups that cannot be removed from it.
    """
    experts = {"keep_experts": keep_experts, "keep_ratio": keep_ratio}
    widths = {"expert_width": expert_width, "width_ratio": width_ratio}
    budgets = {
        "total_params": total_params, "active_params": active_params, "total_bytes": total_bytes,
    }  # fmt: skip
    id_groups = _num_groups(scope, num_groups, min_per_group)
    limits = ExpertLimits(min_experts, max_experts, align_experts, id_groups, min_per_group)
    neuron_limits = NeuronLimits(min_width, max_width, round_to, own_widths, max_buckets)
    axes = _check_sizes(scores, config, experts, widths, budgets)
    of_experts = {**_changed(limits), **_other(scope=scope, replacement=replacement)}
    of_neurons = _other(neuron_scope=neuron_scope, constants=constants, neuron_prices=neuron_prices)
    _check_parts(axes, of_experts, {**_changed(neuron_limits), **of_neurons})
    if repair and axes != 2 and not (axes == 0 and group_scores):
        raise ValueError("repair needs scores of neurons [E, F], or group_scores alone")
    budget = find_budget(budgets, dtype)
    groups = plan_groups(group_scores, config, kv_groups)
    if not scores and not groups:
        raise ValueError("a plan needs scores or group_scores, got neither")
    without_groups = planned_config(config, Plan(groups))  # what budgets are about
    layers: dict[int, LayerPlan] = {}
    settings: dict[str, Any] = {}
    if scores and axes == 1:
        layers, settings = _expert_layers(
            scores, without_groups, experts, budget, scope, limits, replacement
        )
    elif scores:
        layers, settings = _neuron_layers(
            scores, without_groups, widths, budget, neuron_scope, neuron_limits, neuron_prices,
            constants, repair,
        )  # fmt: skip
    if budget is not None:
        settings[budget.name] = budget.limit
        settings |= {"dtype": dtype} if budget.name == "total_bytes" else {}
    if groups:
        layers = _with_groups(layers, groups, repair)
        settings |= {"kv_groups": kv_groups, **({"repair": True} if repair else {})}
    return Plan(layers, method, settings)


def _expert_layers(
    scores: Scores,
    config: ModelConfig,
    sizes: Mapping[str, Any],
    budget: Budget | None,
    scope: str,
    limits: ExpertLimits,
    replacement: Replacement,
) -> Made:
    layers = plan_experts(
        scores, config, sizes["keep_experts"], sizes["keep_ratio"], budget, scope, limits,
        replacement,
    )  # fmt: skip
    return layers, {**sizes, "scope": scope, "replacement": replacement, **_changed(limits)}


def _neuron_layers(
    scores: Scores,
    config: ModelConfig,
    sizes: Mapping[str, Any],
    budget: Budget | None,
    scope: str,
    limits: NeuronLimits,
    prices: Scores | None,
    constants: bool,
    repair: bool,
) -> Made:
    layers = plan_neurons(
        scores, config, sizes["expert_width"], sizes["width_ratio"], budget, limits, scope, prices,
        constants, repair,
    )  # fmt: skip
    settings = {**sizes, "neuron_scope": scope, **_changed(limits)}
    settings |= {"repair": True} if repair else {}
    settings |= {"constants": True} if constants else {}
    return layers, settings


def _with_groups(
    layers: Mapping[int, LayerPlan], groups: Mapping[int, LayerPlan], repair: bool
) -> dict[int, LayerPlan]:
    """The layers with the key/value groups that stay; those that lose nothing else join them."""
    overlaid = dict(layers)
    for i, group in groups.items():
        before = layers.get(i, LayerPlan(repair=repair))
        overlaid[i] = dataclasses.replace(before, kv_groups=group.kv_groups)
    return overlaid


def _check_sizes(
    scores: Scores | None,
    config: ModelConfig,
    experts: Mapping[str, Any],
    widths: Mapping[str, Any],
    budgets: Mapping[str, Any],
) -> int:
    """How many axes the scores have, 0 for none, if there is one size that goes with them."""
    given = [name for name, size in {**experts, **widths, **budgets}.items() if size is not None]
    if not scores:
        if given:
            raise ValueError(f"{given[0]} needs scores, got none")
        return 0
    check_scores("scores", scores, "MoE layers", config.moe_layers)
    axes = {np.ndim(values) for values in scores.values()}
    if axes not in ({1}, {2}):
        raise ValueError(f"scores must all be [E] or all [E, F], got {sorted(axes)} axes")
    fitting = sorted([*(experts if axes == {1} else widths), *budgets])
    if len(given) != 1 or given[0] not in fitting:
        raise ValueError(
            f"exactly one of {fitting} must be given with scores of "
            f"{'experts [E]' if axes == {1} else 'neurons [E, F]'}, got {given or 'none'}"
        )
    return axes.pop()


def _check_parts(axes: int, experts: Mapping[str, Any], neurons: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments about what the scores do not rank.

    Args:
        axes: of the scores; 0 for none.
        experts, neurons: arguments about either that are not at their defaults.
    """
    if axes != 1 and experts:
        raise ValueError(f"{min(experts)} needs scores of experts [E]")
    # A stage that cuts key/value groups alone has these of its own, too.
    allowed = {"round_to", "neuron_scope"} if axes == 0 else set()
    if axes != 2 and (given := sorted(set(neurons) - allowed)):
        raise ValueError(f"{given[0]} needs scores of neurons [E, F]")


def _num_groups(scope: str, num_groups: int | None, min_per_group: int) -> int:
    if scope not in _SCOPES:
        raise ValueError(f"scope must be one of {_SCOPES}, got {scope!r}")
    if (scope == "group") != (num_groups is not None):
        raise ValueError(
            f"num_groups goes with scope 'group' and no other, got {num_groups} and {scope!r}"
        )
    if scope != "group" and min_per_group > 1:
        raise ValueError(f"min_per_group goes with scope 'group' alone, got {scope!r}")
    return 1 if num_groups is None else num_groups


def _other(**arguments: Any) -> dict[str, Any]:
    """Arguments of ``make_plan`` that are not at their defaults."""
    default = inspect.signature(make_plan).parameters
    return {name: value for name, value in arguments.items() if value != default[name].default}


def _changed(limits: ExpertLimits | NeuronLimits) -> dict[str, Any]:
    """Limits that are not at their defaults."""
    default = vars(type(limits)())
    return {name: value for name, value in vars(limits).items() if value != default[name]}
