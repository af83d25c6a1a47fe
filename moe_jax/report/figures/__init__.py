"""Figures of a report. Each takes plain data and gives a matplotlib ``Figure``.

``layers`` is always the ``layers`` list of one stage (or ``routing_by_domain``) as described in
``moe_jax.report``; a layer that lacks what a figure shows is left out. ``dark=True`` draws for a
dark page.
"""

from moe_jax.report.figures.experts import layers_with_experts, plot_experts, plot_scores
from moe_jax.report.figures.neurons import importance_curve, plot_neuron_importance
from moe_jax.report.figures.quality import plot_bits_per_byte, plot_kl, plot_stages, shows_stages
from moe_jax.report.figures.routing import plot_routing_by_domain
from moe_jax.report.figures.training import plot_training, shows_training, training_caption

__all__ = [
    "importance_curve",
    "layers_with_experts",
    "plot_bits_per_byte",
    "plot_experts",
    "plot_kl",
    "plot_neuron_importance",
    "plot_routing_by_domain",
    "plot_scores",
    "plot_stages",
    "plot_training",
    "shows_stages",
    "shows_training",
    "training_caption",
]
