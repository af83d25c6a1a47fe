"""The loss that a student learns from its teacher and from the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.losses import terms
from moe_jax.losses.terms import Labels, Logits, Mask, TeacherTopK
from moe_jax.settings import check_bounds, check_choice

DistillKind = Literal[
    "kd_topk",
    "kd_topk_renormalized",
    "kd_topk_both",
    "kd_full",
    "reverse_kl",
    "jensen_shannon",
    "lm",
]

# Those that look at the teacher's most likely tokens only.
TOP_K_KINDS = ("kd_topk", "kd_topk_renormalized", "kd_topk_both")


@dataclass(frozen=True)
class DistillOptions:
    """Which distance between student and teacher is taken.

    Attributes:
        kind: ``kd_topk``, ``kd_topk_renormalized`` (see ``top_k_cross_entropy``),
            ``kd_topk_both`` (``top_k_kl``), ``kd_full`` (``forward_kl``), ``reverse_kl``,
            ``jensen_shannon``, or ``lm`` (the labels alone).
        top_k: teacher ids kept by the top-k kinds.
        temperature: of both softmaxes; the loss is scaled by its square.
        beta: in (0, 1); the teacher's share of the mixture in ``jensen_shannon``.
        lm_weight: in [0, 1]; share of the labels' cross-entropy.

    Raises:
        ValueError: names the option, its bounds and its value.
    """

    kind: DistillKind = "kd_topk"
    top_k: int = 8
    temperature: float = 1.0
    beta: float = 0.5
    lm_weight: float = 0.0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(DistillKind))
        check_bounds("top_k", self.top_k, ">= 1")
        check_bounds("temperature", self.temperature, "(0, inf)")
        check_bounds("beta", self.beta, "(0, 1)")
        check_bounds("lm_weight", self.lm_weight, "[0, 1]")

    def check_cached(self, cached: int) -> None:
        """Raises ValueError if the teacher's ``cached`` most likely tokens are not enough."""
        terms.check_cached(self.kind, self.top_k, self.temperature, cached)


def distill_sums(
    student_logits: Logits,
    teacher: Logits | TeacherTopK | None,
    labels: Labels,
    mask: Mask,
    options: DistillOptions,
) -> dict[str, Float[Array, ""]]:
    """The sums that ``distill_loss`` is the mean of; see there for arguments and errors.

    Returns:
        Sums ``distill``, ``lm`` and ``total = (1 - lm_weight) distill + lm_weight lm``, and the
        number of ``positions`` they run over.
    """
    if isinstance(teacher, TeacherTopK):
        options.check_cached(teacher.ids.shape[-1])
    kind, top_k, temperature = options.kind, options.top_k, options.temperature
    lm_weight = options.lm_weight
    _check_shapes(kind, student_logits, teacher, labels, mask)
    target: Any = jax.lax.stop_gradient(jax.tree.map(jnp.asarray, teacher))
    lm, count = terms.cross_entropy(student_logits, labels, mask)
    match kind:
        case "lm":
            distill = lm
        case "kd_full":
            distill, _ = terms.forward_kl(student_logits, target, mask, temperature)
        case "reverse_kl":
            distill, _ = terms.reverse_kl(student_logits, target, mask, temperature)
        case "jensen_shannon":
            distill, _ = terms.jensen_shannon(
                student_logits, target, mask, options.beta, temperature
            )
        case "kd_topk_both":
            distill, _ = terms.top_k_kl(student_logits, target, mask, top_k, temperature)
        case _:
            distill, _ = terms.top_k_cross_entropy(
                student_logits, target, mask, top_k, kind == "kd_topk_renormalized", temperature
            )
    # Left out at weight 0, so that no gradient of the labels is computed, or spoils the total.
    total = distill if lm_weight == 0 else (1 - lm_weight) * distill + lm_weight * lm
    return {"total": total, "distill": distill, "lm": lm, "positions": count}


def distill_loss(
    student_logits: Logits,
    teacher_logits: Logits | TeacherTopK | None,
    labels: Labels,
    mask: Mask,
    *,
    kind: DistillKind = "kd_topk",
    top_k: int = 8,
    temperature: float = 1.0,
    beta: float = 0.5,
    lm_weight: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean distillation loss over ``mask``, mixed with the cross-entropy of the labels.

    Args:
        student_logits: over the teacher's vocabulary.
        teacher_logits: no gradient reaches them. A ``TeacherTopK`` of at least ``top_k`` tokens
            serves the top-k kinds (``kd_topk`` at temperature 1 only: elsewhere the mass of the
            other tokens is unknown); None serves ``lm``.
        kind, top_k, temperature, beta, lm_weight: see ``DistillOptions``.

    Returns:
        The scalar loss, and metrics ``loss``, ``distill``, ``lm`` (means) and ``positions``.

    Raises:
        ValueError: different shapes, an option out of its bounds, or a kind that this teacher
            cannot serve.
    """
    options = DistillOptions(kind, top_k, temperature, beta, lm_weight)
    sums = distill_sums(student_logits, teacher_logits, labels, mask, options)
    count = sums.pop("positions")
    means = {name: value / jnp.maximum(count, 1) for name, value in sums.items()}
    loss = means.pop("total")
    return loss, {"loss": loss, **means, "positions": count}


def _check_shapes(kind, student, teacher, labels, mask) -> None:
    positions = student.shape[:-1]
    if isinstance(teacher, TeacherTopK):
        expected = (*positions, teacher.ids.shape[-1])
        if not teacher.ids.shape == teacher.log_probs.shape == expected:
            raise ValueError(
                f"the teacher's top k must have shape {expected}, got ids {teacher.ids.shape} and "
                f"log_probs {teacher.log_probs.shape}"
            )
    elif teacher is not None:
        terms.check_one_shape("logits", student, teacher)
    elif kind != "lm":
        raise ValueError(f"{kind!r} needs a teacher, got None")
    if not labels.shape == mask.shape == positions:
        raise ValueError(
            f"labels and mask must have shape {positions}, got {labels.shape} and {mask.shape}"
        )
