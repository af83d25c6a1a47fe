"""Plans: what to remove, as plain data that can be saved, read, edited and applied again."""

from moe_jax.plan.cut import Cut
from moe_jax.plan.experts import kept_count
from moe_jax.plan.layers import angular_plan
from moe_jax.plan.make import Planned, cut_scores, foreseen, make_plan, plan_cut, plan_ranked
from moe_jax.plan.merge import MERGE_RECIPES, MergeRecipe, merge_plan
from moe_jax.plan.mesh_cost import mesh_cost
from moe_jax.plan.neurons import padded_alike
from moe_jax.plan.schema import LayerPlan, Merge, Plan, parse_plan, read_plan
from moe_jax.plan.validate import kept_neurons, planned_config, validate_plan
from moe_jax.plan.widths import neuron_prices

__all__ = [
    "MERGE_RECIPES",
    "Cut",
    "LayerPlan",
    "Merge",
    "MergeRecipe",
    "Plan",
    "Planned",
    "angular_plan",
    "cut_scores",
    "foreseen",
    "kept_count",
    "kept_neurons",
    "make_plan",
    "merge_plan",
    "mesh_cost",
    "neuron_prices",
    "padded_alike",
    "parse_plan",
    "plan_cut",
    "plan_ranked",
    "planned_config",
    "read_plan",
    "validate_plan",
]
