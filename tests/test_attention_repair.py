"""Output projections that make up for removed heads, against float64 least squares."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_config, token_batches
from tiny_hf import torch_logits
from tiny_run import make_run, save_model

from moe_jax.calibrate import calibrate, plan_second_moments
from moe_jax.calibrate.sums import Wanted
from moe_jax.compress import compress
from moe_jax.hf import load_hf
from moe_jax.model import forward, init_params
from moe_jax.plan import Cut, LayerPlan, Plan, make_plan
from moe_jax.processes import make_mesh, spec_tree
from moe_jax.prune import apply_plan
from moe_jax.repair import RIDGE
from moe_jax.scoring import score
from moe_jax.statistics_table import requested_bytes

BATCHES = token_batches(6)
HEADS, GROUPS, HEAD_DIM, WIDTH = 8, 4, 8, 16
# Sums over a few hundred tokens, and systems of 32 by 32, in float32.
ROUNDING = {"rtol": 2e-3, "atol": 2e-4}


@functools.cache
def model(family):
    """Four key/value heads of two query heads each; biases that are not zero."""
    config = tiny_config(family, vocab_size=62)  # two devices hold halves
    layers = tuple(
        dataclasses.replace(layer, num_heads=HEADS, num_kv_heads=GROUPS) for layer in config.layers
    )
    config = dataclasses.replace(config, layers=layers)
    params = init_params(config, jax.random.key(1))
    return jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params
    ), config


@pytest.fixture(scope="module", params=["phimoe", "qwen3_moe"])
def measured(request):
    params, config = model(request.param)
    stats = calibrate(params, config, BATCHES, attention_moments=True, warn=False)
    return params, config, stats


def groups_plan(kept, config, repair=True):
    return Plan({i: LayerPlan(kv_groups=kept, repair=repair) for i in range(config.num_layers)})


def mixed_rows(params, config, layer):
    """What the output projection reads, [T, N H], of tokens that are no padding."""
    rows = []
    for batch in BATCHES:
        segments = jnp.asarray(batch["mask"], jnp.int32)
        _, aux = forward(params, config, batch["tokens"], segments, ("mixed",))
        mixed = np.asarray(aux["layers"][layer]["mixed"], np.float64)
        rows.append(mixed[batch["mask"]].reshape(-1, HEADS * HEAD_DIM))
    return np.concatenate(rows)


def test_second_moments_are_those_of_the_mixed_heads(measured):
    params, config, stats = measured
    for i in range(config.num_layers):
        rows = np.pad(mixed_rows(params, config, i), ((0, 0), (0, 1)), constant_values=1)
        found = stats.attention[i]["mixed_gram"]
        np.testing.assert_allclose(found, rows.T @ rows, rtol=2e-5, atol=1e-4)
        assert found.nbytes == requested_bytes(config, "attention_moments", "attention")[i]


def test_repaired_projections_equal_float64_least_squares(measured):
    params, config, stats = measured
    kept_groups = (0, 3)
    kept = np.isin(np.arange(HEADS) // 2, kept_groups).repeat(HEAD_DIM)
    _, pruned = apply_plan(params, config, groups_plan(kept_groups, config), stats)
    # The first layer: later ones read another stream by then, but are repaired for this one.
    for i in range(config.num_layers):
        before = params["layers"][i]["attention"]["out"]
        rows = mixed_rows(params, config, i)
        weights = np.asarray(before["kernel"], np.float64).reshape(-1, WIDTH)
        if "bias" in before:
            rows = np.pad(rows, ((0, 0), (0, 1)), constant_values=1)
            weights = np.concatenate([weights, np.asarray(before["bias"], np.float64)[None]])
        stays = np.append(kept, True)[: len(weights)]
        # The least error and the ridge's penalty, as rows of one least-squares problem.
        penalty = np.diag(np.sqrt(RIDGE * np.square(rows[:, stays]).sum(0)))
        system = np.concatenate([rows[:, stays], penalty])
        goal = np.concatenate([rows @ weights, penalty @ weights[stays]])
        best = np.linalg.lstsq(system, goal, rcond=None)[0]
        after = pruned["layers"][i]["attention"]["out"]
        found = np.asarray(after["kernel"]).reshape(-1, WIDTH)
        np.testing.assert_allclose(found, best[: len(found)], **ROUNDING)
        if "bias" in before:
            np.testing.assert_allclose(after["bias"], best[-1], **ROUNDING)
        else:
            assert "bias" not in after


def test_repair_brings_attention_closer_to_what_it_was(measured):
    params, config, stats = measured
    rows = mixed_rows(params, config, 0)
    kept = np.isin(np.arange(HEADS) // 2, (1, 2)).repeat(HEAD_DIM)
    errors = []
    for repair in (True, False):
        _, pruned = apply_plan(params, config, groups_plan((1, 2), config, repair), stats)
        out = [p["layers"][0]["attention"]["out"] for p in (params, pruned)]
        whole, cut = (
            part @ np.asarray(weights["kernel"]).reshape(-1, WIDTH)
            + np.asarray(weights.get("bias", 0))
            for part, weights in zip((rows, rows[:, kept]), out, strict=True)
        )
        errors.append(np.square(cut - whole).sum())
    assert errors[0] < 0.8 * errors[1]


def test_obs_ranks_groups_by_what_is_lost_after_repair(measured):
    params, config, stats = measured
    scores = score(stats, "obs", of="attention", model=(params, config))
    rows = mixed_rows(params, config, 0)
    before = params["layers"][0]["attention"]["out"]
    whole = rows @ np.asarray(before["kernel"], np.float64).reshape(-1, WIDTH)
    lost = []
    for group in range(GROUPS):
        stay = tuple(g for g in range(GROUPS) if g != group)
        _, pruned = apply_plan(params, config, groups_plan(stay, config), stats)
        after = pruned["layers"][0]["attention"]["out"]
        kept = np.isin(np.arange(HEADS) // 2, stay).repeat(HEAD_DIM)
        cut = rows[:, kept] @ np.asarray(after["kernel"], np.float64).reshape(-1, WIDTH)
        change = np.asarray(after.get("bias", 0), np.float64) - np.asarray(before.get("bias", 0))
        lost.append(np.square(cut + change - whole).sum())
    assert scores[0].argmin() == np.argmin(lost)
    # What it counts beside the error is the ridge's penalty on how far the others moved.
    np.testing.assert_allclose(scores[0].min(), min(lost), rtol=0.05)
    for values in scores.values():
        assert values.shape == (GROUPS,)
        assert np.isfinite(values).all()
    plain = calibrate(params, config, BATCHES[:1], warn=False)
    with pytest.raises(ValueError, match="attention_moments=True"):
        score(plain, "obs", of="attention", model=(params, config))
    with pytest.raises(ValueError, match="needs the weights"):
        score(stats, "obs", of="attention")


def test_keeping_all_groups_is_the_identity(measured):
    params, config, stats = measured
    smaller, pruned = apply_plan(params, config, groups_plan((0, 1, 2, 3), config), stats)
    assert smaller == config
    jax.tree.map(np.testing.assert_array_equal, pruned, params)


def test_neurons_and_groups_are_repaired_together(measured):
    params, config, _ = measured
    stats = calibrate(
        params, config, BATCHES, attention_moments=True, second_moments=True, warn=False
    )
    neurons = score(stats, "obs", model=(params, config))
    groups = score(stats, "weight_norm", of="attention")
    both = make_plan(neurons, config, expert_width=4, repair=True, group_scores=groups, kv_groups=2)
    alone = make_plan(neurons, config, expert_width=4, repair=True)
    only_groups = make_plan(None, config, repair=True, group_scores=groups, kv_groups=2)
    assert only_groups.settings == {"kv_groups": 2, "repair": True}
    assert all(layer.repair for layer in only_groups.layers.values())
    _, pruned = apply_plan(params, config, Plan.from_json(both.to_json()), stats)
    for part, plan in (("moe", alone), ("attention", only_groups)):
        _, expected = apply_plan(params, config, plan, stats)
        for mine, theirs in zip(pruned["layers"], expected["layers"], strict=True):
            if part in mine:
                jax.tree.map(np.testing.assert_array_equal, mine[part], theirs[part])


def test_sharded_equals_single(measured):
    params, config, stats = measured
    plan = groups_plan((0, 2), config)
    _, single = apply_plan(params, config, plan, stats)
    mesh = make_mesh({"tensor": 2, "data": 4})
    _, sharded = apply_plan(jax.device_put(params, spec_tree(config, mesh)), config, plan, stats)
    kernels = [p["layers"][0]["attention"]["out"]["kernel"] for p in (single, sharded)]
    assert kernels[1].sharding.spec[0] == "tensor"
    np.testing.assert_allclose(*kernels, **ROUNDING)


def test_passes_give_the_same_bits():
    params, config = model("qwen3_moe")
    sizes = requested_bytes(config, "attention_moments", "attention")
    plan = plan_second_moments(config, (0,), None, attention=True)
    assert plan.by_layer == {i: sizes[i] + (1944 if i == 0 else 0) for i in range(3)}
    assert plan.wanted(0) == Wanted(True, (0,), (0, 1, 2))
    bound = 2 * max(plan.by_layer.values())
    split = plan_second_moments(config, (0,), bound, attention=True)
    assert [split.wanted(n) for n in range(3)] == [
        Wanted(True, (0,), (0,)),
        Wanted(False, (), (1,)),
        Wanted(False, (), (2,)),
    ]
    whole, parts = (
        calibrate(params, config, BATCHES[:2], second_moments=each, warn=False)
        for each in (plan, split)
    )
    np.testing.assert_array_equal(whole.layers[0]["hidden_gram"], parts.layers[0]["hidden_gram"])
    for i in range(3):
        np.testing.assert_array_equal(
            whole.attention[i]["mixed_gram"], parts.attention[i]["mixed_gram"]
        )


def test_bad_requests_are_refused(measured):
    params, config, stats = measured
    plan = groups_plan((0,), config)
    plain = calibrate(params, config, BATCHES[:1], warn=False)
    for wrong in (None, plain):
        with pytest.raises(ValueError, match=r"layer 0: repair of attention needs statistics"):
            apply_plan(params, config, plan, wrong)
    small = {i: {"mixed_gram": np.eye(3)} for i in range(config.num_layers)}
    with pytest.raises(ValueError, match=r"mixed_gram \(65, 65\), got \(3, 3\)"):
        apply_plan(params, config, plan, dataclasses.replace(stats, attention=small))
    with pytest.raises(ValueError, match="repair = True needs a ranking of neurons"):
        make_plan(score(stats, "mone"), config, keep_experts=4, repair=True)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"method": "obs", "kv_groups": 1}, (True, False, True)),
        ({"method": "obs", "kv_groups": 1, "repair": False}, (False, False, True)),
        (
            {"method": "obs", "kv_groups": 1, "repair": False, "group_importance": "fisher"},
            (False, False, False),
        ),
        ({"method": "obs", "kv_groups": 1, "width_ratio": 0.5}, (True, True, True)),
        ({"method": "slim", "kv_groups": 1}, (False, False, False)),
        ({"method": "slim", "kv_groups": 1, "repair": True}, (True, False, True)),
        ({"method": "obs", "width_ratio": 0.5}, (True, True, False)),
    ],
)
def test_what_a_stage_needs(fields, expected):
    stage = Cut.from_dict(fields, "stages[0]")
    needs = (stage.repairs, stage.needs_second_moments, stage.needs_attention_moments)
    assert needs == expected
    assert (stage.losses == ()) == (stage.method == "obs" and stage.kv_criterion == "obs")


def test_a_run_and_its_plan_applied_again(tmp_path):
    save_model(tmp_path / "model", "phimoe")
    stage = {"method": "slim", "kv_groups": 1, "group_importance": "lm", "repair": True}
    report, paths = compress(make_run(tmp_path, stage))
    assert report["stages"][0]["layers"][0]["kv_groups"] == [2, 1]
    assert "fewer_tokens_than_neurons" not in report["stages"][0]["layers"][0]
    config, params = load_hf(paths["checkpoint"])
    source = load_hf(tmp_path / "model")[1]
    heads = config.layers[0].num_heads
    kernels = [p["layers"][0]["attention"]["out"]["kernel"] for p in (source, params)]
    assert not np.isclose(kernels[0][:heads], kernels[1]).all()
    tokens = np.random.default_rng(0).integers(0, 15, (2, 12))
    ours, _ = forward(params, config, tokens)
    np.testing.assert_allclose(ours, torch_logits(paths["checkpoint"], tokens), 0, 2e-4)
    (file,) = (tmp_path / "out/plans").glob("*.json")
    again = make_run(tmp_path, {"plan": str(file)}, output=str(tmp_path / "again"))
    _, same = compress(again)
    jax.tree.map(np.testing.assert_array_equal, load_hf(same["checkpoint"])[1], params)
