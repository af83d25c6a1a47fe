"""From scores, or statistics, to a plan: the highest stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.plan.cut import SIZES, Cut
from moe_jax.plan.experts import expert_layers, group_count, grouped_ids, plan_experts
from moe_jax.plan.layers import (
    angular_plan,
    check_drop_layers,
    check_shared,
    kept_kv_groups,
    plan_kv_groups,
    plan_shared,
)
from moe_jax.plan.merge import MERGE_RECIPES, check_capacity, check_recipe, merge_plan
from moe_jax.plan.neurons import narrowed_shapes, plan_neurons
from moe_jax.plan.schema import LayerPlan, Plan
from moe_jax.plan.scores import Scores, check_scores, check_shape
from moe_jax.plan.validate import planned_config
from moe_jax.plan.widths import neuron_prices
from moe_jax.scoring import score
from moe_jax.scoring.rerouting import check_router
from moe_jax.scoring.super_experts import with_floor
from moe_jax.settings import check_names
from moe_jax.statistics import Stats

# Of a plan from scores: what the scores rank, and the method of a cut that ranks it.
_SUBJECTS = {
    0: ("scores of key/value groups alone", "slim"),
    1: ("scores of experts [E]", "mone"),
    2: ("scores of neurons [E, F]", "slim"),
}


@dataclass(frozen=True)
class Planned:
    """A plan, and the scores that it follows by layer.

    Attributes:
        scores: of experts ``[E]`` or of their neurons ``[E, F]``.
        kv_scores: of key/value groups ``[G]``.
        shared_scores: of shared experts' neurons ``[U]``.
    """

    plan: Plan
    scores: Scores = dataclasses.field(default_factory=dict)
    kv_scores: Scores = dataclasses.field(default_factory=dict)
    shared_scores: Scores = dataclasses.field(default_factory=dict)

    @property
    def lost(self) -> float:
        """Share of the sum of all scores of experts and neurons that goes.

        Where scores are costs in the loss (``token_fisher``, ``taylor_token_fisher``, ``heapr``
        over tokens) it is that of the expected increase of the loss, to second order.
        """
        gone = total = 0.0
        for i, scores in self.scores.items():
            values, layer = np.asarray(scores, np.float64), self.plan.layers.get(i, LayerPlan())
            total += values.sum()
            gone += values[_removed(layer, values)].sum()
            if self.shared_scores:
                own = np.asarray(self.shared_scores[i], np.float64)
                total += own.sum()
                gone += np.delete(own, layer.shared_neurons or range(len(own))).sum()
        return float(gone / total)


def make_plan(
    scores: Scores | None,
    config: ModelConfig,
    *,
    group_scores: Scores | None = None,
    shared_scores: Scores | None = None,
    neuron_prices: Scores | None = None,
    method: str = "manual",
    **fields: Any,
) -> Plan:
    """Keeps the highest scores.

    Expert scores ``[E]`` and neuron scores ``[E, F]`` need exactly one size: a number, a share, or
    a budget, of which the largest plan that fits is taken. Scores ``[G]`` of key/value groups,
    alone or beside one of the two, need ``kv_groups``. Ties go to the lower id, and between layers
    to the lower layer.

    Args:
        scores: of the layers with experts by index, from ``score``; None cuts key/value groups
            only.
        config: the model's; already present novices stay novices and count as removed.
        group_scores: of all layers by index, from ``score(..., of="attention")``.
        shared_scores: of the shared experts of the layers with experts, ``[U]``, from ``score(...,
            of="shared")``; they need ``shared_width``, or ``rank_shared`` and no prices.
        neuron_prices: with own widths, what a neuron of each expert costs, ``[E]`` by layer: equal
            prices, the default, count bytes, routing frequencies count the work per token.
        method: for the record.
        fields: of ``Cut``, those that say how much stays, within what limits, and what stands for
            the rest.

    Raises:
        ValueError: an unknown field; no or several sizes, a size out of bounds (named with them), a
            budget below the smallest plan (both numbers are named), limits that cannot be met,
            fields about experts with scores of neurons and the reverse, scores that do not fit the
            model, or groups that cannot be removed from it.
    """
    known = {field.name: field.metadata for field in dataclasses.fields(Cut)}
    check_names(fields, [name for name, about in known.items() if not about.get("scores")])
    axes = _axes(scores, config)
    if not axes and not group_scores and not shared_scores and "kv_groups" not in fields:
        raise ValueError("a plan needs scores or group_scores, got neither")
    if fields.get("replacement") == "merge":
        raise ValueError("replacement must be none of 'merge' here: merge what a plan deletes")
    if bool(group_scores) != (fields.get("kv_groups") is not None):
        raise ValueError("group_scores and kv_groups need each other, got one of them")
    if bool(shared_scores) != any(fields.get(name) for name in ("shared_width", "rank_shared")):
        raise ValueError("shared_scores and shared_width, or rank_shared, need each other")
    if neuron_prices is not None and fields.get("rank_shared"):
        raise ValueError("neuron_prices are of routed experts, so that they exclude rank_shared")
    if neuron_prices is not None and axes != 2:
        raise ValueError("neuron_prices needs scores of neurons [E, F]")
    subject, ranking = _SUBJECTS[axes]
    cut = Cut(ranking, **fields)
    given = [name for name in SIZES["neurons"] if getattr(cut, name) is not None]
    if not axes and given:
        raise ValueError(f"{given[0]} needs scores, got none")
    cut.check(subject=subject)
    ranked = Planned(Plan({}, method), scores or {}, group_scores or {}, shared_scores or {})
    return plan_ranked(cut, config, ranked, neuron_prices)


def plan_cut(
    cut: Cut,
    stats: Stats,
    config: ModelConfig,
    *,
    seed: int = 0,
    params: dict[str, Any] | None = None,
) -> Planned:
    """What a cut removes, by the statistics of the model that it starts from.

    Args:
        cut: that ``Cut.from_dict`` has checked.
        stats: of the model.
        config: the model's.
        seed: of random criteria.
        params: its weights, where merging compares them and for criteria of second moments.

    Raises:
        ValueError: a sequential cut, whose plan depends on its own cuts (see
            ``prune.sequential_cut``); and what ``score``, ``make_plan`` and ``merge_plan`` raise.
    """
    if cut.sequential:
        raise ValueError("a sequential cut is planned layer by layer: use sequential_cut")
    if cut.drop_layers is not None:
        return Planned(angular_plan(stats, config, cut.drop_layers))
    model = (params, config)
    scores = cut_scores(cut, stats, config, seed=seed, params=params)
    kv_scores: Scores = {}
    if cut.kv_groups is not None:
        kv_scores = score(
            stats, cut.kv_criterion, of="attention", seed=seed, model=model,
            **cut.kv_score_options,
        )  # fmt: skip
    own: Scores = {}
    if cut.narrows_shared:
        check_shared(config, cut)
        own = score(stats, cut.criterion, of="shared", seed=seed, model=model, **cut.score_options)
    label = cut.criterion if cut.scored else cut.kv_criterion
    label = cut.method if scores and cut.method in MERGE_RECIPES else label
    ranked = Planned(Plan({}, label), scores, kv_scores, own)
    prices = neuron_prices(stats, cut.active_share) if cut.own_widths else None
    plan = plan_ranked(cut, config, ranked, prices)
    if scores and cut.recipe is not None:
        plan = merge_plan(plan, stats, config, scores, cut.recipe, params)
    return dataclasses.replace(ranked, plan=plan)


def cut_scores(
    cut: Cut,
    stats: Stats,
    config: ModelConfig,
    *,
    seed: int = 0,
    params: dict[str, Any] | None = None,
) -> Scores:
    """Scores of experts or neurons by layer, see ``plan_cut``; empty if a cut ranks neither."""
    if cut.ranks == "layers" or not cut.sized:
        return {}
    scores = score(stats, cut.criterion, seed=seed, model=(params, config), **cut.score_options)
    return with_floor(scores, stats, cut.floor)


def plan_ranked(
    cut: Cut, config: ModelConfig, ranked: Planned, prices: Scores | None = None
) -> Plan:
    """The plan that follows from scores; ``ranked.plan`` has its name."""
    shared = ranked.shared_scores
    check_shared(config, cut)
    if shared:
        check_scores("shared_scores", shared, "MoE layers", config.moe_layers)
        for i in config.moe_layers:
            own = config.moe(i).shared
            check_shape("shared_scores", i, shared[i], (own.width if own else 0,))
    kv_groups = plan_kv_groups(ranked.kv_scores, config, cut.kv_groups)
    others = _overlaid(kv_groups, plan_shared(shared, config, cut.shared_width), cut.repairs)
    after_others = planned_config(config, Plan(others))  # what budgets are about
    layers: Mapping[int, LayerPlan] = {}
    settings = cut.given()
    if ranked.scores:
        check_scores("scores", ranked.scores, "MoE layers", config.moe_layers)
        if cut.ranks == "experts":
            layers = plan_experts(ranked.scores, after_others, cut)
            settings = {"scope": cut.scope, "replacement": cut.replacement} | settings
        else:
            layers = plan_neurons(ranked.scores, after_others, cut, prices, shared)
            settings = {"neuron_scope": cut.neuron_scope} | settings
    layers = _overlaid(layers, others, cut.repairs)
    about = {field.name for field in dataclasses.fields(cut) if field.metadata.get("scores")}
    settings = {name: value for name, value in settings.items() if name not in about}
    settings |= {"repair": True} if cut.repairs else {}
    return Plan(dict(layers), ranked.plan.method, settings)


def foreseen(cut: Cut, config: ModelConfig) -> ModelConfig:
    """What a cut makes of a model; which experts, neurons or layers go is not known yet.

    A global ranking is taken as one by layer, experts ranked across a layer or the model, or of
    which some go that had their own widths, as equally wide, and dropped layers as the last ones.

    Raises:
        ValueError: the model cannot be cut so.
    """
    if cut.criterion == "rerouted" and cut.sized:
        check_router(config.router)
    if cut.recipe is not None:
        check_recipe(cut.recipe, config.router)
    if cut.drop_layers is not None:
        check_drop_layers(config, cut.drop_layers)
        return dataclasses.replace(config, layers=config.layers[: -cut.drop_layers])
    check_shared(config, cut)
    kept = {}
    if cut.kv_groups is not None:
        kept = {
            i: LayerPlan(kv_groups=tuple(range(kept_kv_groups(config, i, cut.kv_groups))))
            for i in range(config.num_layers)
        }
    if cut.shared_width is not None:
        own = LayerPlan(shared_neurons=tuple(range(cut.shared_width)))
        kept = _overlaid(kept, dict.fromkeys(config.moe_layers, own), False)
    config = planned_config(config, Plan(kept))
    if not cut.sized:
        return config
    for i in config.moe_layers:
        config = config.replace_moe(i, expert_widths=())
    if cut.ranks == "neurons":
        return planned_config(config, Plan(narrowed_shapes(config, cut)))
    groups = group_count(config, cut)

    def first_ids(i: int, count: int) -> list[int]:
        grouped = grouped_ids(config.moe(i), groups)
        return [e for ids in grouped for e in ids[: count // groups].tolist()]

    layers = expert_layers(config, cut, first_ids)
    recipe = cut.recipe
    if recipe is not None and recipe.grouping != "clusters":
        for i, layer in layers.items():
            experts = len(config.moe(i).expert_ids)
            check_capacity(experts - len(layer.deleted), experts, recipe.cap)
    return planned_config(config, Plan(layers))


def _removed(plan: LayerPlan, scores: np.ndarray) -> np.ndarray:
    """Which entries of a layer's scores go."""
    gone = np.zeros(scores.shape, bool)
    gone[[*plan.vanishing, *plan.novices]] = True
    if scores.ndim == 2:
        for e, kept in plan.neurons.items():
            gone[e] = True
            gone[e, list(kept)] = False
    return gone


def _axes(scores: Scores | None, config: ModelConfig) -> int:
    """How many axes the scores have; 0 for none."""
    if scores is not None:
        config.require_experts("a plan")
    if not scores:
        return 0
    check_scores("scores", scores, "MoE layers", config.moe_layers)
    axes = {np.ndim(values) for values in scores.values()}
    if axes not in ({1}, {2}):
        raise ValueError(f"scores must all be [E] or all [E, F], got {sorted(axes)} axes")
    return axes.pop()


def _overlaid(
    layers: Mapping[int, LayerPlan], others: Mapping[int, LayerPlan], repair: bool
) -> dict[int, LayerPlan]:
    """The layers with what else stays of them; those that lose nothing else join them."""
    overlaid = dict(layers)
    for i, layer in others.items():
        before = layers.get(i, LayerPlan(repair=repair))
        stays = {"kv_groups": layer.kv_groups, "shared_neurons": layer.shared_neurons}
        changes: dict[str, Any] = {n: kept for n, kept in stays.items() if kept is not None}
        overlaid[i] = dataclasses.replace(before, **changes)
    return overlaid
