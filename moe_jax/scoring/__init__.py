"""Criteria: from statistics to one number per expert, neuron or group. Low means redundant."""

from moe_jax.scoring.experts import EXPERT_CRITERIA, output_deviation
from moe_jax.scoring.neurons import (
    AGGREGATIONS,
    GROUP_CRITERIA,
    IMPORTANCE_LOSSES,
    NEURON_CRITERIA,
    activation_norm,
)
from moe_jax.scoring.reconstruction import best_subset, reconstruction_loss
from moe_jax.scoring.score import NEEDED_LOSS, score
from moe_jax.scoring.second_order import MODEL_CRITERIA, MODEL_GROUP_CRITERIA

__all__ = [
    "AGGREGATIONS",
    "EXPERT_CRITERIA",
    "GROUP_CRITERIA",
    "IMPORTANCE_LOSSES",
    "MODEL_CRITERIA",
    "MODEL_GROUP_CRITERIA",
    "NEEDED_LOSS",
    "NEURON_CRITERIA",
    "activation_norm",
    "best_subset",
    "output_deviation",
    "reconstruction_loss",
    "score",
]
