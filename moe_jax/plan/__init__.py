"""Plans: what to remove, as plain data that can be saved, read, edited and applied again."""

from moe_jax.plan.make import kept_count, kept_groups, kept_width, make_plan
from moe_jax.plan.schema import LayerPlan, Plan, Replacement
from moe_jax.plan.validate import planned_config, validate_plan

__all__ = [
    "LayerPlan",
    "Plan",
    "Replacement",
    "kept_count",
    "kept_groups",
    "kept_width",
    "make_plan",
    "planned_config",
    "validate_plan",
]
