"""Losses of predictions, summed over the positions that count, whatever the others hold.

Each is a sum and the number of positions that it runs over.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_jax.settings import check_bounds

Logits = Float[Array | np.ndarray, "*N V"]
Labels = Int[Array | np.ndarray, "*N"]
Mask = Bool[Array | np.ndarray, "*N"]
Sums = tuple[Float[Array, ""], Float[Array, ""]]

# Keeps the distance of a zero state finite; far below the square norm of any other.
_EPS = 1e-6
_WHOLE_VOCABULARY = ("kd_full", "reverse_kl", "jensen_shannon")


def next_token_labels(
    tokens: Int[Array, "B S"], segment_ids: Int[Array, "B S"]
) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """The token that follows each position, and where it exists within the same segment."""
    labels = jnp.roll(tokens, -1, axis=1)
    following = jnp.roll(segment_ids, -1, axis=1).at[:, -1].set(0)
    return labels, (segment_ids > 0) & (following == segment_ids)


def cross_entropy(logits: Logits, labels: Labels, mask: Mask) -> Sums:
    """Sum of ``-log p(label)`` over the mask, in nats, and the number of positions."""
    return masked_sum(-log_softmax_at(logits, labels[..., None], mask)[..., 0], mask)


def forward_kl(student: Logits, teacher: Logits, mask: Mask, temperature: float = 1.0) -> Sums:
    """``T^2 KL(teacher || student)`` over the whole vocabulary (arXiv 1503.02531, section 2)."""
    log_p, log_q = (log_softmax(logits, mask, temperature) for logits in (teacher, student))
    return masked_sum(temperature**2 * kl(log_p, log_q), mask)


def reverse_kl(student: Logits, teacher: Logits, mask: Mask, temperature: float = 1.0) -> Sums:
    """``T^2 KL(student || teacher)``, position by position (MiniLLM, arXiv 2306.08543, eq. 1)."""
    return forward_kl(teacher, student, mask, temperature)


def jensen_shannon(
    student: Logits, teacher: Logits, mask: Mask, beta: float = 0.5, temperature: float = 1.0
) -> Sums:
    """Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649, eq. 1), times ``T^2``.

    ``beta KL(P || M) + (1 - beta) KL(Q || M)`` with ``M = beta P + (1 - beta) Q``, P the teacher
    and Q the student. At most ``ln 2``. Divided by ``beta`` it tends to the forward KL as ``beta``
    tends to 0, and divided by ``1 - beta`` to the reverse KL as ``beta`` tends to 1.

    Raises:
        ValueError: ``beta`` outside ``(0, 1)``.
    """
    check_bounds("beta", beta, "(0, 1)")
    log_p, log_q = (log_softmax(logits, mask, temperature) for logits in (teacher, student))
    log_m = jnp.logaddexp(math.log(beta) + log_p, math.log1p(-beta) + log_q)
    loss = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    return masked_sum(temperature**2 * loss, mask)


def kl(log_p, log_q):
    """``KL(p || q)`` over the last axis."""
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


class TeacherTopK(NamedTuple):
    """The teacher's K most likely tokens: what an offline cache of the teacher holds.

    Attributes:
        ids: most likely first.
        log_probs: over the whole vocabulary, at temperature 1.
    """

    ids: Int[Array, "*N K"]
    log_probs: Float[Array, "*N K"]


def teacher_top_k(logits: Logits, k: int) -> TeacherTopK:
    """The k most likely tokens of each position; of equal ones the lower id.

    Raises:
        ValueError: ``k`` outside ``[1, V]``.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"top_k must be in [1, vocabulary = {logits.shape[-1]}], got {k}")
    # In float32 for speed too: on CPU the top-k of bfloat16 is a full sort, 100 times slower.
    logits = logits.astype(jnp.float32)
    largest, ids = jax.lax.top_k(logits, k)
    return TeacherTopK(ids, largest - jax.nn.logsumexp(logits, -1, keepdims=True))


def top_k_cross_entropy(
    student: Logits,
    teacher: Logits | TeacherTopK,
    mask: Mask,
    k: int = 8,
    renormalize: bool = False,
    temperature: float = 1.0,
) -> Sums:
    """``T^2`` times the cross-entropy of the student's full softmax with the teacher's top k.

    The SlimMoE paper scores and distils on the teacher's top-8 logits; its exact form is not
    public. Unrenormalised (the default) the targets p sum to the kept mass ``m < 1`` and the
    gradient in the student's logits is ``T (m q - p)``, which does not vanish where student and
    teacher agree: what importance scoring of an untouched model needs.

    Raises:
        ValueError: ``k`` larger than the vocabulary or the cache, or a cache, unrenormalised, at
            another temperature than 1.
    """
    kind = "kd_topk_renormalized" if renormalize else "kd_topk"
    ids, log_p = _targets(kind, teacher, mask, k, temperature)
    log_q = log_softmax_at(student, ids, mask, temperature)
    targets = jax.nn.softmax(log_p, -1) if renormalize else jnp.exp(log_p)
    return masked_sum(-(temperature**2) * (targets * log_q).sum(-1), mask)


def top_k_kl(
    student: Logits, teacher: Logits | TeacherTopK, mask: Mask, k: int = 8, temperature: float = 1.0
) -> Sums:
    """``T^2 KL(teacher || student)``, both renormalised over the teacher's k most likely tokens.

    It is blind to the student's mass outside the k. Another reading of SlimMoE's top-8 loss, see
    ``top_k_cross_entropy``.

    Raises:
        ValueError: ``k`` larger than the vocabulary or the cache.
    """
    ids, log_p = _targets("kd_topk_both", teacher, mask, k, temperature)
    log_q = log_softmax(jnp.take_along_axis(student, ids, -1), mask, temperature)
    return masked_sum(temperature**2 * kl(jax.nn.log_softmax(log_p, -1), log_q), mask)


def _targets(kind, teacher, mask, k, temperature):
    """The teacher's k ids, and log-probabilities at ``temperature`` (a cache's: not normalised)."""
    if not isinstance(teacher, TeacherTopK):
        return teacher_top_k(teacher.astype(jnp.float32) / temperature, k)
    check_cached(kind, k, temperature, teacher.ids.shape[-1])
    return teacher.ids[..., :k], teacher.log_probs[..., :k].astype(jnp.float32) / temperature


def check_cached(kind: str, top_k: int, temperature: float, cached: int) -> None:
    if kind in _WHOLE_VOCABULARY:
        raise ValueError(
            f"{kind!r} needs the teacher's whole vocabulary, got its top {cached}, which serve "
            "'kd_topk', 'kd_topk_renormalized' and 'kd_topk_both'"
        )
    if kind != "lm" and not 1 <= top_k <= cached:
        raise ValueError(f"top_k must be in [1, cached = {cached}], got {top_k}")
    if kind == "kd_topk" and temperature != 1:
        raise ValueError(
            f"'kd_topk' from the teacher's top {cached} needs temperature = 1, got {temperature}: "
            "the mass that other tokens take at another temperature is unknown; "
            "'kd_topk_renormalized' does not need it"
        )


def hidden_distance(
    student: Float[Array | np.ndarray, "*N D"],
    teacher: Float[Array | np.ndarray, "*N D"],
    mask: Mask,
) -> Sums:
    """Sum of ``||s - t||^2 / (||t||^2 + 1e-6)`` over the mask; no gradient reaches the teacher.

    Relative, since hidden states grow with depth, and token by token, since a sum of ratios adds
    up over shards where a ratio of sums does not.

    Raises:
        ValueError: different shapes.
    """
    check_one_shape("hidden states", student, teacher)
    s, t = (
        zero_masked(student, mask),
        zero_masked(jax.lax.stop_gradient(jnp.asarray(teacher)), mask),
    )
    return masked_sum(jnp.square(s - t).sum(-1) / (jnp.square(t).sum(-1) + _EPS), mask)


def router_kl(
    student: Float[Array | np.ndarray, "*N E"],
    teacher: Float[Array | np.ndarray, "*N E"],
    mask: Mask,
) -> Sums:
    """``KL(teacher || student)`` of two routers' softmaxes; no gradient reaches the teacher.

    Router KD (arXiv 2603.02217) recovers a compressed model by training its routers alone, on
    the teacher's next-token distribution; this matches each layer's routing itself, position by
    position.

    Raises:
        ValueError: different shapes, so routers over different experts.
    """
    check_one_shape("router logits", student, teacher)
    return forward_kl(student, jax.lax.stop_gradient(jnp.asarray(teacher)), mask)


def balance_loss(
    router_logits: Float[Array, "T E"], expert_ids: Int[Array, "T K"], valid: Bool[Array, " T"]
) -> Float[Array, ""]:
    """Load-balancing loss ``E sum_e f_e P_e`` of one layer (arXiv 2101.03961, eqs. 4-6).

    ``f_e`` is the share of (token, slot) pairs sent to expert e and ``P_e`` its mean softmax
    probability, over valid tokens; 1 when routing is uniform.
    """
    num_experts = router_logits.shape[-1]
    count = jnp.maximum(valid.sum(), 1)
    weights = jnp.broadcast_to(valid[:, None], expert_ids.shape).astype(jnp.float32)
    sent = jnp.zeros(num_experts).at[expert_ids].add(weights) / (count * expert_ids.shape[-1])
    probability = jax.nn.softmax(zero_masked(router_logits, valid), -1)
    probability = jnp.where(valid[:, None], probability, 0).sum(0) / count
    return num_experts * (jax.lax.stop_gradient(sent) * probability).sum()


def masked_sum(loss: Float[Array, "*N"], mask: Mask) -> Sums:
    """Sum of ``loss`` over the mask, and the number of positions."""
    return jnp.where(mask, loss, 0).sum(), jnp.sum(mask).astype(jnp.float32)


def zero_masked(values: Float[Array | np.ndarray, "*N D"], mask: Mask) -> Float[Array, "*N D"]:
    """Float32, with zeros where masked.

    Needed before the loss as well as after it: in a gradient, a masked NaN times 0 is NaN.
    """
    return jnp.where(mask[..., None], values.astype(jnp.float32), 0)


def log_softmax(logits: Logits, mask: Mask, temperature: float = 1.0) -> Float[Array, "*N V"]:
    """Of ``logits / temperature``, in float32; zeros where masked."""
    logits = logits.astype(jnp.float32) / temperature
    return jnp.where(mask[..., None], logits - _logsumexp(logits, mask)[..., None], 0)


def log_softmax_at(
    logits: Logits, ids: Int[Array | np.ndarray, "*N K"], mask: Mask, temperature: float = 1.0
) -> Float[Array, "*N K"]:
    """``log_softmax`` at ``ids``, without its ``[N, V]`` array: the logits are gathered."""
    logits = logits.astype(jnp.float32) / temperature
    chosen = jnp.take_along_axis(logits, ids, -1) - _logsumexp(logits, mask)[..., None]
    return jnp.where(mask[..., None], chosen, 0)


@jax.custom_jvp
def _logsumexp(logits, mask):
    """With gradient 0 where masked, and so no masked copy of the logits that has to be made."""
    return jax.nn.logsumexp(logits, -1)


@_logsumexp.defjvp
def _logsumexp_jvp(primals, tangents):
    (logits, mask), (change, _) = primals, tangents
    total = _logsumexp(logits, mask)
    softmax = jnp.where(mask[..., None], jnp.exp(logits - total[..., None]), 0)
    return total, (softmax * change).sum(-1)


def check_one_shape(what: str, student, teacher) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher {what} must have one shape, got {student.shape} and "
            f"{teacher.shape}"
        )
