"""Criteria: from statistics to one number per expert, neuron or key/value group. Low: redundant.

``CRITERIA`` holds them all, by what they rank; the other names are views of it.
"""

from moe_jax.scoring.criterion import Beside, Criterion, Option
from moe_jax.scoring.expert_criteria import EXPERTS as EXPERT_CRITERIA
from moe_jax.scoring.expert_criteria import output_deviation
from moe_jax.scoring.neuron_criteria import KV_GROUPS as GROUP_CRITERIA
from moe_jax.scoring.neuron_criteria import NEURONS as NEURON_CRITERIA
from moe_jax.scoring.neuron_criteria import activation_norm
from moe_jax.scoring.reconstruction import best_subset, reconstruction_loss
from moe_jax.scoring.score import CRITERIA, criterion_options, score, with_lowest
from moe_jax.scoring.second_order import KV_GROUPS_WITH_WEIGHTS as MODEL_GROUP_CRITERIA
from moe_jax.scoring.second_order import NEURONS_WITH_WEIGHTS as MODEL_CRITERIA
from moe_jax.statistics_table import AGGREGATIONS, IMPORTANCE_LOSSES, PASSES

# The loss that calibration must differentiate for a criterion, whatever it ranks.
NEEDED_LOSS = {
    name: criterion.loss
    for criteria in CRITERIA.values()
    for name, criterion in criteria.items()
    if criterion.loss
}

__all__ = [
    "AGGREGATIONS",
    "CRITERIA",
    "EXPERT_CRITERIA",
    "GROUP_CRITERIA",
    "IMPORTANCE_LOSSES",
    "MODEL_CRITERIA",
    "MODEL_GROUP_CRITERIA",
    "NEEDED_LOSS",
    "NEURON_CRITERIA",
    "PASSES",
    "Beside",
    "Criterion",
    "Option",
    "activation_norm",
    "best_subset",
    "criterion_options",
    "output_deviation",
    "reconstruction_loss",
    "score",
    "with_lowest",
]
