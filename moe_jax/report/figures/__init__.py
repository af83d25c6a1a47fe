"""Figures of a report. Each takes plain data and gives a matplotlib ``Figure``.

``layers`` is always the ``layers`` of one stage; a layer that lacks what a figure shows is left
out. With ``dark=True`` a figure is drawn for a dark page.
"""

from moe_jax.report.figures.confidence import plot_confidence, shows_convergence
from moe_jax.report.figures.experts import (
    plot_experts,
    plot_neuron_importance,
    plot_routing_by_domain,
    plot_scores,
    with_experts,
)
from moe_jax.report.figures.quality import (
    plot_bits_per_byte,
    plot_kl,
    plot_stages,
    plot_training,
    shown_parts,
    shows_stages,
    thin,
    training_caption,
)

__all__ = [
    "plot_bits_per_byte",
    "plot_confidence",
    "plot_experts",
    "plot_kl",
    "plot_neuron_importance",
    "plot_routing_by_domain",
    "plot_scores",
    "plot_stages",
    "plot_training",
    "shown_parts",
    "shows_convergence",
    "shows_stages",
    "thin",
    "training_caption",
    "with_experts",
]
