"""Closed-form pruning of neurons: which go (energy, OBS), and how those that stay make up for it.

An expert's output is linear in its hidden activations: ``y = down^T h``. So with the second moments
``G = sum g^2 h h^T`` of the activations, ``g`` the routing weight, the gate-weighted squared error
of any change of ``down`` is a quadratic form, and both questions have exact answers that need no
further pass over text.
"""

from moe_jax.repair.batched import over_experts
from moe_jax.repair.removal import RIDGE, group_removal_costs, neuron_energy, removal_costs
from moe_jax.repair.solve import repaired_down

__all__ = [
    "RIDGE",
    "group_removal_costs",
    "neuron_energy",
    "over_experts",
    "removal_costs",
    "repaired_down",
]
