"""The record of a compression run, as data, as a page, as a model card and as text.

A report is a plain dict (``facts.Report`` says what it may hold). ``sections.document`` turns it
into one list of sections, which ``html``, ``markdown`` and ``terminal`` render.
"""

from moe_jax.report.facts import Report, check_report, importance_curve
from moe_jax.report.figures.experts import (
    plot_experts,
    plot_neuron_importance,
    plot_routing_by_domain,
    plot_scores,
)
from moe_jax.report.figures.quality import plot_bits_per_byte, plot_kl, plot_stages, plot_training
from moe_jax.report.html import report_html
from moe_jax.report.markdown import model_card
from moe_jax.report.points import stage_points
from moe_jax.report.record import plain, read_report, write_report
from moe_jax.report.terminal import summary_table

__all__ = [
    "Report",
    "check_report",
    "importance_curve",
    "model_card",
    "plain",
    "plot_bits_per_byte",
    "plot_experts",
    "plot_kl",
    "plot_neuron_importance",
    "plot_routing_by_domain",
    "plot_scores",
    "plot_stages",
    "plot_training",
    "read_report",
    "report_html",
    "stage_points",
    "summary_table",
    "write_report",
]
