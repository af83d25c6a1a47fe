"""What it costs that the sizes which a plan leaves divide over a mesh."""

from __future__ import annotations

import dataclasses

from moe_jax.config import ModelConfig
from moe_jax.params import count_params
from moe_jax.plan.cut import Cut
from moe_jax.plan.make import Planned, plan_ranked
from moe_jax.plan.validate import planned_config
from moe_jax.plan.widths import neuron_prices
from moe_jax.statistics import Stats


def mesh_cost(cut: Cut, planned: Planned, stats: Stats, config: ModelConfig) -> str:
    """A sentence that compares a plan with what it would be without ``cut.mesh``.

    Args:
        cut: as ``plan_cut`` took it.
        planned: what it made of it.
        stats, config: of the model that is cut.

    Returns:
        Empty if the cut names no mesh.
    """
    if not cut.mesh:
        return ""
    free = dataclasses.replace(cut, mesh={})
    prices = neuron_prices(stats, cut.active_share) if cut.own_widths else None
    without = dataclasses.replace(planned, plan=plan_ranked(free, config, planned, prices))
    sizes = [planned_config(config, one.plan) for one in (planned, without)]
    (now, before), (active, active_before) = (
        [getattr(count_params(size), name) for size in sizes] for name in ("total", "active")
    )
    where = " x ".join(f"{axis} = {size}" for axis, size in cut.mesh.items())
    text = (
        f"sizes that divide over {where}: {now:,} parameters, {now / before - 1:+.2%} against "
        f"those of the plan without a mesh, {active / active_before - 1:+.2%} active"
    )
    if planned.scores:
        text += f"; {planned.lost:.2%} of all scores go instead of {without.lost:.2%}"
    return text
