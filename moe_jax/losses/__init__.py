"""Training and distillation losses, in float32, each as ``(sum, count)``.

A sum and the number of positions it runs over, rather than a mean, so that sharded, accumulated
and whole batches agree; callers divide once. Masked positions may hold anything, NaN included: they
reach neither a sum nor a gradient.
"""

from moe_jax.losses.distill import (
    TOP_K_KINDS,
    DistillKind,
    DistillOptions,
    distill_loss,
    distill_sums,
)
from moe_jax.losses.terms import (
    TeacherTopK,
    balance_loss,
    cross_entropy,
    forward_kl,
    hidden_distance,
    jensen_shannon,
    next_token_labels,
    reverse_kl,
    router_kl,
    teacher_top_k,
    top_k_cross_entropy,
    top_k_kl,
)

__all__ = [
    "TOP_K_KINDS",
    "DistillKind",
    "DistillOptions",
    "TeacherTopK",
    "balance_loss",
    "cross_entropy",
    "distill_loss",
    "distill_sums",
    "forward_kl",
    "hidden_distance",
    "jensen_shannon",
    "next_token_labels",
    "reverse_kl",
    "router_kl",
    "teacher_top_k",
    "top_k_cross_entropy",
    "top_k_kl",
]
