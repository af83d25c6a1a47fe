"""The chunked loss against plain autodiff: values, gradients, dtypes, memory and shardings."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.losses import DistillOptions, TeacherTopK, distill_sums, teacher_top_k
from moe_jax.losses.head_loss import head_loss
from moe_jax.processes import make_mesh

TOKENS, WIDTH, VOCAB = 24, 6, 31
RNG = np.random.default_rng(0)
# Both computations add the same float32 products, in another order: sums of at most 31 terms,
# about 31 * 2^-24 = 2e-6 of the largest.
ROUNDING = 5e-6


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


HEAD = {"kernel": normal(WIDTH, VOCAB), "bias": normal(VOCAB)}
HIDDEN = normal(TOKENS, WIDTH)
PER_TOKEN = {
    "mask": jnp.asarray(RNG.random(TOKENS) < 0.8),
    "labels": jnp.asarray(RNG.integers(0, VOCAB, TOKENS)),
    "teacher": normal(TOKENS, WIDTH),
}
TEACHER_HEAD = {"kernel": normal(WIDTH, VOCAB), "order": jnp.asarray(RNG.permutation(VOCAB))}


def distillation(kind="kd_full", lm_weight=0.25):
    """A loss whose constants hold integers: the teacher's vocabulary is in another order."""

    def loss(head, hidden, per_token, teacher_head):
        teacher = (per_token["teacher"] @ teacher_head["kernel"])[:, teacher_head["order"]]
        logits = hidden @ head["kernel"] + head["bias"]
        labels, mask = per_token["labels"], per_token["mask"]
        return distill_sums(
            logits, teacher, labels, mask, DistillOptions(kind, lm_weight=lm_weight)
        )

    return loss


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=ROUNDING, atol=ROUNDING * np.abs(b).max())


def value_and_gradients(sums, head=HEAD, hidden=HIDDEN):
    """Of a larger function of the total; the other sums as they are."""

    def scaled(head, hidden):
        result = sums(head, hidden)
        return 3 * result["total"] / result["positions"] + jnp.sum(hidden**2), result

    return jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True)(head, hidden)


@pytest.mark.parametrize("kind", ["kd_topk", "kd_full", "lm"])
@pytest.mark.parametrize("chunk_tokens", [0, 1, 7, 8, 24, 100])
def test_chunks_add_up_to_plain_autodiff(kind, chunk_tokens):
    loss = distillation(kind)
    expected = value_and_gradients(lambda *args: loss(*args, PER_TOKEN, TEACHER_HEAD))

    @jax.jit
    def chunked(head, hidden, per_token, teacher_head):
        def sums(head, hidden):
            return head_loss(loss, head, hidden, per_token, teacher_head, chunk_tokens=chunk_tokens)

        return value_and_gradients(sums, head, hidden), sums(head, hidden)

    differentiated, plain = chunked(HEAD, HIDDEN, PER_TOKEN, TEACHER_HEAD)
    assert_close(differentiated, expected)
    assert_close(plain, expected[0][1])


@functools.partial(jax.jit, static_argnames="chunk_tokens")
def total_and_gradients(mask, chunk_tokens):
    """``chunk_tokens`` None: plain autodiff."""
    loss, per_token = distillation(), PER_TOKEN | {"mask": mask}

    def total(head, hidden):
        arguments = (head, hidden, per_token, TEACHER_HEAD)
        if chunk_tokens is None:
            return loss(*arguments)["total"]
        return head_loss(loss, *arguments, chunk_tokens=chunk_tokens)["total"]

    return jax.value_and_grad(total, (0, 1))(HEAD, HIDDEN)


@given(arrays(bool, TOKENS), st.sampled_from([0, 5, 8]))
@settings(deadline=None)
def test_any_mask(mask, chunk_tokens):
    found = total_and_gradients(mask, chunk_tokens)
    assert_close(found, total_and_gradients(mask, None))
    assert not np.any(found[1][1][~mask])


def test_a_head_tied_to_the_embedding_gets_both_gradients():
    tokens = PER_TOKEN["labels"]
    loss = distillation()

    def total(embedding, chunk_tokens):
        head = {"kernel": embedding.T, "bias": HEAD["bias"]}
        arguments = (head, jnp.tanh(embedding[tokens]), PER_TOKEN, TEACHER_HEAD)
        if chunk_tokens is None:
            return loss(*arguments)["total"]
        return head_loss(loss, *arguments, chunk_tokens=chunk_tokens)["total"]

    embedding = HEAD["kernel"].T
    assert_close(jax.grad(total)(embedding, 5), jax.grad(total)(embedding, None))


def test_only_the_total_has_a_gradient_and_only_in_head_and_hidden():
    def sums(head, hidden, teacher, kernel):
        per_token, constants = PER_TOKEN | {"teacher": teacher}, TEACHER_HEAD | {"kernel": kernel}
        return head_loss(distillation(), head, hidden, per_token, constants, chunk_tokens=8)

    arguments = (HEAD, HIDDEN, PER_TOKEN["teacher"], TEACHER_HEAD["kernel"])
    of_total = jax.grad(lambda *a: sums(*a)["total"], range(4))(*arguments)
    assert [bool(np.any(jax.tree.leaves(g)[0])) for g in of_total] == [True, True, False, False]
    of_metric = jax.grad(lambda *a: sums(*a)["lm"], range(4))(*arguments)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_metric))


def test_a_cache_of_the_teacher_is_cut_into_chunks_too():
    cache = teacher_top_k(PER_TOKEN["teacher"] @ TEACHER_HEAD["kernel"], 8)
    per_token = {"mask": PER_TOKEN["mask"], "labels": PER_TOKEN["labels"], "cache": cache}

    def loss(head, hidden, per_token, constants):
        assert constants is None
        assert isinstance(per_token["cache"], TeacherTopK)
        logits = hidden @ head["kernel"] + head["bias"]
        return distill_sums(
            logits, per_token["cache"], per_token["labels"], per_token["mask"], DistillOptions()
        )

    found = value_and_gradients(lambda *a: head_loss(loss, *a, per_token, chunk_tokens=5))
    assert_close(found, value_and_gradients(lambda *a: loss(*a, per_token, None)))


def test_gradients_have_the_dtypes_of_the_weights_and_are_added_in_float32():
    """In bfloat16, of 8 significant bits, 256 + 1 = 256."""
    head = jnp.ones(WIDTH, jnp.bfloat16)
    hidden = jnp.ones((TOKENS, WIDTH), jnp.bfloat16).at[0].set(256)

    def loss(head, hidden, per_token, constants):
        return {"total": jnp.dot(hidden, head, preferred_element_type=jnp.float32).sum()}

    def total(head, hidden):
        return head_loss(loss, head, hidden, PER_TOKEN, chunk_tokens=1)["total"]

    by_head, by_hidden = jax.grad(total, (0, 1))(head, hidden)
    assert by_head.dtype == by_hidden.dtype == jnp.bfloat16
    np.testing.assert_array_equal(by_head, jnp.full(WIDTH, 256 + TOKENS - 1, jnp.bfloat16))
    np.testing.assert_array_equal(by_hidden, jnp.ones_like(hidden))


def test_the_backward_pass_only_scales():
    def total(head, hidden):
        return head_loss(distillation(), head, hidden, PER_TOKEN, TEACHER_HEAD, chunk_tokens=8)

    sums, backward = jax.vjp(total, HEAD, HIDDEN)
    program = str(jax.make_jaxpr(backward)(sums))
    assert "mul" in program
    assert not any(name in program for name in ("dot_general", "scan", "while", "exp"))


def temporary_bytes(chunk_tokens, tokens=2048, width=4, vocab=1024):
    """What the compiled loss and its gradients need beside arguments and results."""

    def total(head, hidden, per_token, teacher_head):
        def loss(head, hidden, per_token, teacher_head):
            logits, teacher = hidden @ head, per_token["teacher"] @ teacher_head
            return distill_sums(
                logits, teacher, per_token["labels"], per_token["mask"], DistillOptions("kd_full")
            )

        arguments = (head, hidden, per_token, teacher_head)
        return head_loss(loss, *arguments, chunk_tokens=chunk_tokens)["total"]

    head, states = (jax.ShapeDtypeStruct(s, "float32") for s in ((width, vocab), (tokens, width)))
    per_token = {
        "mask": jax.ShapeDtypeStruct((tokens,), "bool"),
        "labels": jax.ShapeDtypeStruct((tokens,), "int32"),
        "teacher": states,
    }
    lowered = jax.jit(jax.value_and_grad(total, (0, 1))).lower(head, states, per_token, head)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_shrinks_with_the_chunk():
    whole = temporary_bytes(0)
    logits = 4 * 2048 * 1024
    assert whole >= 2 * logits  # the student's and the teacher's
    for parts in (4, 16):
        assert temporary_bytes(2048 // parts) < 1.25 * whole / parts


def test_tokens_sharded_over_devices_stay_where_they_are():
    mesh = make_mesh({"data": 8})
    tokens = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())

    @jax.jit
    def gradients(head, hidden, per_token, teacher_head):
        def sums(head, hidden):
            arguments = (head, hidden, per_token, teacher_head)
            return head_loss(distillation(), *arguments, chunk_tokens=8)

        return value_and_gradients(sums, head, hidden)

    arguments = (
        jax.device_put(HEAD, everywhere),
        jax.device_put(HIDDEN, tokens),
        jax.device_put(PER_TOKEN, tokens),
        jax.device_put(TEACHER_HEAD, everywhere),
    )
    assert_close(gradients(*arguments), gradients(HEAD, HIDDEN, PER_TOKEN, TEACHER_HEAD))
    program = gradients.lower(*arguments).compile().as_text()
    assert "all-reduce(" in program
    assert not any(f"{name}(" in program for name in ("all-gather", "all-to-all"))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"chunk_tokens": -1}, "chunk_tokens must be at least 0, got -1"),
        ({"mask": None}, {}, "must hold a boolean 'mask'"),
        ({"mask": jnp.ones(TOKENS)}, {}, "must hold a boolean 'mask'"),
        ({"labels": PER_TOKEN["labels"][1:]}, {}, "must have leading axes 24"),
    ],
)
def test_bad_arguments_are_refused(change, options, message):
    with pytest.raises(ValueError, match=message):
        head_loss(distillation(), HEAD, HIDDEN, PER_TOKEN | change, TEACHER_HEAD, **options)


def test_a_loss_without_a_total_is_refused():
    with pytest.raises(ValueError, match=r"loss must return a 'total', got \['lm'\]"):
        head_loss(lambda *_: {"lm": jnp.zeros(())}, HEAD, HIDDEN, PER_TOKEN)
