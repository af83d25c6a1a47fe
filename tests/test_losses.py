"""Losses against float64 NumPy and optax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.losses import balance_loss, cross_entropy, distill_loss, next_token_labels

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (RNG.standard_normal((2, 5, 23)).astype(np.float32) * 3 for _ in range(2))
LABELS = RNG.integers(0, 23, (2, 5))
MASK = RNG.random((2, 5)) < 0.7


def log_softmax(logits, temperature=1.0):
    logits = logits.astype(np.float64) / temperature
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def reference(kind, temperature=1.0, k=8):
    """Mean over the mask, in float64."""
    p, q = (np.exp(log_softmax(a, temperature)) for a in (TEACHER, STUDENT))
    if kind == "lm":
        loss = -np.take_along_axis(log_softmax(STUDENT), LABELS[..., None], -1)[..., 0]
        return loss[MASK].mean()
    if kind == "kd_full":
        loss = (p * (np.log(p) - np.log(q))).sum(-1)
    elif kind == "reverse_kl":
        loss = (q * (np.log(q) - np.log(p))).sum(-1)
    else:
        top = np.argsort(-p, -1)[..., :k]
        target = np.take_along_axis(p, top, -1)
        if kind == "kd_topk_renormalized":
            target = target / target.sum(-1, keepdims=True)
        loss = -(target * np.log(np.take_along_axis(q, top, -1))).sum(-1)
    return temperature**2 * loss[MASK].mean()


@pytest.mark.parametrize("kind", ["lm", "kd_full", "reverse_kl", "kd_topk", "kd_topk_renormalized"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_losses_equal_float64(kind, temperature):
    loss, metrics = distill_loss(STUDENT, TEACHER, LABELS, MASK, kind=kind, temperature=temperature)
    np.testing.assert_allclose(loss, reference(kind, temperature), rtol=2e-6)
    assert metrics["positions"] == MASK.sum()
    mixed, _ = distill_loss(
        STUDENT, TEACHER, LABELS, MASK, kind=kind, temperature=temperature, lm_weight=0.25
    )
    expected = 0.75 * reference(kind, temperature) + 0.25 * reference("lm")
    np.testing.assert_allclose(mixed, expected, rtol=2e-6)


def test_cross_entropy_and_kl_equal_optax():
    total, count = cross_entropy(STUDENT, LABELS, MASK)
    theirs = optax.softmax_cross_entropy_with_integer_labels(STUDENT, LABELS)
    np.testing.assert_allclose(total, theirs[MASK].sum(), rtol=1e-6)
    assert count == MASK.sum()
    loss, _ = distill_loss(STUDENT, TEACHER, LABELS, MASK, kind="kd_full")
    log_q, log_p = jax.nn.log_softmax(STUDENT), jax.nn.log_softmax(TEACHER)
    theirs = optax.losses.kl_divergence_with_log_targets(log_q, log_p)
    np.testing.assert_allclose(loss, theirs[MASK].mean(), rtol=1e-5)


def gradient_at_the_teacher(kind):
    def loss(student):
        return distill_loss(student, TEACHER, LABELS, MASK, kind=kind)[0]

    return np.abs(jax.grad(loss)(jnp.asarray(TEACHER))).max()


def test_which_gradients_vanish_where_student_and_teacher_agree():
    """The trap of importance scoring: only kd_topk still says something about the teacher."""
    assert gradient_at_the_teacher("kd_full") < 1e-7
    assert gradient_at_the_teacher("reverse_kl") < 1e-7
    p = np.exp(log_softmax(TEACHER))
    top = np.argsort(-p, -1)[..., :8]
    target = np.zeros_like(p)
    np.put_along_axis(target, top, np.take_along_axis(p, top, -1), -1)
    expected = (target.sum(-1, keepdims=True) * p - target)[MASK] / MASK.sum()
    assert np.isclose(gradient_at_the_teacher("kd_topk"), np.abs(expected).max(), rtol=1e-4)


def test_no_gradient_reaches_the_teacher():
    def loss(teacher):
        return distill_loss(STUDENT, teacher, LABELS, MASK, kind="kd_topk")[0]

    assert not np.any(jax.grad(loss)(jnp.asarray(TEACHER)))


def test_labels_stay_within_their_segment():
    tokens = jnp.array([[5, 6, 7, 8, 9, 0]])
    labels, mask = next_token_labels(tokens, jnp.array([[1, 1, 2, 2, 2, 0]]))
    assert mask.tolist() == [[True, False, True, True, False, False]]
    assert labels[mask].tolist() == [6, 8, 9]


def test_balance_loss_is_one_for_uniform_routing_and_e_for_collapse():
    valid = jnp.array([True] * 8 + [False] * 4)
    uniform = jnp.zeros((12, 4))
    ids = jnp.arange(24).reshape(12, 2) % 4
    np.testing.assert_allclose(balance_loss(uniform, ids, valid), 1, rtol=1e-6)
    collapsed = uniform.at[:, 2].set(50.0)
    np.testing.assert_allclose(balance_loss(collapsed, jnp.full((12, 2), 2), valid), 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "kl"}, "kind must be one of"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"lm_weight": 1.5}, r"lm_weight must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        distill_loss(STUDENT, TEACHER, LABELS, MASK, **change)
    with pytest.raises(ValueError, match="one shape"):
        distill_loss(STUDENT, TEACHER[:, :, :5], LABELS, MASK)
