"""Plans: what to remove, as plain data that can be saved, read, edited and applied again."""

from moe_jax.plan.expert_counts import kept_count
from moe_jax.plan.groups import check_capacity
from moe_jax.plan.kv_groups import kept_groups
from moe_jax.plan.layers import angular_plan, check_drop_layers
from moe_jax.plan.make import make_plan
from moe_jax.plan.merge import merge_plan
from moe_jax.plan.neuron_limits import kept_width
from moe_jax.plan.recipes import MERGE_RECIPES, MergeRecipe
from moe_jax.plan.schema import LayerPlan, Merge, Plan, Replacement, parse_plan, read_plan
from moe_jax.plan.validate import planned_config, validate_plan
from moe_jax.plan.widths import neuron_prices

__all__ = [
    "MERGE_RECIPES",
    "LayerPlan",
    "Merge",
    "MergeRecipe",
    "Plan",
    "Replacement",
    "angular_plan",
    "check_capacity",
    "check_drop_layers",
    "kept_count",
    "kept_groups",
    "kept_width",
    "make_plan",
    "merge_plan",
    "neuron_prices",
    "parse_plan",
    "planned_config",
    "read_plan",
    "validate_plan",
]
