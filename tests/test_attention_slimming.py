"""Whole key/value groups: their importance, and their removal."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import VOCAB, tiny_config, tiny_model, token_batches
from tiny_hf import save_tiny, torch_logits

from moe_jax.calibrate import calibrate
from moe_jax.config import ModelConfig
from moe_jax.hf import load_hf, save_hf
from moe_jax.model import forward, init_params
from moe_jax.params import abstract_params, leaves_with_path
from moe_jax.plan import LayerPlan, Plan, make_plan
from moe_jax.prune import apply_plan
from moe_jax.scoring import AGGREGATIONS, GROUP_CRITERIA, score

GROUPS, HEADS = 4, 8
# Biases in queries, keys, values and outputs; norms within each head and a layer without experts.
FAMILIES = ["phimoe", "qwen3_moe"]
LOSSES = ("lm", "kd_topk")
# Sums of some tens of float32 numbers of size 10, through two to three layers.
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}
TOKENS = token_batches(1)[0]["tokens"]

jitted = jax.jit(forward, static_argnums=1)


@functools.cache
def grouped_model(family: str) -> tuple[dict[str, Any], ModelConfig]:
    """Four groups of two query heads in every layer, and no bias or norm at its first value."""
    config = tiny_config(family)
    layers = tuple(
        dataclasses.replace(layer, num_heads=HEADS, num_kv_heads=GROUPS) for layer in config.layers
    )
    config = dataclasses.replace(config, layers=layers)
    params = init_params(config, jax.random.key(1))
    noise = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.1 * noise.standard_normal(x.shape, np.float32), params), (
        config
    )


@functools.cache
def measured(family: str):
    params, config = grouped_model(family)
    return calibrate(params, config, token_batches(), importance=LOSSES, warn=False)


def keep_two(config: ModelConfig, seed: int = 0) -> Plan:
    rng = np.random.default_rng(seed)
    scores = {i: rng.permutation(GROUPS).astype(float) for i in range(config.num_layers)}
    return make_plan(None, config, group_scores=scores, kv_groups=2)


def group_masks(plan: Plan) -> dict[int, jnp.ndarray]:
    return {
        i: jnp.zeros(GROUPS).at[jnp.array(layer.kv_groups)].set(1)
        for i, layer in plan.layers.items()
    }


def plain_loss(masks, params, config, tokens, targets):
    """Cross-entropy of one sequence with ``targets [S - 1, V]``, summed over positions."""
    logits, _ = forward(params, config, tokens[None], group_masks=masks)
    return -(targets * jax.nn.log_softmax(logits[0, :-1])).sum()


def plain_targets(loss: str, params, config, tokens):
    if loss == "lm":
        return jax.nn.one_hot(tokens[1:], VOCAB)
    probabilities = jax.nn.softmax(jitted(params, config, tokens[None])[0][0, :-1])
    smallest = jnp.sort(probabilities, -1)[:, -8, None]
    return jnp.where(probabilities >= smallest, probabilities, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_sums_the_gradients_of_single_sequences(family):
    params, config = grouped_model(family)
    ones = {i: jnp.ones(GROUPS) for i in range(config.num_layers)}
    gradient = jax.jit(jax.grad(plain_loss), static_argnums=2)
    # One length, for the plain loss knows no padding and is compiled for each.
    length = 9
    batches = [
        {**batch, "mask": np.broadcast_to(np.arange(12) < length, (4, 12))}
        for batch in token_batches(2, seed=1)
    ]
    stats = calibrate(params, config, batches, importance=LOSSES, warn=False)
    assert set(stats.attention) == set(ones)
    for loss in LOSSES:
        by_batch = []
        for batch in batches:
            rows = []
            for tokens in batch["tokens"][:, :length]:
                targets = plain_targets(loss, params, config, tokens)
                rows.append(gradient(ones, params, config, tokens, targets))
            by_batch.append(rows)
        for i, groups in stats.attention.items():
            each = np.array([[row[i] for row in rows] for rows in by_batch], np.float64)
            expected = {
                "batch_abs": np.abs(each.sum(1)).sum(0),
                "sequence_abs": np.abs(each).sum((0, 1)),
                "sequence_square": (each**2).sum((0, 1)),
            }
            for name, values in expected.items():
                np.testing.assert_allclose(groups[f"{loss}.{name}"], values, **ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_the_derivative_of_the_loss(family):
    """Central differences in every group's mask."""
    params, config = grouped_model(family)
    # No token of this sequence is so near a tie between experts that a step would reroute it.
    tokens = TOKENS[3]
    batch = {"tokens": TOKENS, "mask": np.arange(4)[:, None] == np.full((1, 12), 3)}
    stats = calibrate(params, config, [batch], importance=LOSSES, warn=False)
    evaluate = jax.jit(plain_loss, static_argnums=2)
    ones = {i: jnp.ones(GROUPS) for i in range(config.num_layers)}
    step = 4e-3
    for kind in LOSSES:
        targets = plain_targets(kind, params, config, tokens)
        for i, group in itertools.product(ones, range(GROUPS)):
            high, low = (
                evaluate(ones | {i: ones[i].at[group].add(change)}, params, config, tokens, targets)
                for change in (step, -step)
            )
            importance = stats.attention[i][f"{kind}.batch_abs"][group]
            # Losses up to 70 with float32's rounding, a few times 4e-6, over 2 * step.
            assert abs(abs(high - low) / (2 * step) - importance) < 5e-3


def test_merged_halves_equal_the_whole(tmp_path):
    params, config = grouped_model("qwen3_moe")
    whole = measured("qwen3_moe")
    batches = token_batches()
    halves = [
        calibrate(params, config, part, importance=LOSSES, warn=False)
        for part in (batches[:1], batches[1:])
    ]
    halves[0].save(tmp_path / "half")
    merged = type(whole).load(tmp_path / "half").merge(halves[1])
    assert set(merged.attention) == {0, 1, 2}
    for i, groups in whole.attention.items():
        assert set(merged.attention[i]) == set(groups)
        for name, array in groups.items():
            np.testing.assert_allclose(merged.attention[i][name], array, **ROUNDING)
    other = dataclasses.replace(halves[1], attention={})
    with pytest.raises(ValueError, match=r"do not fit together.*attention/0"):
        halves[0].merge(other)


def test_weight_norm_is_over_what_removing_a_group_removes():
    params, config = grouped_model("phimoe")
    total = jax.tree.map(lambda leaf: np.square(leaf).sum(), params["layers"][1]["attention"])
    shared = total["out"].pop("bias")
    assert shared > 0
    norms = measured("phimoe").attention[1]["weight_norm"]
    np.testing.assert_allclose((norms**2).sum(), sum(jax.tree.leaves(total)), rtol=1e-5)
    for group in range(GROUPS):
        others = tuple(g for g in range(GROUPS) if g != group)
        _, pruned = apply_plan(params, config, Plan({1: LayerPlan(kv_groups=others)}))
        left = jax.tree.map(lambda leaf: np.square(leaf).sum(), pruned["layers"][1]["attention"])
        removed = sum(jax.tree.leaves(total)) + shared - sum(jax.tree.leaves(left))
        np.testing.assert_allclose(norms[group] ** 2, removed, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_criterion_scores_the_groups_of_every_layer(family):
    stats = measured(family)
    _, config = grouped_model(family)
    for method in GROUP_CRITERIA.keys() - {"kd_full"}:
        scores = score(stats, method, of="attention")
        assert set(scores) == set(range(config.num_layers))
        assert all(values.shape == (GROUPS,) and (values > 0).all() for values in scores.values())
    for aggregation in AGGREGATIONS:
        scores = score(stats, "lm", of="attention", aggregation=aggregation)
        np.testing.assert_array_equal(scores[1], stats.attention[1][f"lm.{aggregation}"])
    by_square = score(stats, "lm", of="attention", aggregation="sequence_square")
    np.testing.assert_array_equal(score(stats, "fisher", of="attention")[0], by_square[0])


def test_bad_requests_are_refused():
    stats = measured("phimoe")
    with pytest.raises(ValueError, match=r"one of .*'fisher'.*, got 'mone'"):
        score(stats, "mone", of="attention")
    with pytest.raises(ValueError, match=r"of must be one of .*, got 'heads'"):
        score(stats, "lm", of="heads")
    with pytest.raises(ValueError, match=r"no kd_full\.batch_abs.*calibrate with importance"):
        score(stats, "kd_full", of="attention")
    with pytest.raises(ValueError, match=r"options of weight_norm must be among \[\]"):
        score(stats, "weight_norm", of="attention", aggregation="batch_abs")
    with pytest.raises(ValueError, match="cover no attention"):
        score(dataclasses.replace(stats, attention={}), "lm", of="attention")
    silent = {i: {"lm.batch_abs": np.zeros(GROUPS)} for i in stats.attention}
    with pytest.raises(ValueError, match=r"lm scores of layers \[0, 1\] are all zero"):
        score(dataclasses.replace(stats, attention=silent), "lm", of="attention")
    broken = {1: {"lm.batch_abs": np.full(GROUPS, np.nan)}}
    with pytest.raises(ValueError, match=r"layer 1: attention lm\.batch_abs holds a NaN"):
        dataclasses.replace(stats, attention=broken).check_finite()


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_equals_sliced(family):
    params, config = grouped_model(family)
    plan = keep_two(config)
    small, sliced = apply_plan(params, config, plan)
    assert [(layer.num_heads, layer.num_kv_heads) for layer in small.layers] == [(4, 2)] * (
        config.num_layers
    )
    assert small.head_dim == config.head_dim
    expected = {path: leaf.shape for path, leaf in leaves_with_path(abstract_params(small))}
    assert {path: leaf.shape for path, leaf in leaves_with_path(sliced)} == expected
    masked, _ = jitted(params, config, TOKENS, group_masks=group_masks(plan))
    # Not to the bit: XLA lays out products over 8 heads otherwise than over 4, and so adds up
    # the positions and the hidden sizes in another order. The logits are up to 10 in size.
    np.testing.assert_allclose(jitted(sliced, small, TOKENS)[0], masked, 0, 2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_every_group_changes_nothing(family):
    params, config = grouped_model(family)
    scores = score(measured(family), "kd_topk", of="attention")
    plan = make_plan(None, config, group_scores=scores, kv_groups=GROUPS)
    same, kept = apply_plan(params, config, plan)
    assert same == config
    assert all(a is b for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(params), strict=True))


def test_what_is_not_cut_is_shared():
    params, config = grouped_model("qwen3_moe")
    small, pruned = apply_plan(params, config, Plan({1: LayerPlan(kv_groups=(0, 3))}))
    assert [layer.num_kv_heads for layer in small.layers] == [4, 2, 4]
    changed = {
        path[1:]
        for (path, old), (_, new) in zip(
            leaves_with_path(params), leaves_with_path(pruned), strict=True
        )
        if old is not new
    }
    kernels = ("query", "key", "value", "out")
    assert changed == {(1, "attention", name, "kernel") for name in kernels}


def permuted(params, order: np.ndarray):
    """The same model with the groups of every layer in another order."""
    heads = (order[:, None] * (HEADS // GROUPS) + np.arange(HEADS // GROUPS)).reshape(-1)

    def permute(attention):
        moved = dict(attention)
        for name, index in (("query", heads), ("key", order), ("value", order)):
            moved[name] = {key: leaf[..., index, :] for key, leaf in attention[name].items()}
        moved["out"] = {**attention["out"], "kernel": attention["out"]["kernel"][heads]}
        return moved

    layers = [{**layer, "attention": permute(layer["attention"])} for layer in params["layers"]]
    return {**params, "layers": layers}


@pytest.mark.parametrize("family", FAMILIES)
def test_permuting_groups_permutes_the_result(family):
    params, config = grouped_model(family)
    order = np.array([2, 0, 3, 1])
    moved = permuted(params, order)
    stats = measured(family)
    moved_stats = calibrate(moved, config, token_batches(), importance=LOSSES, warn=False)
    for i, groups in stats.attention.items():
        for name, array in groups.items():
            np.testing.assert_allclose(moved_stats.attention[i][name], array[order], **ROUNDING)
    outputs = []
    for weights, measurement in ((params, stats), (moved, moved_stats)):
        scores = score(measurement, "kd_topk", of="attention")
        plan = make_plan(None, config, group_scores=scores, kv_groups=2)
        small, pruned = apply_plan(weights, config, plan)
        outputs.append(jitted(pruned, small, TOKENS)[0])
    np.testing.assert_allclose(*outputs, **ROUNDING)


def test_groups_and_neurons_are_cut_by_one_plan():
    params, config = grouped_model("qwen3_moe")
    stats = measured("qwen3_moe")
    group_scores = score(stats, "kd_topk", of="attention")
    plan = make_plan(
        score(stats, "kd_topk"),
        config,
        expert_width=5,
        group_scores=group_scores,
        kv_groups=1,
        method="kd_topk",
    )
    assert plan.settings["kv_groups"] == 1
    both = apply_plan(params, config, plan)
    first = Plan({i: LayerPlan(neurons=layer.neurons) for i, layer in plan.layers.items()})
    second = make_plan(None, config, group_scores=group_scores, kv_groups=1)
    one_by_one = apply_plan(*apply_plan(params, config, first)[::-1], second)
    assert both[0] == one_by_one[0]
    jax.tree.map(np.testing.assert_array_equal, both[1], one_by_one[1])


def test_sharded_in_sharded_out():
    from moe_jax.processes import make_mesh, spec_tree

    params, config = grouped_model("phimoe")
    config = dataclasses.replace(config, vocab_size=60)
    params = jax.tree.map(lambda leaf: leaf[..., :60] if leaf.shape[-1] == VOCAB else leaf, params)
    params["embed"] = {"embedding": params["embed"]["embedding"][:60]}
    mesh = make_mesh({"tensor": 2, "fsdp": 2})
    sharded = jax.device_put(params, spec_tree(config, mesh))
    plan = keep_two(config)
    small, pruned = apply_plan(sharded, config, plan)
    for leaf, wanted in zip(
        jax.tree.leaves(pruned), jax.tree.leaves(spec_tree(small, mesh)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    jax.tree.map(np.testing.assert_array_equal, pruned, apply_plan(params, config, plan)[1])


def test_norms_over_all_heads_forbid_it():
    params, config = tiny_model("olmoe")
    scores = {i: np.ones(2) for i in range(config.num_layers)}
    with pytest.raises(ValueError, match="normalises queries and keys over all heads together"):
        make_plan(None, config, group_scores=scores, kv_groups=1)
    with pytest.raises(ValueError, match="olmoe cannot be removed"):
        apply_plan(params, config, Plan({0: LayerPlan(kv_groups=(0,))}))


def test_the_stock_class_loads_half_of_the_groups(tmp_path):
    source = save_tiny(
        tmp_path / "source", "phimoe", num_attention_heads=8, num_key_value_heads=4, head_dim=4
    )
    config, params = load_hf(source)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 12), np.int32)
    batch = {"tokens": tokens, "mask": np.ones(tokens.shape, bool)}
    scores = score(calibrate(params, config, [batch], warn=False), "weight_norm", of="attention")
    plan = make_plan(None, config, group_scores=scores, kv_groups=2)
    small, pruned = apply_plan(params, config, plan)
    save_hf(tmp_path / "out", pruned, small, source=source)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["head_dim"], written["num_attention_heads"]) == (config.head_dim, 4)
    assert written["num_key_value_heads"] == 2
    assert written["model_type"] == "phimoe"
    assert "auto_map" not in written
    ours = jitted(pruned, small, tokens)[0]
    np.testing.assert_allclose(ours, torch_logits(tmp_path / "out", tokens), 0, 2e-4)
    assert load_hf(tmp_path / "out")[0] == small
