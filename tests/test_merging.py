"""Merged experts: the arithmetic, who joins whom, and what other programs make of the result."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import EXPERTS, tiny_config, tiny_model, token_batches
from tiny_hf import save_tiny, torch_logits

from moe_jax.calibrate import calibrate
from moe_jax.config import MoeConfig
from moe_jax.hf import load_hf, save_hf
from moe_jax.model import forward
from moe_jax.params import abstract_params, leaves_with_path
from moe_jax.plan import (
    MERGE_RECIPES,
    LayerPlan,
    Merge,
    MergeRecipe,
    Plan,
    make_plan,
    merge_plan,
    planned_config,
    validate_plan,
)
from moe_jax.plan.merge import clusters, join_nearest, join_salient_first
from moe_jax.prune import apply_plan
from moe_jax.scoring import score
from moe_jax.statistics import Stats

FAMILIES = ["olmoe", "phimoe", "qwen3_moe"]
AXIS = {"gate": 1, "up": 1, "down": 0}  # of neurons, in one expert's matrices
MERGES = (Merge(1, (0, 4), (3.0, 1.0, 2.0)), Merge(5, (3,), (1.0, 1.0)))
# Sums of a few float32 numbers, against the same in float64.
ROUNDING = {"rtol": 1e-6, "atol": 1e-7}


@pytest.fixture(scope="module")
def stats() -> Stats:
    params, config = tiny_model("olmoe")
    return calibrate(params, config, token_batches(), warn=False)


def moe_of(params: dict[str, Any], layer: int = 0) -> dict[str, Any]:
    return params["layers"][layer]["moe"]


def with_experts(params, change, layer: int = 0):
    """The same model with other experts and router: ``change(experts, kernel)`` in NumPy."""
    moe = moe_of(params, layer)
    experts = {name: np.array(leaf) for name, leaf in moe["experts"].items()}
    kernel = np.array(moe["router"]["kernel"])
    experts, kernel = change(experts, kernel)
    new = {
        **moe,
        "experts": jax.tree.map(jnp.asarray, experts),
        "router": {**moe["router"], "kernel": jnp.asarray(kernel)},
    }
    layers = list(params["layers"])
    layers[layer] = {**layers[layer], "moe": new}
    return {**params, "layers": layers}


@functools.cache
def permutations(width: int) -> np.ndarray:
    return np.array(list(itertools.permutations(range(width))))


def best_order(kept: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[int]:
    """By trying every permutation of the neurons."""
    overlap = kept["gate"].T @ other["gate"] + kept["up"].T @ other["up"]
    overlap += kept["down"] @ other["down"].T
    width = len(overlap)
    orders = permutations(width)
    return orders[overlap[np.arange(width), orders].sum(1).argmax()].tolist()


def merged_by_hand(moe: dict[str, Any], merge: Merge, align: bool):
    """One merged expert and its mean router row, in float64."""
    experts = [
        {name: np.asarray(leaf[e], np.float64) for name, leaf in moe["experts"].items()}
        for e in (merge.kept, *merge.removed)
    ]
    kernel = np.asarray(moe["router"]["kernel"], np.float64)
    shares = np.array(merge.weights) / sum(merge.weights)
    mean = {name: shares[0] * leaf for name, leaf in experts[0].items()}
    for share, expert in zip(shares[1:], experts[1:], strict=True):
        order = best_order(experts[0], expert) if align else range(expert["gate"].shape[1])
        for name, leaf in expert.items():
            mean[name] = mean[name] + share * np.take(leaf, list(order), AXIS[name])
    row = kernel[:, [merge.kept, *merge.removed]] @ shares
    return mean, row


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("router", ["mean", "kept"])
def test_the_mean_agrees_with_float64(align, router):
    params, config = tiny_model("olmoe")
    plan = Plan({0: LayerPlan(merges=MERGES, merge_align=align, merge_router=router)})
    small, merged = apply_plan(params, config, plan)
    assert small == planned_config(config, plan)
    assert small.moe(0).num_experts == 3
    old, new = moe_of(params), moe_of(merged)
    for place, merge in ((0, MERGES[0]), (2, MERGES[1])):
        expert, row = merged_by_hand(old, merge, align)
        if router == "kept":
            row = old["router"]["kernel"][:, merge.kept]
        for name, leaf in expert.items():
            np.testing.assert_allclose(new["experts"][name][place], leaf, **ROUNDING)
        np.testing.assert_allclose(new["router"]["kernel"][:, place], row, **ROUNDING)
    for name, leaf in old["experts"].items():
        np.testing.assert_array_equal(new["experts"][name][1], leaf[2])
    np.testing.assert_array_equal(new["router"]["kernel"][:, 1], old["router"]["kernel"][:, 2])
    for (_, a), (_, b) in zip(
        leaves_with_path(params["layers"][1]), leaves_with_path(merged["layers"][1]), strict=True
    ):
        assert a is b


def test_a_permuted_copy_adds_nothing():
    """Expert 3 is expert 1 with its neurons in another order; unaligned, the mean is neither."""
    order = np.random.default_rng(0).permutation(8)

    def copy(experts, kernel):
        for name, leaf in experts.items():
            leaf[3] = np.take(leaf[1], order, AXIS[name])
        kernel[:, 3] = kernel[:, 1]
        return experts, kernel

    params, config = tiny_model("olmoe")
    params = with_experts(params, copy)
    merges = (Merge(1, (3,), (1.0, 2.0)),)
    deleted = apply_plan(params, config, Plan({0: LayerPlan(deleted=(3,))}))[1]
    for align in (True, False):
        plan = Plan({0: LayerPlan(merges=merges, merge_align=align)})
        _, merged = apply_plan(params, config, plan)
        pairs = zip(leaves_with_path(merged), leaves_with_path(deleted), strict=True)
        close = [np.allclose(a, b, **ROUNDING) for (_, a), (_, b) in pairs]
        assert all(close) is align


def test_identical_experts_merge_into_themselves():
    def copy(experts, kernel):
        for leaf in (*experts.values(), kernel.T):
            leaf[[0, 4]] = leaf[1]
        return experts, kernel

    params, config = tiny_model("olmoe")
    params = with_experts(params, copy)
    plan = Plan({0: LayerPlan(merges=MERGES[:1])})
    _, merged = apply_plan(params, config, plan)
    _, deleted = apply_plan(params, config, Plan({0: LayerPlan(deleted=(0, 4))}))
    for (_, a), (_, b) in zip(leaves_with_path(merged), leaves_with_path(deleted), strict=True):
        np.testing.assert_allclose(a, b, **ROUNDING)


@pytest.mark.parametrize("router", ["mean", "kept"])
def test_weights_of_one_and_zero_are_deletion(router):
    """To the bit, in bfloat16 too."""
    params, config = tiny_model("phimoe")
    merges = (Merge(2, (0, 5), (1.0, 0.0, 0.0)), Merge(4, (3,), (0.5, 0.0)))
    merging = Plan({1: LayerPlan(merges=merges, merge_router=router)})
    deleting = Plan({1: LayerPlan(deleted=(0, 3, 5))})
    for dtype in (jnp.float32, jnp.bfloat16):
        model = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), params)
        config_a, a = apply_plan(model, config, merging)
        config_b, b = apply_plan(model, config, deleting)
        assert config_a == config_b
        for (path, x), (_, y) in zip(leaves_with_path(a), leaves_with_path(b), strict=True):
            assert x.dtype == y.dtype == dtype
            np.testing.assert_array_equal(x, y, err_msg=str(path))


def test_means_of_bfloat16_weights_are_taken_in_float32():
    params, config = tiny_model("olmoe")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded)
    plan = Plan({0: LayerPlan(merges=MERGES)})
    low, high = (moe_of(apply_plan(model, config, plan)[1]) for model in (rounded, exact))
    for (_, a), (_, b) in zip(leaves_with_path(low), leaves_with_path(high), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))


def test_one_plan_equals_one_cut_after_the_other(stats):
    """Neurons are the merged expert's, in the order of the one that stays."""
    params, config = tiny_model("phimoe")
    neurons = dict.fromkeys((1, 2), (0, 3, 7))
    together = LayerPlan(
        deleted=(5,), novices=(3,), merges=MERGES[:1], neurons=neurons, kv_groups=(1,)
    )
    steps = (
        LayerPlan(merges=MERGES[:1]),  # experts 1, 2, 3, 5 stay
        LayerPlan(novices=(2,)),
        LayerPlan(deleted=(3,)),
        LayerPlan(neurons=dict.fromkeys((0, 1), (0, 3, 7)), kv_groups=(1,)),
    )
    expected_config, expected = config, params
    for step in steps:
        measured = stats
        if step.novices:  # what was measured of expert 3 before is of expert 2 now
            means = {"output_mean": stats.layers[0]["output_mean"][[1, 2, 3, 5]]}
            measured = dataclasses.replace(stats, layers={0: means})
        expected_config, expected = apply_plan(expected, expected_config, Plan({0: step}), measured)
    result_config, result = apply_plan(params, config, Plan({0: together}), stats)
    assert result_config == expected_config
    shapes = {path: leaf.shape for path, leaf in leaves_with_path(abstract_params(result_config))}
    for (path, a), (_, b) in zip(leaves_with_path(result), leaves_with_path(expected), strict=True):
        assert a.shape == shapes[path]
        np.testing.assert_array_equal(a, b, err_msg=str(path))


def test_sharded_in_sharded_out():
    from moe_jax.processes import make_mesh, spec_tree

    params, config = tiny_model("olmoe")
    mesh = make_mesh({"expert": 2, "fsdp": 2, "data": 2})
    sharded = jax.device_put(params, spec_tree(config, mesh))
    plan = Plan({0: LayerPlan(merges=(Merge(4, (1,), (2.0, 1.0)), Merge(0, (5,), (1.0, 1.0))))})
    small, merged = apply_plan(sharded, config, plan)
    _, expected = apply_plan(params, config, plan)
    wanted = spec_tree(small, mesh)
    for (path, a), (_, b), (_, spec) in zip(
        leaves_with_path(merged), leaves_with_path(expected), leaves_with_path(wanted), strict=True
    ):
        assert a.sharding.is_equivalent_to(spec, a.ndim), path
        np.testing.assert_allclose(a, b, **ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_classes_load_merged_models(family, tmp_path):
    source = save_tiny(tmp_path / "source", family)
    config, params = load_hf(source)
    merges = (Merge(2, (0,), (1.0, 3.0)),)
    plan = Plan({i: LayerPlan(merges=merges) for i in config.moe_layers})
    small, merged = apply_plan(params, config, plan)
    save_hf(tmp_path / "out", merged, small, source=source)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 12))
    with jax.default_matmul_precision("highest"):
        ours = forward(merged, small, tokens)[0]
    # Float32 in both, in another order; logits are of order 10.
    np.testing.assert_allclose(ours, torch_logits(tmp_path / "out", tokens), 0, 2e-4)
    assert small.moe(config.moe_layers[0]).num_experts == 3


# Who joins whom.


def planned(
    name: str, stats: Stats, params, config, keep: int = 3, **changes: Any
) -> tuple[Plan, MergeRecipe]:
    recipe = dataclasses.replace(MERGE_RECIPES[name], **changes)
    scores = score(stats, recipe.criterion)
    deletion = make_plan(scores, config, keep_experts=keep, replacement="delete", method=name)
    plan = merge_plan(deletion, stats, config, scores, recipe, params)
    validate_plan(plan, config)
    return plan, recipe


def groups_of(layer: LayerPlan) -> set[tuple[int, frozenset[int]]]:
    return {(merge.kept, frozenset(merge.removed)) for merge in layer.merges}


@pytest.mark.parametrize("similarity", ["router", "output", "output_and_router", "weights"])
def test_m_smoe_joins_the_most_similar_of_the_most_frequent(stats, similarity):
    """Similarities here from every token's logits and outputs rather than from sums of products."""
    params, config = tiny_model("olmoe")
    plan, _ = planned("m_smoe", stats, params, config, similarity=similarity)
    logits = []
    for batch in token_batches():
        segments = batch["mask"].astype(np.int32)
        _, aux = forward(params, config, batch["tokens"], segments, ("router_logits",))
        valid = batch["mask"].reshape(-1)
        logits.append([np.asarray(a["router_logits"], np.float64)[valid] for a in aux["layers"]])

    def cosine(vectors):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit @ unit.T

    for i, layer in plan.layers.items():
        arrays = stats.layers[i]
        columns = np.concatenate([part[i] for part in logits]).T
        flat = [
            np.asarray(leaf).reshape(EXPERTS, -1) for leaf in moe_of(params, i)["experts"].values()
        ]
        similar = {
            "router": cosine(columns),
            "output": cosine(arrays["output_mean"]),
            "weights": cosine(np.concatenate(flat, 1)),
            "output_and_router": cosine(columns) + cosine(arrays["gated_output"]),
        }[similarity]
        kept = set(np.argsort(-arrays["count"], kind="stable")[:3].tolist())
        expected = {k: set() for k in kept}
        for e in set(range(EXPERTS)) - kept:
            expected[max(kept, key=lambda k, e=e: similar[k, e])].add(e)
        wanted = {(k, frozenset(others)) for k, others in expected.items() if others}
        assert groups_of(layer) == wanted
        for merge in layer.merges:
            counts = arrays["count"][[merge.kept, *merge.removed]]
            np.testing.assert_allclose(merge.weights, counts / counts.sum(), rtol=1e-12)


@pytest.mark.parametrize("name", sorted(MERGE_RECIPES))
def test_permuting_experts_permutes_the_result(stats, name):
    params, config = tiny_model("olmoe")
    order = np.random.default_rng(1).permutation(EXPERTS)  # new id -> old id

    def permute(experts, kernel):
        return {k: leaf[order] for k, leaf in experts.items()}, kernel[:, order]

    def permute_array(array):
        array = array[order]
        return array[:, order] if array.shape[1:] == (EXPERTS,) else array

    shuffled = params
    for i in config.moe_layers:
        shuffled = with_experts(shuffled, permute, i)
    layers = {
        i: {k: permute_array(array) for k, array in arrays.items()}
        for i, arrays in stats.layers.items()
    }
    plan, _ = planned(name, stats, params, config)
    other, _ = planned(name, dataclasses.replace(stats, layers=layers), shuffled, config)
    _, a = apply_plan(params, config, plan)
    _, b = apply_plan(shuffled, config, other)
    for i in config.moe_layers:
        renamed = {
            (int(order[kept]), frozenset(order[list(removed)].tolist()))
            for kept, removed in groups_of(other.layers[i])
        }
        assert renamed == groups_of(plan.layers[i])
        stay_a = [e for e in range(EXPERTS) if e not in plan.layers[i].vanishing]
        stay_b = [int(order[e]) for e in range(EXPERTS) if e not in other.layers[i].vanishing]
        rows = [stay_b.index(e) for e in stay_a]
        old, new = moe_of(a, i), moe_of(b, i)
        for key, leaf in old["experts"].items():
            np.testing.assert_allclose(new["experts"][key][np.array(rows)], leaf, **ROUNDING)
        kernel = new["router"]["kernel"][:, np.array(rows)]
        np.testing.assert_allclose(kernel, old["router"]["kernel"], **ROUNDING)


def similarities(seed: int, experts: int = 8) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(experts, 3))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit @ unit.T


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(2, 8))
def test_groups_have_room_for_all_and_no_one_would_swap(seed, cap):
    """Whoever is not with the most similar expert finds that group full of more similar ones."""
    kept, similar = [1, 4, 6, 7], similarities(seed)
    groups = join_nearest(kept, similar, cap)
    assert sorted(e for group in groups for e in group) == list(range(8))
    assert [group[0] for group in groups] == kept
    assert max(map(len, groups)) <= cap
    home = {e: group for group in groups for e in group}
    for e in set(range(8)) - set(kept):
        for group in groups:
            if similar[group[0], e] > similar[home[e][0], e]:
                assert len(group) == cap
                assert min(similar[group[0], f] for f in group[1:]) > similar[group[0], e]


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(2, 8))
def test_the_most_salient_take_their_nearest_first(seed, cap):
    kept, similar = [1, 4, 6, 7], similarities(seed)
    scores = np.random.default_rng(seed).permutation(8).astype(float)
    groups = {group[0]: group for group in join_salient_first(kept, similar, scores, cap)}
    assert sorted(e for group in groups.values() for e in group) == list(range(8))
    left = set(range(8)) - set(kept)
    for k in sorted(kept, key=lambda e: -scores[e]):
        joined = groups[k][1:]
        assert len(joined) == min(cap - 1, len(left))
        left -= set(joined)
        if joined and left:
            assert min(similar[k, joined]) > max(similar[k, list(left)])


def clusters_by_hand(distance: np.ndarray, count: int) -> set[frozenset[int]]:
    """Joins, again and again, the two groups with the least mean distance between members."""
    found = [[e] for e in range(len(distance))]
    while len(found) > count:
        a, b = min(
            itertools.combinations(found, 2),
            key=lambda pair: distance[np.ix_(*pair)].mean(),
        )
        found = [group for group in found if group is not a and group is not b] + [a + b]
    return {frozenset(group) for group in found}


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 8))
def test_clusters_have_average_linkage(seed, count):
    rng = np.random.default_rng(seed)
    points, scores = rng.normal(size=(8, 3)), rng.permutation(8).astype(float)
    distance = np.linalg.norm(points[:, None] - points, axis=-1)
    groups = clusters(distance, count, scores)
    assert {frozenset(group) for group in groups} == clusters_by_hand(distance, count)
    assert all(scores[group[0]] == scores[group].max() for group in groups)


def test_equal_distances_still_give_the_number_of_clusters():
    """Such as experts that no token reached: their mean outputs are all zero."""
    for count in range(1, 7):
        assert len(clusters(np.zeros((6, 6)), count, np.ones(6))) == count


def test_hc_smoe_keeps_the_dominant_of_each_cluster(stats):
    params, config = tiny_model("olmoe")
    for similarity, name in (("output", "output_mean"), ("router", None), ("weights", None)):
        plan, _ = planned("hc_smoe", stats, params, config, similarity=similarity)
        for i, layer in plan.layers.items():
            count = stats.layers[i]["count"]
            assert len(layer.vanishing) == EXPERTS - 3
            assert not layer.merge_align
            for merge in layer.merges:
                assert count[merge.kept] == count[[merge.kept, *merge.removed]].max()
            if name is not None:
                means = stats.layers[i][name].astype(np.float64)
                distance = np.linalg.norm(means[:, None] - means, axis=-1)
                expected = {g for g in clusters_by_hand(distance, 3) if len(g) > 1}
                assert {frozenset({m.kept, *m.removed}) for m in layer.merges} == expected


def test_ream_keeps_router_rows_and_fills_the_first_groups(stats):
    params, config = tiny_model("olmoe")
    plan, recipe = planned("ream", stats, params, config)
    scores = score(stats, "reap")
    assert recipe.cap == 16
    for i, layer in plan.layers.items():
        best = int(scores[i].argmax())
        others = set(np.argsort(-scores[i])[3:].tolist())
        assert groups_of(layer) == {(best, frozenset(others))}
        (merge,) = layer.merges
        shares = scores[i][[best, *merge.removed]]
        np.testing.assert_allclose(merge.weights, shares / shares.sum(), rtol=1e-12)
    _, merged = apply_plan(params, config, plan)
    for i, layer in plan.layers.items():
        stay = [e for e in range(EXPERTS) if e not in layer.vanishing]
        kernel = moe_of(params, i)["router"]["kernel"][:, np.array(stay)]
        np.testing.assert_array_equal(moe_of(merged, i)["router"]["kernel"], kernel)


def test_groups_that_no_token_chose_keep_their_first_expert(stats):
    params, config = tiny_model("olmoe")
    layers = {i: {**arrays, "count": np.zeros(EXPERTS, int)} for i, arrays in stats.layers.items()}
    unused = dataclasses.replace(stats, layers=layers)
    scores = {i: np.arange(EXPERTS, 0.0, -1) for i in layers}
    deletion = make_plan(scores, config, keep_experts=2, replacement="delete")
    plan = merge_plan(deletion, unused, config, scores, MERGE_RECIPES["m_smoe"])
    _, merged = apply_plan(params, config, plan)
    for (_, a), (_, b) in zip(
        leaves_with_path(merged),
        leaves_with_path(apply_plan(params, config, deletion)[1]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_novices_join_no_group(stats):
    params, config = tiny_model("olmoe")
    first = Plan({i: LayerPlan(novices=(1, 4)) for i in config.moe_layers})
    config, params = apply_plan(params, config, first, stats)
    stats = calibrate(params, config, token_batches(), warn=False)
    for name in MERGE_RECIPES:
        plan, _ = planned(name, stats, params, config, keep=2)
        small, merged = apply_plan(params, config, plan)
        for i, layer in plan.layers.items():
            members = {e for merge in layer.merges for e in (merge.kept, *merge.removed)}
            assert not members & {1, 4}
            assert (small.moe(i).num_experts, len(small.moe(i).novice_ids)) == (4, 2)
            np.testing.assert_array_equal(
                moe_of(merged, i)["novices"]["constant"], moe_of(params, i)["novices"]["constant"]
            )


def test_what_else_a_plan_cuts_stays_in_it(stats):
    _, config = tiny_model("phimoe")
    scores = {i: np.arange(EXPERTS, dtype=float) for i in config.moe_layers}
    groups = {i: np.arange(2.0) for i in range(config.num_layers)}
    deletion = make_plan(
        scores, config, keep_experts=4, replacement="delete", group_scores=groups, kv_groups=1
    )
    plan = merge_plan(deletion, stats, config, scores, MergeRecipe("frequency"))
    for i, layer in plan.layers.items():
        assert layer.kv_groups == (1,)
        assert layer.vanishing == frozenset(deletion.layers[i].deleted) == {0, 1}
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cap": 1}, "merge_cap must be at least 2, got 1"),
        ({"similarity": "logits"}, "merge_similarity must be one of .*got 'logits'"),
        ({"weights": "counts"}, "merge_weights must be one of .*got 'counts'"),
        ({"router": "sum"}, "merge_router must be one of .*got 'sum'"),
        ({"grouping": "clusters", "cap": 4}, "clusters have no merge_cap, got 4"),
        ({"grouping": "clusters", "similarity": "output_and_router"}, "do not add up"),
    ],
)
def test_impossible_recipes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MergeRecipe("frequency", **changes)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            MergeRecipe("reap", cap=2, similarity="output"),
            "layer 0: 2 clusters of at most merge_cap = 2 .* cannot hold 6",
        ),
        (MergeRecipe("reap", similarity="weights"), "needs the model's params"),
        (MergeRecipe("reap", similarity="output_and_router"), "needs .'router_gram'. of layer 0"),
        (MergeRecipe("reap", weights="score", similarity="output"), "0 or more, got -1"),
    ],
)
def test_merges_that_cannot_be_planned_are_refused(stats, recipe, message):
    config = tiny_config()
    layers = {
        i: {name: array for name, array in arrays.items() if name != "router_gram"}
        for i, arrays in stats.layers.items()
    }
    scores = {i: np.arange(EXPERTS) - 1.0 for i in config.moe_layers}
    deletion = make_plan(scores, config, keep_experts=2, replacement="delete")
    with pytest.raises(ValueError, match=message):
        merge_plan(deletion, dataclasses.replace(stats, layers=layers), config, scores, recipe)


def test_clusters_keep_to_no_groups_of_ids(stats):
    config = tiny_config()
    scores = score(stats, "frequency")
    deletion = make_plan(
        scores, config, keep_experts=2, replacement="delete", scope="group", num_groups=2
    )
    with pytest.raises(ValueError, match=r"clusters .*got 'group'"):
        merge_plan(deletion, stats, config, scores, MERGE_RECIPES["hc_smoe"])
    merged = merge_plan(deletion, stats, config, scores, MERGE_RECIPES["m_smoe"])
    for layer in merged.layers.values():
        kept = set(range(EXPERTS)) - layer.vanishing
        assert [len(kept & set(group)) for group in ((0, 1, 2), (3, 4, 5))] == [1, 1]


def test_layers_without_experts_are_passed_over(stats):
    params, config = tiny_model("qwen3_moe")
    assert not isinstance(config.layers[1].feed_forward, MoeConfig)
    stats = calibrate(params, config, token_batches(), warn=False)
    plan, _ = planned("m_smoe", stats, params, config)
    small, merged = apply_plan(params, config, plan)
    assert [small.moe(i).num_experts for i in small.moe_layers] == [3, 3]
    assert np.isfinite(forward(merged, small, token_batches(1)[0]["tokens"])[0]).all()
