"""Losses over the teacher's k most likely tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.losses.divergences import kl
from moe_jax.losses.masked import log_softmax, log_softmax_at, masked_sum

_WHOLE_VOCABULARY = ("kd_full", "reverse_kl", "jensen_shannon")


class TeacherTopK(NamedTuple):
    """The teacher's K most likely tokens: what an offline cache of the teacher holds.

    Attributes:
        ids: most likely first.
        log_probs: over the whole vocabulary, at temperature 1.
    """

    ids: Int[Array, "*N K"]
    log_probs: Float[Array, "*N K"]


def teacher_top_k(logits: Float[Array, "*N V"], k: int) -> TeacherTopK:
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
    student: Float[Array, "*N V"],
    teacher: Float[Array, "*N V"] | TeacherTopK,
    mask: Bool[Array, "*N"],
    k: int = 8,
    renormalize: bool = False,
    temperature: float = 1.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
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
    student: Float[Array, "*N V"],
    teacher: Float[Array, "*N V"] | TeacherTopK,
    mask: Bool[Array, "*N"],
    k: int = 8,
    temperature: float = 1.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
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
