"""Whether a plan fits a model, and the architecture that it leaves."""

from __future__ import annotations

import dataclasses
import math

from moe_jax.config import LayerConfig, ModelConfig, MoeConfig
from moe_jax.kinds import RouterConfig, SparseMixerRouter
from moe_jax.plan.schema import LayerPlan, Plan


def validate_plan(plan: Plan, config: ModelConfig) -> None:
    """Raises ValueError naming the layer, the value and its bound if the plan does not fit."""
    outside = sorted(set(plan.layers) - set(range(config.num_layers)))
    if outside:
        raise ValueError(f"plan layers must be among 0 to {config.num_layers - 1}, got {outside}")
    _check_dropped(plan, config)
    for i, layer in plan.layers.items():
        if layer.kv_groups is not None:
            _check_kv_groups(i, layer.kv_groups, config)
        if isinstance(moe := config.layers[i].feed_forward, MoeConfig):
            _check_experts(i, layer, moe)
            _check_router_groups(i, layer, moe, config.router)
        elif dataclasses.replace(layer, kv_groups=None, repair=False) != LayerPlan():
            raise ValueError(
                f"plan layer {i}: only kv_groups can be cut, for it has no experts; layers with "
                f"experts: {config.moe_layers}"
            )


def _check_dropped(plan: Plan, config: ModelConfig) -> None:
    dropped = plan.dropped_layers
    if not set(dropped) < set(range(config.num_layers)) or len(set(dropped)) != len(dropped):
        raise ValueError(
            f"plan dropped_layers must be different, in [0, {config.num_layers}) and leave at "
            f"least one layer, got {list(dropped)}"
        )
    both = sorted(set(dropped) & set(plan.layers))
    if both:
        raise ValueError(f"plan layers {both} are cut and dropped; name them once")


def check_kv_groups_separate(config: ModelConfig) -> None:
    """Raises ValueError if the heads of a layer depend on each other."""
    if config.attention.qk_norm == "full":
        raise ValueError(
            f"key/value groups of {config.family} cannot be removed: it normalises queries and "
            "keys over all heads together, so that those that stay would change too"
        )


def _check_kv_groups(i: int, kept: tuple[int, ...], config: ModelConfig) -> None:
    check_kv_groups_separate(config)
    _check_kept(i, "kv_groups", kept, config.layers[i].num_kv_heads)


def _check_kept(i: int, what: str, kept: tuple[int, ...], bound: int) -> None:
    _check_ids(i, what, kept, bound)
    if not kept:
        raise ValueError(f"plan layer {i}: at least one of {what} must stay")
    if list(kept) != sorted(kept):
        raise ValueError(f"plan layer {i}: {what} must be ascending, got {list(kept)}")


def _check_experts(i: int, layer: LayerPlan, moe: MoeConfig) -> None:
    _check_ids(i, "deleted", layer.deleted, moe.num_experts)
    _check_ids(i, "novices", layer.novices, moe.num_experts)
    already = sorted(set(layer.novices) & set(moe.novice_ids))
    if already:
        raise ValueError(
            f"plan layer {i}: experts {already} are novices already; a plan need not name them"
        )
    both = set(layer.deleted) & set(layer.novices)
    if both:
        raise ValueError(f"plan layer {i}: experts {sorted(both)} are deleted and novices")
    _check_merges(i, layer, moe)
    rows = moe.num_experts - len(layer.vanishing)
    if rows < moe.experts_per_token:
        raise ValueError(
            f"plan layer {i}: must leave at least experts_per_token = "
            f"{moe.experts_per_token} router rows, leaves {rows}"
        )
    gone = {*layer.vanishing, *layer.novices}
    left = [e for e in moe.expert_ids if e not in gone]
    if not left:
        raise ValueError(f"plan layer {i}: no expert with neurons would be left")
    if layer.shared_neurons is not None:
        if moe.shared is None:
            raise ValueError(f"plan layer {i}: shared_neurons need a shared expert, it has none")
        _check_kept(i, "shared_neurons", layer.shared_neurons, moe.shared.width)
    _check_ids(i, "neurons", layer.neurons, moe.num_experts)
    for e, kept in layer.neurons.items():
        _check_ids(i, f"neurons of expert {e}", kept, moe.width_of(e) or moe.expert_width)
        if not kept:
            raise ValueError(f"plan layer {i}: expert {e} must keep at least one neuron")
        if list(kept) != sorted(kept):
            raise ValueError(
                f"plan layer {i}: neurons of expert {e} must be ascending, got {list(kept[:5])}..."
            )
    if (layer.repair or layer.constants) and layer.merges:
        raise ValueError(
            f"plan layer {i}: {'repair' if layer.repair else 'constants'} and merges exclude each "
            "other, for the statistics are of the experts before they are merged"
        )
    widths = [kept_neurons(layer, moe, e) for e in left]
    if layer.padded_width is None:
        if len(set(widths)) > 1 and not (layer.own_widths or moe.expert_widths):
            raise ValueError(
                f"plan layer {i}: all experts must keep the same number of neurons unless "
                f"own_widths or padded_width is given, got {min(widths)} to {max(widths)}"
            )
    elif layer.own_widths:
        raise ValueError(f"plan layer {i}: own_widths and padded_width exclude each other")
    elif not max(widths) <= layer.padded_width <= moe.expert_width:
        raise ValueError(
            f"plan layer {i}: padded_width must be in [{max(widths)}, {moe.expert_width}], from "
            f"the most neurons that an expert keeps to its width, got {layer.padded_width}"
        )


def least_rows(moe: MoeConfig, router: RouterConfig) -> int:
    """The fewest router rows of a layer: K, and what each group of a grouped router needs."""
    if isinstance(router, SparseMixerRouter) or router.groups == 1:
        return moe.experts_per_token
    in_chosen = -(-moe.experts_per_token // router.chosen_groups)
    return router.groups * max(in_chosen, router.deciding)


def _check_router_groups(i: int, layer: LayerPlan, moe: MoeConfig, router: RouterConfig) -> None:
    """A router that chooses groups first needs them equal, and large enough."""
    if router.groups == 1 or not layer.vanishing:
        return
    left = [e for e in range(moe.num_experts) if e not in {*layer.vanishing}]
    size = moe.num_experts // router.groups
    each = [sum(e // size == group for e in left) for group in range(router.groups)]
    least = least_rows(moe, router) // router.groups
    if len({*each}) > 1 or each[0] < least:
        raise ValueError(
            f"plan layer {i}: the router's {router.groups} groups must keep equally many experts, "
            f"at least {least} each, got {each}"
        )


def kept_neurons(plan: LayerPlan, moe: MoeConfig, expert: int) -> int:
    """How many neurons of an expert stay, if the expert does."""
    kept = plan.neurons.get(expert)
    return moe.width_of(expert) if kept is None else len(kept)


def _check_merges(i: int, layer: LayerPlan, moe: MoeConfig) -> None:
    members = [e for merge in layer.merges for e in (merge.kept, *merge.removed)]
    _check_ids(i, "experts of merges", members, moe.num_experts)
    impossible = sorted(set(members) & {*layer.deleted, *layer.novices, *moe.novice_ids})
    if impossible:
        raise ValueError(f"plan layer {i}: merged experts {impossible} are deleted or novices")
    for merge in layer.merges:
        where = f"plan layer {i}: merge into expert {merge.kept}"
        widths = {moe.width_of(e) for e in (merge.kept, *merge.removed)}
        if len(widths) > 1:
            raise ValueError(f"{where}: needs experts of one width, got {sorted(widths)}")
        if len(merge.weights) != 1 + len(merge.removed):
            raise ValueError(
                f"{where}: needs {1 + len(merge.removed)} weights, got {len(merge.weights)}"
            )
        if not all(0 <= weight < math.inf for weight in merge.weights) or not any(merge.weights):
            raise ValueError(
                f"{where}: weights must be finite, not negative and not all zero, "
                f"got {list(merge.weights)}"
            )


def _check_ids(layer: int, what: str, ids, bound: int) -> None:
    ids = list(ids)
    wrong = [e for e in ids if not 0 <= e < bound]
    if wrong:
        raise ValueError(f"plan layer {layer}: {what} must be in [0, {bound}), got {wrong[:5]}")
    if len(set(ids)) != len(ids):
        raise ValueError(f"plan layer {layer}: {what} are listed twice")


def planned_config(config: ModelConfig, plan: Plan) -> ModelConfig:
    """The architecture that ``prune.apply_plan`` gives, without its weights.

    Raises:
        ValueError: the plan does not fit.
    """
    validate_plan(plan, config)
    layers = list(config.layers)
    for i, layer_plan in plan.layers.items():
        layers[i] = _planned_layer(layers[i], layer_plan)
    kept = [i for i in range(len(layers)) if i not in plan.dropped_layers]
    planned = dataclasses.replace(config, layers=tuple(layers))
    return planned if len(kept) == len(layers) else planned.keep_layers(kept)


def _planned_layer(layer: LayerConfig, plan: LayerPlan) -> LayerConfig:
    if plan.kv_groups is not None:
        groups = len(plan.kv_groups)
        heads = groups * (layer.num_heads // layer.num_kv_heads)
        layer = dataclasses.replace(layer, num_heads=heads, num_kv_heads=groups)
    moe = layer.feed_forward
    if not isinstance(moe, MoeConfig):
        return layer
    rows = [e for e in range(moe.num_experts) if e not in plan.vanishing]
    novices = {*moe.novice_ids, *plan.novices}
    shared = moe.shared.width if moe.shared else 0
    stored = [0 if e in novices else plan.padded_width or kept_neurons(plan, moe, e) for e in rows]
    moe = dataclasses.replace(
        moe,
        num_experts=len(rows),
        expert_width=max(stored),
        novice_ids=tuple(row for row, e in enumerate(rows) if e in novices),
        expert_widths=tuple(stored) if len({*stored} - {0}) > 1 else (),
        expert_bias=moe.expert_bias or plan.constants,
        shared=moe.shared
        and dataclasses.replace(moe.shared, width=len(plan.shared_neurons or range(shared))),
    )
    return dataclasses.replace(layer, feed_forward=moe)
