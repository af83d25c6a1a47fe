"""Held-out loss of models, per domain: perplexity, bits per byte, and distance to a reference."""

from moe_jax.evaluate.checkpoints import comparison_table, evaluate_checkpoints
from moe_jax.evaluate.measure import evaluate, evaluate_pair, forward_speed
from moe_jax.evaluate.results import DomainEvaluation, Evaluation

__all__ = [
    "DomainEvaluation",
    "Evaluation",
    "comparison_table",
    "evaluate",
    "evaluate_checkpoints",
    "evaluate_pair",
    "forward_speed",
]
