"""Losses against float64 NumPy, finite differences and optax; their masks, zeros and limits."""

from __future__ import annotations

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe_jax.losses import (
    DistillKind,
    DistillOptions,
    TeacherTopK,
    balance_loss,
    cross_entropy,
    distill_loss,
    distill_sums,
    forward_kl,
    hidden_distance,
    jensen_shannon,
    next_token_labels,
    reverse_kl,
    router_kl,
    teacher_top_k,
    top_k_cross_entropy,
)

KINDS = get_args(DistillKind)
DIVERGENCES = ("kd_topk_both", "kd_full", "reverse_kl", "jensen_shannon")
TOP_K = ("kd_topk", "kd_topk_renormalized", "kd_topk_both")
VOCAB, K, BETA = 23, 8, 0.3
RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.standard_normal((2, 2, 5, VOCAB)).astype(np.float32) * 3
LABELS = RNG.integers(0, VOCAB, (2, 5))
MASK = RNG.random((2, 5)) < 0.7
MASKS = arrays(bool, MASK.shape)


def log_softmax(logits, temperature=1.0):
    logits = logits.astype(np.float64) / temperature
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def kl(log_p, log_q):
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def reference(kind, student=STUDENT, temperature=1.0, mask=MASK):
    """Sum over the mask, in float64."""
    if kind == "lm":
        return -np.take_along_axis(log_softmax(student), LABELS[..., None], -1)[mask].sum()
    log_p, log_q = log_softmax(TEACHER, temperature), log_softmax(student, temperature)
    top = np.argsort(-TEACHER, -1)[..., :K]
    top_p, top_q = (np.take_along_axis(a, top, -1) for a in (log_p, log_q))
    log_m = np.log(BETA * np.exp(log_p) + (1 - BETA) * np.exp(log_q))
    loss = {
        "kd_topk": -(np.exp(top_p) * top_q).sum(-1),
        "kd_topk_renormalized": -(np.exp(log_softmax(top_p)) * top_q).sum(-1),
        "kd_topk_both": kl(log_softmax(top_p), log_softmax(top_q)),
        "kd_full": kl(log_p, log_q),
        "reverse_kl": kl(log_q, log_p),
        "jensen_shannon": BETA * kl(log_p, log_m) + (1 - BETA) * kl(log_q, log_m),
    }[kind]
    return temperature**2 * loss[mask].sum()


def sums(kind, student=STUDENT, teacher=TEACHER, labels=LABELS, mask=MASK, **options):
    how = DistillOptions(kind, K, beta=BETA, **options)
    return distill_sums(jnp.asarray(student), teacher, labels, mask, how)


def gradient(kind, student=STUDENT, *args, **options):
    return jax.grad(lambda x: sums(kind, x, *args, **options)["total"])(jnp.asarray(student))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_losses_equal_float64(kind, temperature):
    options = {"kind": kind, "temperature": temperature, "beta": BETA}
    loss, metrics = distill_loss(STUDENT, TEACHER, LABELS, MASK, **options)
    expected, lm = reference(kind, temperature=temperature) / MASK.sum(), reference("lm")
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    assert metrics["positions"] == MASK.sum()
    mixed, metrics = distill_loss(STUDENT, TEACHER, LABELS, MASK, **options, lm_weight=0.25)
    np.testing.assert_allclose(mixed, 0.75 * expected + 0.25 * lm / MASK.sum(), rtol=2e-6)
    assert metrics["loss"] == mixed
    np.testing.assert_allclose(metrics["distill"], expected, rtol=2e-6)
    np.testing.assert_allclose(metrics["lm"], lm / MASK.sum(), rtol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradients_equal_finite_differences(kind, temperature):
    expected = np.zeros(STUDENT.shape)
    student, step = STUDENT.astype(np.float64), 1e-5
    for entry in np.ndindex(*STUDENT.shape):
        change = np.zeros_like(student)
        change[entry] = step
        high, low = (reference(kind, student + d, temperature) for d in (change, -change))
        expected[entry] = (high - low) / (2 * step)
    found = gradient(kind, temperature=temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-6)


def test_losses_equal_optax():
    total, count = cross_entropy(STUDENT, LABELS, MASK)
    theirs = optax.softmax_cross_entropy_with_integer_labels(STUDENT, LABELS)
    np.testing.assert_allclose(total, theirs[MASK].sum(), rtol=1e-6)
    assert count == MASK.sum()
    log_q, log_p = jax.nn.log_softmax(STUDENT), jax.nn.log_softmax(TEACHER)
    divergence = optax.losses.kl_divergence_with_log_targets
    theirs = divergence(log_q, log_p)[MASK].sum()
    np.testing.assert_allclose(forward_kl(STUDENT, TEACHER, MASK)[0], theirs, rtol=1e-5)
    theirs = optax.losses.kl_divergence(log_p, jnp.exp(log_q))[MASK].sum()
    np.testing.assert_allclose(reverse_kl(STUDENT, TEACHER, MASK)[0], theirs, rtol=1e-5)
    log_m = jnp.log((jnp.exp(log_p) + jnp.exp(log_q)) / 2)
    theirs = (divergence(log_m, log_p) + divergence(log_m, log_q))[MASK].sum() / 2
    np.testing.assert_allclose(jensen_shannon(STUDENT, TEACHER, MASK)[0], theirs, rtol=1e-5)
    top, ids = jax.lax.top_k(log_p, K)
    targets = jnp.put_along_axis(jnp.zeros_like(log_p), ids, jnp.exp(top), -1, inplace=False)
    theirs = optax.softmax_cross_entropy(STUDENT, targets)[MASK].sum()
    np.testing.assert_allclose(top_k_cross_entropy(STUDENT, TEACHER, MASK)[0], theirs, rtol=1e-5)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_vanish_where_student_and_teacher_agree(kind, temperature):
    # A constant added to a position's logits changes no distribution.
    for student in (TEACHER, TEACHER + LABELS[..., None]):
        assert abs(sums(kind, student, temperature=temperature)["total"]) < 2e-5
        assert np.abs(gradient(kind, student, temperature=temperature)).max() < 5e-6


def test_the_gradient_of_kd_topk_does_not_vanish_where_student_and_teacher_agree():
    """The trap of importance scoring: only kd_topk still says something about the teacher."""
    p = np.exp(log_softmax(TEACHER))
    kept = np.where(p >= np.sort(p, -1)[..., [-K]], p, 0)
    expected = (kept.sum(-1, keepdims=True) * p - kept) * MASK[..., None]
    np.testing.assert_allclose(gradient("kd_topk", TEACHER), expected, atol=1e-6)
    assert np.abs(expected).max() > 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_the_teacher(kind):
    assert not np.any(jax.grad(lambda t: sums(kind, teacher=t)["total"])(jnp.asarray(TEACHER)))
    if kind in TOP_K:
        ids, log_probs = teacher_top_k(jnp.asarray(TEACHER), K)
        of_cache = jax.grad(lambda a: sums(kind, teacher=TeacherTopK(ids, a))["total"])
        assert not np.any(of_cache(log_probs))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lm"])
def test_scaling_logits_with_the_temperature_scales_the_loss_by_its_square(kind):
    scaled = sums(kind, 3 * STUDENT, 3 * TEACHER, temperature=3.0)["distill"]
    np.testing.assert_allclose(scaled, 9 * sums(kind)["distill"], rtol=1e-5)


def test_at_a_high_temperature_distillation_matches_logits():
    """Hinton et al., section 2.1: T^2 KL tends to half the mean square distance of the logits."""
    centred = (STUDENT - TEACHER) - (STUDENT - TEACHER).mean(-1, keepdims=True)
    found = gradient("kd_full", temperature=1000.0)
    expected = np.where(MASK[..., None], centred / VOCAB, 0)
    np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())


@given(st.floats(0.01, 0.99))
@settings(max_examples=20, deadline=None)
def test_jensen_shannon_is_symmetric_and_bounded(beta):
    loss, count = jensen_shannon(STUDENT, TEACHER, MASK, beta)
    swapped, _ = jensen_shannon(TEACHER, STUDENT, MASK, 1 - beta)
    np.testing.assert_allclose(loss, swapped, rtol=1e-5)
    # The entropy of beta, reached by distributions that never overlap; ln 2 at one half.
    bound = -beta * np.log(beta) - (1 - beta) * np.log(1 - beta)
    assert 0 < loss < bound * count
    apart, count = jensen_shannon(60 * np.eye(6)[:3], 60 * np.eye(6)[3:], np.full(3, True), beta)
    np.testing.assert_allclose(apart, bound * count, rtol=1e-5)


def test_jensen_shannon_tends_to_both_kl_divergences():
    for beta, kind in ((1e-4, "kd_full"), (1 - 1e-4, "reverse_kl")):
        loss, _ = jensen_shannon(STUDENT, TEACHER, MASK, beta)
        np.testing.assert_allclose(loss / min(beta, 1 - beta), reference(kind), rtol=0.02)


@given(MASKS, MASKS)
@settings(max_examples=10, deadline=None)
def test_parts_of_a_mask_add_up(mask, half):
    for kind in KINDS:
        whole = sums(kind, mask=mask, lm_weight=0.5)
        parts = [sums(kind, mask=mask & part, lm_weight=0.5) for part in (half, ~half)]
        np.testing.assert_allclose(whole["total"], reference_mixed(kind, mask), rtol=1e-5)
        for name in whole:
            added = parts[0][name] + parts[1][name]
            np.testing.assert_allclose(whole[name], added, rtol=1e-5)


def reference_mixed(kind, mask):
    return (reference(kind, mask=mask) + reference("lm", mask=mask)) / 2


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_positions_may_hold_anything(kind, garbage):
    def spoil(values, garbage=garbage):
        shape = MASK.shape + (1,) * (values.ndim - 2)
        return jnp.where(MASK.reshape(shape), values, garbage)

    teachers = [(TEACHER, spoil(TEACHER))]
    if kind in TOP_K:
        ids, log_probs = clean = teacher_top_k(jnp.asarray(TEACHER), K)
        teachers.append((clean, TeacherTopK(spoil(ids, 10**6), spoil(log_probs))))
    for clean, spoilt in teachers:
        options = {"mask": MASK, "lm_weight": 0.5}
        expected = sums(kind, teacher=clean, **options)
        found = sums(kind, spoil(STUDENT), spoilt, spoil(LABELS, -100), **options)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])
        np.testing.assert_array_equal(
            gradient(kind, spoil(STUDENT), spoilt, spoil(LABELS, -100), **options),
            gradient(kind, STUDENT, clean, **options),
        )


def test_an_empty_mask_gives_zero():
    empty = np.zeros_like(MASK)
    for kind in KINDS:
        loss, metrics = distill_loss(STUDENT, TEACHER, LABELS, empty, kind=kind)
        assert loss == metrics["positions"] == 0
        assert not np.any(gradient(kind, mask=empty))


@pytest.mark.parametrize("kind", TOP_K)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_cache_of_the_teacher_serves_as_its_logits(kind, temperature):
    cache = teacher_top_k(jnp.asarray(TEACHER), K + 3)
    np.testing.assert_array_equal(cache.ids, np.argsort(-TEACHER, -1)[..., : K + 3])
    expected = np.take_along_axis(log_softmax(TEACHER), np.asarray(cache.ids), -1)
    np.testing.assert_allclose(cache.log_probs, expected, rtol=1e-5, atol=1e-6)
    if kind == "kd_topk" and temperature != 1:
        with pytest.raises(ValueError, match=r"needs temperature = 1, got 2.5: the mass"):
            sums(kind, teacher=cache, temperature=temperature)
        return
    found = sums(kind, teacher=cache, temperature=temperature)["total"]
    np.testing.assert_allclose(found, reference(kind, temperature=temperature), rtol=1e-5)
    np.testing.assert_allclose(
        gradient(kind, STUDENT, cache, temperature=temperature),
        gradient(kind, temperature=temperature),
        atol=1e-5,
    )


def test_bfloat16_logits_lose_nothing_more():
    """All arithmetic is in float32, whatever the dtype of the logits."""
    student, teacher = (jnp.asarray(a, jnp.bfloat16) for a in (STUDENT, TEACHER))
    wide = [a.astype(jnp.float32) for a in (student, teacher)]
    for kind in KINDS:
        found = sums(kind, student, teacher)
        assert found["total"].dtype == jnp.float32
        np.testing.assert_allclose(found["total"], sums(kind, *wide)["total"], rtol=1e-6)


def test_labels_alone_need_no_teacher():
    np.testing.assert_allclose(sums("lm", teacher=None)["total"], reference("lm"), rtol=1e-6)
    cache = teacher_top_k(jnp.asarray(TEACHER), 2)
    assert sums("lm", teacher=cache)["total"] == sums("lm")["total"]


STATES = RNG.standard_normal((2, 6, 7)).astype(np.float32)
VALID = np.array([True, True, False, True, True, False])


def test_hidden_distance_is_relative_and_per_token():
    s, t = STATES
    total, count = hidden_distance(s, t, VALID)
    ratios = ((s - t).astype(np.float64) ** 2).sum(-1) / (t.astype(np.float64) ** 2).sum(-1)
    np.testing.assert_allclose(total, ratios[VALID].sum(), rtol=1e-5)
    assert count == 4
    scale = np.float32([[1], [10], [1], [100], [3], [1]])
    np.testing.assert_allclose(hidden_distance(s * scale, t * scale, VALID)[0], total, rtol=1e-5)
    assert hidden_distance(t, t, VALID)[0] == 0
    assert hidden_distance(np.zeros_like(t), np.zeros_like(t), VALID)[0] == 0


def test_router_kl_is_that_of_the_softmaxes():
    s, t = STATES
    expected = kl(log_softmax(t), log_softmax(s))[VALID].sum()
    np.testing.assert_allclose(router_kl(s, t, VALID)[0], expected, rtol=1e-5)
    assert router_kl(t, t, VALID)[0] == 0


@pytest.mark.parametrize("loss", [hidden_distance, router_kl])
def test_losses_of_layers_obey_mask_and_teacher(loss):
    s, t = STATES
    spoilt = np.where(VALID[:, None], STATES, np.nan)
    by_student, by_teacher = jax.grad(lambda s, t: loss(s, t, VALID)[0], (0, 1))(*spoilt)
    np.testing.assert_array_equal(by_student, jax.grad(lambda s: loss(s, t, VALID)[0])(s))
    assert np.isfinite(by_student).all()
    assert not np.any(by_teacher)
    halves = [loss(s, t, VALID & half)[0] for half in (np.arange(6) < 3, np.arange(6) >= 3)]
    np.testing.assert_allclose(loss(s, t, VALID)[0], sum(halves), rtol=1e-6)
    with pytest.raises(ValueError, match=r"must have one shape, got \(6, 7\) and \(6, 5\)"):
        loss(s, t[:, :5], VALID)


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
    collapsed_ids = jnp.full((12, 2), 2)
    np.testing.assert_allclose(balance_loss(collapsed, collapsed_ids, valid), 4, rtol=1e-6)
    padded = collapsed.at[8:].set(jnp.nan)
    slope = jax.grad(lambda logits: balance_loss(logits, collapsed_ids, valid))(padded)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "kl"}, "kind must be one of"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"temperature": 0.0}, r"temperature must be in \(0, inf\), got 0.0"),
        ({"temperature": np.inf}, r"temperature must be in \(0, inf\), got inf"),
        ({"temperature": np.nan}, r"temperature must be in \(0, inf\), got nan"),
        ({"beta": 0.0}, r"beta must be in \(0, 1\), got 0.0"),
        ({"beta": 1.0}, r"beta must be in \(0, 1\), got 1.0"),
        ({"lm_weight": 1.5}, r"lm_weight must be in \[0, 1\], got 1.5"),
        ({"lm_weight": np.nan}, r"lm_weight must be in \[0, 1\], got nan"),
    ],
)
def test_bad_options_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DistillOptions(**change)
    with pytest.raises(ValueError, match=message):
        distill_loss(STUDENT, TEACHER, LABELS, MASK, **change)


@pytest.mark.parametrize(
    ("kind", "top_k", "message"),
    [(kind, 4, f"'{kind}' needs the teacher's whole") for kind in DIVERGENCES if kind not in TOP_K]
    + [(kind, 5, r"top_k must be in \[1, cached = 4\], got 5") for kind in TOP_K],
)
def test_a_cache_that_cannot_serve_is_refused(kind, top_k, message):
    cache = teacher_top_k(jnp.asarray(TEACHER), 4)
    with pytest.raises(ValueError, match=message):
        distill_loss(STUDENT, cache, LABELS, MASK, kind=kind, top_k=top_k)
    with pytest.raises(ValueError, match=message):
        DistillOptions(kind, top_k).check_cached(4)


def test_bad_arrays_are_refused():
    cache = teacher_top_k(jnp.asarray(TEACHER), 8)
    for teacher, message in (
        (TEACHER[:, :, :5], "logits must have one shape"),
        (None, "'kd_topk' needs a teacher, got None"),
        (TeacherTopK(cache.ids, cache.log_probs[:, 1:]), "top k must have shape"),
        (TeacherTopK(cache.ids[1:], cache.log_probs[1:]), "top k must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            distill_loss(STUDENT, teacher, LABELS, MASK)
    with pytest.raises(ValueError, match="labels and mask must have shape"):
        distill_loss(STUDENT, TEACHER, LABELS, MASK[..., None])
    with pytest.raises(ValueError, match=r"top_k must be in \[1, vocabulary = 23\], got 24"):
        distill_loss(STUDENT, TEACHER, LABELS, MASK, top_k=24)
    # Kinds that keep no top k do not mind.
    distill_loss(STUDENT, TEACHER, LABELS, MASK, kind="kd_full", top_k=24)
