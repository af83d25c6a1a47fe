"""Training and distillation losses, in float32, each as ``(sum, count)``.

A sum and the number of positions it runs over, rather than a mean, so that sharded, accumulated
and whole batches agree; callers divide once.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

DistillKind = Literal["kd_topk", "kd_topk_renormalized", "kd_full", "reverse_kl", "lm"]


def next_token_labels(
    tokens: Int[Array, "B S"], segment_ids: Int[Array, "B S"]
) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """The token that follows each position, and where it exists within the same segment."""
    labels = jnp.roll(tokens, -1, axis=1)
    following = jnp.roll(segment_ids, -1, axis=1).at[:, -1].set(0)
    return labels, (segment_ids > 0) & (following == segment_ids)


def cross_entropy(
    logits: Float[Array, "*N V"], labels: Int[Array, "*N"], mask: Bool[Array, "*N"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of ``-log p(label)`` over the mask, in nats, and the number of positions."""
    logits = logits.astype(jnp.float32)
    # A comparison fuses, forward and backward; a gather's gradient is a scatter over [N, V].
    hit = jnp.arange(logits.shape[-1]) == labels[..., None]
    chosen = jnp.where(hit, logits, 0).sum(-1)
    loss = jax.nn.logsumexp(logits, -1) - chosen
    return jnp.where(mask, loss, 0).sum(), mask.sum().astype(jnp.float32)


def forward_kl(
    student: Float[Array, "*N V"],
    teacher: Float[Array, "*N V"],
    mask: Bool[Array, "*N"],
    temperature: float = 1.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """``T^2 KL(teacher || student)`` over the whole vocabulary (arXiv 1503.02531, section 2)."""
    log_p = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature, -1)
    log_q = jax.nn.log_softmax(student.astype(jnp.float32) / temperature, -1)
    loss = temperature**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    return jnp.where(mask, loss, 0).sum(), mask.sum().astype(jnp.float32)


def top_k_cross_entropy(
    student: Float[Array, "*N V"],
    teacher: Float[Array, "*N V"],
    mask: Bool[Array, "*N"],
    k: int = 8,
    renormalize: bool = False,
    temperature: float = 1.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of the student's full softmax with the teacher's k largest probabilities.

    The SlimMoE paper scores and distils on the teacher's top-8 logits; its exact form is not
    public. Unrenormalised (the default) the targets sum to the kept mass ``m < 1`` and the
    gradient in the student's logits is ``m q - p``, which does not vanish where student and
    teacher agree: what importance scoring of an untouched model needs.
    """
    log_p, ids = jax.lax.top_k(jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature, -1), k)
    targets = jnp.exp(log_p)
    if renormalize:
        targets = targets / targets.sum(-1, keepdims=True)
    log_q = jax.nn.log_softmax(student.astype(jnp.float32) / temperature, -1)
    loss = -(temperature**2) * (targets * jnp.take_along_axis(log_q, ids, -1)).sum(-1)
    return jnp.where(mask, loss, 0).sum(), mask.sum().astype(jnp.float32)


def distill_loss(
    student_logits: Float[Array, "B S V"],
    teacher_logits: Float[Array, "B S V"],
    labels: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    *,
    kind: DistillKind = "kd_topk",
    top_k: int = 8,
    temperature: float = 1.0,
    lm_weight: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean distillation loss over ``mask``, mixed with the cross-entropy of the labels.

    Args:
        student_logits, teacher_logits: over one vocabulary; no gradient reaches the teacher's.
        labels: next tokens.
        mask: positions that count.
        kind: ``kd_topk``, ``kd_topk_renormalized`` (see ``top_k_cross_entropy``), ``kd_full``,
            ``reverse_kl`` (``KL(student || teacher)``, arXiv 2306.08543), or ``lm`` (the labels
            alone).
        top_k: teacher ids kept by the top-k kinds.
        temperature: of both softmaxes; the loss is scaled by its square.
        lm_weight: in [0, 1]; share of the labels' cross-entropy.

    Returns:
        The scalar loss, and metrics ``loss``, ``distill``, ``lm`` (means) and ``positions``.

    Raises:
        ValueError: different shapes, an unknown kind, or a weight or temperature out of range.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student and teacher logits must have one shape, got "
            f"{student_logits.shape} and {teacher_logits.shape}"
        )
    if not 0 <= lm_weight <= 1:
        raise ValueError(f"lm_weight must be in [0, 1], got {lm_weight}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    lm, count = cross_entropy(student_logits, labels, mask)
    if kind == "kd_full":
        distill, _ = forward_kl(student_logits, teacher_logits, mask, temperature)
    elif kind == "reverse_kl":
        distill, _ = forward_kl(teacher_logits, student_logits, mask, temperature)
    elif kind in ("kd_topk", "kd_topk_renormalized"):
        distill, _ = top_k_cross_entropy(
            student_logits, teacher_logits, mask, top_k, kind != "kd_topk", temperature
        )
    elif kind == "lm":
        distill = lm
    else:
        raise ValueError(f"kind must be one of {DistillKind.__args__}, got {kind!r}")  # type: ignore[attr-defined]
    positions = jnp.maximum(count, 1)
    loss = ((1 - lm_weight) * distill + lm_weight * lm) / positions
    return loss, {
        "loss": loss,
        "distill": distill / positions,
        "lm": lm / positions,
        "positions": count,
    }


def balance_loss(
    router_logits: Float[Array, "T E"],
    expert_ids: Int[Array, "T K"],
    valid: Bool[Array, " T"],
) -> Float[Array, ""]:
    """Load-balancing loss ``E sum_e f_e P_e`` of one layer (arXiv 2101.03961, eqs. 4-6).

    ``f_e`` is the share of (token, slot) pairs sent to expert e and ``P_e`` its mean softmax
    probability, over valid tokens; 1 when routing is uniform.
    """
    num_experts = router_logits.shape[-1]
    count = jnp.maximum(valid.sum(), 1)
    weights = jnp.broadcast_to(valid[:, None], expert_ids.shape).astype(jnp.float32)
    sent = jnp.zeros(num_experts).at[expert_ids].add(weights) / (count * expert_ids.shape[-1])
    probability = jnp.where(valid[:, None], jax.nn.softmax(router_logits, -1), 0).sum(0) / count
    return num_experts * (jax.lax.stop_gradient(sent) * probability).sum()
