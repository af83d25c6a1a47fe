"""The training loop: what it minimises, that it learns, resumes to the bit, and how it stops."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import VOCAB, tiny_config, tiny_model

from moe_jax.checkpoint import TrainingCheckpoints
from moe_jax.distill import Stopped, TrainingRun, TrainSettings, train
from moe_jax.distill.objective import objective
from moe_jax.distill.step import (
    arranged,
    initial_state,
    join_trained,
    make_optimizer,
    make_step,
    result_of,
    split_trained,
)
from moe_jax.interruption import Interruption
from moe_jax.losses import distill_loss, hidden_distance, next_token_labels, router_kl
from moe_jax.metrics import read_metrics
from moe_jax.model import forward, init_params
from moe_jax.params import (
    abstract_params,
    leaves_like,
    leaves_with_path,
    path_name,
    stack_layers,
    unstack_layers,
)
from moe_jax.processes import make_mesh, on_mesh_of, place_batch, spec_tree

SETTINGS = TrainSettings(
    steps=8,
    loss="lm",
    learning_rate=3e-2,
    warmup_steps=1,
    balance_weight=0.01,
    checkpoint_every=3,
    log_every=1,
)
# Summation order differs between layouts of the same float32 computation on tiny models.
ROUNDING = {"rtol": 2e-4, "atol": 2e-6}


def dataset(batch_size: int = 2):
    """Sixteen rows of text that repeats itself, in batches, forever."""
    rng = np.random.default_rng(0)
    rows = np.tile(rng.integers(0, VOCAB, (16, 4)), (1, 4)).astype(np.int32)
    source = grain.MapDataset.source(rows).shuffle(seed=0).repeat().batch(batch_size)
    packed = source.map(lambda tokens: {"tokens": tokens, "segment_ids": np.ones_like(tokens)})
    return packed.to_iter_dataset()


def padded_batch(rows: int = 4, length: int = 12) -> dict[str, jax.Array]:
    """Rows of two documents with padding at the end."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, VOCAB, (rows, length)).astype(np.int32)
    segment_ids = np.ones_like(tokens)
    for row, (first, end) in enumerate(zip([5, 3, 12, 7], [12, 9, 12, 11], strict=True)):
        segment_ids[row, first:] = 2
        segment_ids[row, end:] = 0
    return {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(segment_ids)}


def other_model(family: str = "phimoe"):
    """A teacher that is not the student."""
    config = tiny_config(family)
    return init_params(config, jax.random.key(9)), config


def assert_same(a, b):
    for (path, x), (_, y) in zip(leaves_with_path(a), leaves_with_path(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path_name(path))


def assert_close(a, b, **tolerance):
    for (path, x), (_, y) in zip(leaves_with_path(a), leaves_with_path(b), strict=True):
        np.testing.assert_allclose(x, y, err_msg=path_name(path), **(tolerance or ROUNDING))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    params, config = tiny_model("phimoe")
    folder = tmp_path_factory.mktemp("whole")
    return train(params, config, dataset(), SETTINGS, TrainingRun(folder)), folder


def test_training_learns(uninterrupted):
    _, folder = uninterrupted
    records = read_metrics(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    losses = [record["lm"] for record in records]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.2


def test_distillation_brings_the_student_to_its_teacher(tmp_path):
    params, config = tiny_model("phimoe")
    settings = dataclasses.replace(SETTINGS, steps=24, loss="kd_full", balance_weight=0.0)
    train(params, config, dataset(), settings, TrainingRun(tmp_path), teacher=other_model())
    divergence = [record["distill"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert np.mean(divergence[-4:]) < 0.6 * np.mean(divergence[:4])


class Batches:
    """Those of ``dataset()``, each as ``change(step, batch)`` gives it."""

    def __init__(self, change: Callable[[int, dict], dict]) -> None:
        self.change = change

    def __iter__(self):
        iterator = Batches(self.change)
        iterator.batches, iterator.taken = iter(dataset()), 0
        iterator.get_state = iterator.batches.get_state
        iterator.set_state = iterator.batches.set_state
        return iterator

    def __next__(self) -> dict:
        self.taken += 1
        return self.change(self.taken, next(self.batches))


def test_resumed_equals_uninterrupted_to_the_bit(uninterrupted, tmp_path):
    """Stopped after step 5: goes on from the checkpoint of step 3, data position included."""
    params, config = tiny_model("phimoe")

    def interrupt(step, batch):
        if step == 6:
            raise KeyboardInterrupt
        return batch

    with pytest.raises(KeyboardInterrupt):
        train(params, config, Batches(interrupt), SETTINGS, TrainingRun(tmp_path))
    state, _ = initial_state(params, config, SETTINGS)
    with TrainingCheckpoints(tmp_path / "checkpoints") as checkpoints:
        restored, _ = checkpoints.restore(state)
    assert int(restored["step"]) == 3
    other_start = jax.tree.map(lambda leaf: leaf * 0, params)
    resumed = train(other_start, config, dataset(), SETTINGS, TrainingRun(tmp_path))
    assert_same(resumed, uninterrupted[0])
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [r["loss"] for r in records] == [
        r["loss"] for r in read_metrics(uninterrupted[1] / "metrics.jsonl")
    ]


def test_sigterm_saves_and_the_run_goes_on_to_the_same_bits(uninterrupted, tmp_path):
    params, config = tiny_model("phimoe")
    handler = signal.getsignal(signal.SIGTERM)

    def stop(step, batch):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    with pytest.raises(Stopped, match="after step 5 of 8") as stopped:
        train(params, config, Batches(stop), SETTINGS, TrainingRun(tmp_path))
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    again = train(params, config, dataset(), SETTINGS, TrainingRun(tmp_path))
    assert_same(again, uninterrupted[0])


def test_a_sigterm_that_comes_too_late_is_for_what_follows():
    """A run that is done anyway: whoever called it hears of the signal."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("sigterm"))
    try:
        with Interruption():
            os.kill(os.getpid(), signal.SIGTERM)
        assert heard == ["sigterm"]
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGTERM)
            interruption.obeyed = True
        assert heard == ["sigterm"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    """The step is named even if nobody looks at its loss before the next checkpoint."""
    params, config = tiny_model("phimoe")
    settings = dataclasses.replace(SETTINGS, log_every=100, loss="kd_topk_both", top_k=2)

    def taught(step, batch):
        log_probs = np.full((2, 16, 2), np.nan if step == 5 else np.log(0.5), np.float32)
        ids = np.tile(np.array([3, 4], np.int32), (2, 16, 1))
        return {**batch, "teacher_ids": ids, "teacher_log_probs": log_probs}

    with pytest.raises(FloatingPointError, match="loss or the gradient of step 5 is not finite"):
        train(params, config, Batches(taught), settings, TrainingRun(tmp_path))
    state, _ = initial_state(params, config, settings)
    with TrainingCheckpoints(tmp_path / "checkpoints") as checkpoints:
        restored, _ = checkpoints.restore(state)
    assert int(restored["step"]) == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored["params"]))


def test_a_broken_step_changes_no_weight():
    params, config = tiny_model("phimoe")
    settings = dataclasses.replace(SETTINGS, scan_layers=False)
    state, frozen = initial_state(params, config, settings)
    state["params"]["final_norm"]["scale"] = (
        state["params"]["final_norm"]["scale"].at[0].set(np.inf)
    )
    before = jax.tree.map(np.asarray, state["params"])
    new, _ = make_step(config, settings)(state, frozen, None, next(iter(dataset())))
    assert_same(new["params"], before)
    assert int(new["broken_step"]) == int(new["step"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e-3}, "learning_rate: 0.03 there, 0.001 here"),
        ({"seed": 5}, "seed: 0 there, 5 here"),
    ],
)
def test_a_resumption_with_other_settings_names_them(uninterrupted, change, message):
    params, config = tiny_model("phimoe")
    with pytest.raises(ValueError, match=message):
        train(
            params,
            config,
            dataset(),
            dataclasses.replace(SETTINGS, **change),
            TrainingRun(uninterrupted[1]),
        )


def test_a_resumption_with_another_start_names_it(uninterrupted):
    params, config = tiny_model("phimoe")
    run = TrainingRun(uninterrupted[1], facts={"plan": "x"})
    with pytest.raises(ValueError, match="plan: None there, 'x' here"):
        train(params, config, dataset(), SETTINGS, run)


def test_bookkeeping_may_change(uninterrupted):
    params, config = tiny_model("phimoe")
    settings = dataclasses.replace(SETTINGS, log_every=7, checkpoint_every=1)
    assert_same(
        train(params, config, dataset(), settings, TrainingRun(uninterrupted[1])), uninterrupted[0]
    )


KD = {
    "full": {"loss": "kd_full", "temperature": 2.0},
    "top": {"loss": "kd_topk", "top_k": 3, "lm_weight": 0.3},
    "states": {"loss": "reverse_kl", "hidden_weight": 0.7, "router_weight": 0.4},
}


@pytest.mark.parametrize("name", KD)
@pytest.mark.parametrize("changes", [{}, {"chunk_tokens": 7}, {"remat": True}], ids=str)
def test_objective_equals_the_plain_losses(name, changes):
    """Chunked, stacked and rematerialised against whole logits of unrolled models."""
    params, config = tiny_model("phimoe")
    teacher, _ = other_model()
    batch = padded_batch()
    labels, mask = next_token_labels(batch["tokens"], batch["segment_ids"])
    settings = TrainSettings(steps=1, warmup_steps=0, sample_routing=False, **KD[name], **changes)
    taps = ("router_logits", "layer_output")
    expected_logits, expected = jax.jit(lambda p: forward(p, config, *batch.values(), taps))(
        teacher
    )

    def plain(params):
        logits, aux = forward(params, config, *batch.values(), taps)
        loss, _ = distill_loss(
            logits,
            expected_logits,
            labels,
            mask,
            kind=settings.loss,
            top_k=settings.top_k,
            temperature=settings.temperature,
            lm_weight=settings.lm_weight,
        )
        for mine, theirs in zip(aux["layers"], expected["layers"], strict=True):
            pair = [side["layer_output"].reshape(-1, config.width) for side in (mine, theirs)]
            hidden, count = hidden_distance(*pair, mask.reshape(-1))
            router, _ = router_kl(mine["router_logits"], theirs["router_logits"], mask.reshape(-1))
            weighted = settings.hidden_weight * hidden + settings.router_weight * router
            loss += weighted / count / config.num_layers
        return loss

    def ours(params):
        return objective(
            stack_layers(params), config, batch, None, settings, mask.sum(), (teacher, config)
        )[0]

    value, gradient = jax.jit(jax.value_and_grad(ours))(params)
    expected_value, expected_gradient = jax.jit(jax.value_and_grad(plain))(params)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


def test_at_the_teacher_true_divergences_and_their_gradients_vanish():
    params, config = tiny_model("phimoe")
    settings = TrainSettings(
        steps=1,
        warmup_steps=0,
        loss="kd_full",
        hidden_weight=1.0,
        router_weight=1.0,
        sample_routing=False,
    )
    state, frozen = initial_state(params, config, settings)
    step = make_step(config, settings, config)
    _, metrics = step(state, frozen, stack_layers(params), padded_batch())
    for name in ("loss", "distill", "hidden", "router"):
        assert abs(metrics[name]) < 1e-6, name
    assert metrics["gradient_norm"] < 1e-5


@pytest.mark.parametrize("family", ["olmoe", "phimoe"])
def test_scanned_layers_equal_unrolled_ones(family):
    """Losses and gradients, with sampled routing, whose draws must be the same."""
    params, config = tiny_model(family)
    settings = dataclasses.replace(SETTINGS, steps=1, loss="kd_full")
    batch, rng = padded_batch(), jax.random.key(2)
    teacher, _ = other_model(family)

    def value(params, teacher):
        return objective(params, config, batch, rng, settings, 20.0, (teacher, config))[0]

    loss, gradient = jax.value_and_grad(value)(params, teacher)
    scanned_loss, scanned = jax.value_and_grad(value)(stack_layers(params), stack_layers(teacher))
    np.testing.assert_allclose(scanned_loss, loss, rtol=1e-5)
    assert_close(unstack_layers(scanned), gradient, rtol=1e-3, atol=1e-5)


def test_stacking_is_lossless():
    params, _ = tiny_model("olmoe")
    assert_same(unstack_layers(stack_layers(params)), params)


def run_steps(settings, batches, mesh=None, teacher=None):
    """Trained weights and the losses of some steps."""
    params, config = tiny_model("phimoe")
    if mesh is not None:
        specs = spec_tree(config, mesh)
        params = jax.device_put(params, specs)
        teacher = teacher and jax.device_put(teacher, specs)
    state, frozen = initial_state(params, config, settings)
    step = make_step(config, settings, config if teacher else None, mesh and state)
    teacher = arranged(teacher, config, settings) if teacher else None
    losses, states = [], []
    for batch in batches:
        with on_mesh_of(params):
            state, metrics = step(state, frozen, teacher, place_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
        states.append(jax.tree.map(np.asarray, state["params"]))
    return result_of(state, frozen), losses, states, state


def some_batches(count: int = 2) -> list:
    iterator = iter(dataset(4))
    return [next(iterator) for _ in range(count)]


STEPPING = TrainSettings(
    steps=4, warmup_steps=0, loss="kd_topk", sample_routing=False, compute_dtype="float32"
)


def test_micro_batches_add_up_to_the_batch():
    teacher, _ = other_model()
    uneven = [padded_batch(), padded_batch()]
    whole = run_steps(STEPPING, uneven, teacher=teacher)
    pieces = run_steps(dataclasses.replace(STEPPING, accumulation=4), uneven, teacher=teacher)
    np.testing.assert_allclose(pieces[1], whole[1], rtol=1e-5)
    # Adam divides by the root of the squared gradient: rounding counts where that is tiny.
    assert_close(pieces[0], whole[0], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("shape", [{"data": 2, "fsdp": 2, "expert": 2}], ids=str)
def test_sharded_equals_single_device(shape):
    teacher, _ = other_model()
    single = run_steps(STEPPING, some_batches(), teacher=teacher)
    sharded = run_steps(STEPPING, some_batches(), make_mesh(shape), teacher)
    np.testing.assert_allclose(sharded[1], single[1], rtol=1e-5)
    assert_close(sharded[0], single[0], rtol=1e-3, atol=2e-5)
    experts = sharded[3]["optimizer"][1][0].mu["layers"]["moe"]["experts"]["gate"]
    assert experts.sharding == sharded[3]["params"]["layers"]["moe"]["experts"]["gate"].sharding


@pytest.mark.parametrize(
    ("trainable", "names"),
    [
        ("router", {"router"}),
        ("experts", {"experts"}),
        (("attention", "norms"), {"attention", "attention_norm", "mlp_norm", "final_norm"}),
        (("embedding", "head"), {"embed", "lm_head"}),
    ],
)
def test_only_what_is_named_trains(trainable, names):
    params, _ = tiny_model("phimoe")
    settings = dataclasses.replace(STEPPING, trainable=trainable, loss="lm", steps=4)
    trained, _, _, state = run_steps(settings, some_batches(1))
    changed = set()
    for (path, new), (_, old) in zip(
        leaves_with_path(trained), leaves_with_path(params), strict=True
    ):
        belongs = any(part in names for part in path)
        if not belongs:
            np.testing.assert_array_equal(new, old, err_msg=path_name(path))
        elif (np.asarray(new) != np.asarray(old)).any():
            changed.update(set(path) & names)
    assert changed == names
    moments = state["optimizer"][1][0].mu
    assert sum(x.size for x in jax.tree.leaves(moments)) == sum(
        leaf.size for path, leaf in leaves_with_path(params) if any(p in names for p in path)
    )


def test_the_moving_average_follows_its_recursion():
    settings = dataclasses.replace(STEPPING, loss="lm", ema_decay=0.75)
    result, _, states, _ = run_steps(settings, some_batches(3))
    expected = stack_layers(tiny_model("phimoe")[0])
    for state in states:
        expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, expected, state)
    assert_close(result, unstack_layers(expected), rtol=1e-5, atol=1e-6)


def test_vectors_are_not_decayed():
    """With no gradient, AdamW moves what is decayed and nothing else."""
    params, config = tiny_model("phimoe")
    params = stack_layers(params)
    settings = TrainSettings(steps=10, warmup_steps=0, weight_decay=0.5)
    optimizer = make_optimizer(settings, leaves_like(params, config))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    vectors = ("scale", "bias")
    for path, update in leaves_with_path(updates):
        assert bool(jnp.any(update != 0)) == (path[-1] not in vectors), path_name(path)
    assert optax.tree.norm(updates) > 0


def test_split_and_joined_again():
    params, config = tiny_model("phimoe")
    settings = dataclasses.replace(SETTINGS, trainable="router")
    trained, frozen = split_trained(params, abstract_params(config), settings)
    assert 0 < len(jax.tree.leaves(trained)) < len(jax.tree.leaves(frozen))
    assert_same(join_trained(trained, frozen), params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"learning_rate": 0.0}, r"learning_rate must be in \(0, inf\)"),
        ({"warmup_steps": 9}, r"warmup_steps must be in \[0, steps = 8\], got 9"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"accumulation": 0}, "accumulation must be at least 1"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
        ({"hidden_weight": -1.0}, r"hidden_weight must be in \[0, inf\)"),
        ({"trainable": "gate"}, "trainable must be 'all' or among"),
        ({"compute_dtype": "float8"}, "compute_dtype must be one of"),
        ({"loss": "kd"}, "kd"),
        ({"lm_weight": 2.0}, r"lm_weight must be in \[0, 1\]"),
        ({"final_fraction": 2.0}, r"final_fraction must be in \[0, 1\]"),
        ({"weight_decay": np.nan}, r"weight_decay must be in \[0, inf\)"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_a_teacher_of_another_kind_is_refused(tmp_path):
    params, config = tiny_model("phimoe")
    settings = dataclasses.replace(SETTINGS, loss="kd_full")
    with pytest.raises(ValueError, match="needs a teacher"):
        train(params, config, dataset(), settings, TrainingRun(tmp_path))
    other = dataclasses.replace(config, vocab_size=VOCAB + 1)
    with pytest.raises(ValueError, match=f"vocabulary, got {VOCAB + 1} and {VOCAB} entries"):
        settings.check_models(config, other)
    fewer = config.replace_moe(0, num_experts=4)
    with pytest.raises(ValueError, match=r"layer 0: router_weight .* got 6 .* and 4"):
        dataclasses.replace(settings, router_weight=1.0).check_models(fewer, config)
    outside = dataclasses.replace(settings, hidden_weight=1.0, hidden_layers=(2,))
    with pytest.raises(ValueError, match=r"hidden_layers must be in \[0, 2\), got \[2\]"):
        outside.check_models(config, config)
    novices = dataclasses.replace(SETTINGS, trainable="novices")
    with pytest.raises(ValueError, match="'novices', but the model has none"):
        novices.check_models(config, None)
    assert not any(tmp_path.iterdir())
