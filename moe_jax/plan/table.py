"""What a plan does to each layer of a model, as text for a terminal; from configurations alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from moe_jax.config import DenseConfig, LayerConfig, ModelConfig, MoeConfig
from moe_jax.params import ParameterCount, count_params
from moe_jax.plan.budget import item_bytes
from moe_jax.plan.schema import LayerPlan, Plan
from moe_jax.plan.validate import kept_neurons, planned_config
from moe_jax.text import aligned, extent

_NO_PARAMETERS = ParameterCount(0, 0, 0)
Row = tuple[str, ...]


def plan_table(config: ModelConfig, plan: Plan, dtype: str = "bfloat16") -> str:
    """A row per layer, one for what lies outside of layers, and the totals, before -> after.

    ``experts`` have neurons; ``novices`` are those of the layer; ``deleted`` and ``merged`` are
    the router rows that vanish, merged ones into experts that stay. ``width`` is as stored, of the
    widest; where experts keep less, or are padded to it, what they keep follows in brackets, and
    behind it a shared expert's where it changes.
    ``active`` parameters are those that a token reads (see ``params.ParameterCount``), ``change``
    is that of all parameters.

    Args:
        config: the model before the plan.
        plan: need not change every layer.
        dtype: that bytes are counted for: float32, bfloat16 or float16.

    Raises:
        ValueError: the plan does not fit the model, or an unknown ``dtype``.
    """
    size = item_bytes(dtype)
    result = planned_config(config, plan)
    in_place = planned_config(config, dataclasses.replace(plan, dropped_layers=()))
    counts = _layer_counter(config)
    rows: list[Row] = []
    sums = [_NO_PARAMETERS, _NO_PARAMETERS]
    for i, (old, new) in enumerate(zip(config.layers, in_place.layers, strict=True)):
        before, after = counts(old), counts(new)
        if i in plan.dropped_layers:
            after = _NO_PARAMETERS
            cells = ("dropped", *[""] * 5)
        else:
            cells = _cells(old, new, plan.layers.get(i, LayerPlan()))
        rows.append((str(i), *cells, *_sizes(before, after, size)))
        sums = [_plus(total, layer) for total, layer in zip(sums, (before, after), strict=True)]
    totals = [count_params(config), count_params(result)]
    outside = [_plus(total, inside, -1) for total, inside in zip(totals, sums, strict=True)]
    empty = [""] * 6
    rows.append(("outside layers", *empty, *_sizes(outside[0], outside[1], size)))
    rows.append(("total", *empty, *_sizes(totals[0], totals[1], size)))
    header = (
        "layer", "experts", "novices", "deleted", "merged", "width", "kv groups",
        "parameters", "active", f"bytes, {dtype}", "change",
    )  # fmt: skip
    return aligned([header, *rows])


def _layer_counter(config: ModelConfig) -> Callable[[LayerConfig], ParameterCount]:
    """Counts one layer: what a second one like it adds to a model."""

    @functools.cache
    def count(layer: LayerConfig) -> ParameterCount:
        one, two = (count_params(dataclasses.replace(config, layers=(layer,) * n)) for n in (1, 2))
        return _plus(two, one, -1)

    return count


def _plus(a: ParameterCount, b: ParameterCount, sign: int = 1) -> ParameterCount:
    return ParameterCount(
        a.total + sign * b.total, a.active + sign * b.active, a.experts + sign * b.experts
    )


def _cells(old: LayerConfig, new: LayerConfig, plan: LayerPlan) -> Row:
    groups = _change(old.num_kv_heads, new.num_kv_heads)
    if isinstance(old.feed_forward, DenseConfig):
        return ("-", "-", "-", "-", f"{old.feed_forward.width:,}", groups)
    before, after = old.moe, new.moe
    return (
        _change(len(before.expert_ids), len(after.expert_ids)),
        _change(len(before.novice_ids), len(after.novice_ids)),
        f"{len(plan.deleted):,}",
        f"{len(plan.vanishing) - len(plan.deleted):,}",
        _change(before.expert_width, after.expert_width)
        + _own_widths(before, after, plan)
        + _shared_width(before, after),
        groups,
    )


def _own_widths(before: MoeConfig, after: MoeConfig, plan: LayerPlan) -> str:
    """How many neurons experts keep, where they differ or are stored with more."""
    gone = {*plan.vanishing, *plan.novices}
    kept = {kept_neurons(plan, before, e) for e in before.expert_ids if e not in gone}
    return "" if kept == {after.expert_width} else f" ({extent(kept)})"


def _shared_width(before: MoeConfig, after: MoeConfig) -> str:
    """That of the shared expert, where it changes."""
    if before.shared is None or after.shared is None or before.shared == after.shared:
        return ""
    return f", shared {_change(before.shared.width, after.shared.width)}"


def _sizes(before: ParameterCount, after: ParameterCount, size: int) -> Row:
    change = f"{after.total / before.total - 1:+.1%}" if before.total else ""
    return (
        _change(before.total, after.total),
        _change(before.active, after.active),
        _change(before.total * size, after.total * size),
        change,
    )


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"
