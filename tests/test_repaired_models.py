"""OBS and repair in a whole model: scores, plans, pruned weights, exports, runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import EXPERT_WIDTH, EXPERTS, tiny_model, token_batches
from tiny_hf import save_tiny, torch_logits
from tiny_run import make_run, save_model, settings

from moe_jax.calibrate import calibrate
from moe_jax.compress import compress
from moe_jax.hf import load_hf, save_hf
from moe_jax.model import forward
from moe_jax.plan import Cut, LayerPlan, Merge, Plan, make_plan
from moe_jax.processes import make_mesh, spec_tree
from moe_jax.prune import apply_plan
from moe_jax.repair import RIDGE
from moe_jax.report import summary_table
from moe_jax.scoring import MODEL_CRITERIA, score

# Linear systems of 8 by 8, float32 statistics of a few dozen tokens.
ROUNDING = {"rtol": 2e-3, "atol": 2e-4}


@pytest.fixture(scope="module", params=["olmoe", "qwen3_moe"])
def measured(request):
    params, config = tiny_model(request.param)
    batches = token_batches(6)
    return params, config, batches, calibrate(params, config, batches, second_moments=True)


def plan_of(measured, criterion="obs", **size):
    params, config, _, stats = measured
    return make_plan(score(stats, criterion, model=(params, config)), config, repair=True, **size)


def plain_repair(gram, down, kept):
    """From the definition, in float64."""
    gram, down = gram.astype(np.float64), np.asarray(down, np.float64)
    gone = np.setdiff1d(np.arange(len(down)), kept)
    inner = gram[np.ix_(kept, kept)]
    ridge = RIDGE * np.diag(np.diag(inner))
    return down[kept] + np.linalg.solve(inner + ridge, gram[np.ix_(kept, gone)] @ down[gone])


def test_pruned_weights_equal_a_float64_computation(measured):
    params, config, _, stats = measured
    plan = plan_of(measured, expert_width=5)
    _, pruned = apply_plan(params, config, plan, stats)
    for i in config.moe_layers:
        before = params["layers"][i]["moe"]["experts"]
        after = pruned["layers"][i]["moe"]["experts"]
        for e in range(EXPERTS):
            kept = list(plan.layers[i].neurons[e])
            gram = stats.layers[i]["hidden_gram"][e, :-1, :-1]
            expected = plain_repair(gram, before["down"][e], kept)
            np.testing.assert_allclose(after["down"][e], expected, **ROUNDING)
            np.testing.assert_array_equal(after["gate"][e], before["gate"][e][:, kept])


def outputs(params, config, batches):
    """Hidden states after the first layer with experts, of tokens that are no padding."""
    first = config.moe_layers[0]
    found = []
    for batch in batches:
        segments = jnp.asarray(batch["mask"], jnp.int32)
        _, aux = forward(params, config, batch["tokens"], segments, ("layer_output",))
        found.append(np.asarray(aux["layers"][first]["layer_output"])[batch["mask"]])
    return np.concatenate(found)


@pytest.mark.parametrize("scope", ["expert", "layer"])
def test_repair_brings_the_layer_closer_to_what_it_was(measured, scope):
    params, config, batches, stats = measured
    plan = plan_of(measured, expert_width=4, neuron_scope=scope)
    without = Plan(
        {
            i: LayerPlan(neurons=layer.neurons, padded_width=layer.padded_width)
            for i, layer in plan.layers.items()
        }
    )
    whole = outputs(params, config, batches)
    errors = []
    for each in (plan, without):
        smaller, pruned = apply_plan(params, config, each, stats)
        errors.append(np.square(outputs(pruned, smaller, batches) - whole).sum())
    assert errors[0] < errors[1]


@pytest.mark.parametrize("criterion", MODEL_CRITERIA)
def test_keeping_all_is_the_identity(measured, criterion):
    params, config, _, stats = measured
    plan = plan_of(measured, criterion, expert_width=EXPERT_WIDTH)
    smaller, pruned = apply_plan(params, config, plan, stats)
    assert smaller == config
    jax.tree.map(np.testing.assert_array_equal, pruned, params)


def test_permuting_experts_permutes_the_scores(measured):
    params, config, _, stats = measured
    order = np.random.default_rng(0).permutation(EXPERTS)
    first = config.moe_layers[0]
    layer = stats.layers[first]
    shuffled = {name: a[order] for name, a in layer.items() if a.shape[0] == EXPERTS}
    layers = [dict(part) for part in params["layers"]]
    moe = dict(layers[first]["moe"])
    moe["experts"] = {name: leaf[order] for name, leaf in moe["experts"].items()}
    layers[first]["moe"] = moe
    again = type(stats)({first: shuffled}, 1, 1, 1)
    for criterion in MODEL_CRITERIA:
        expected = score(stats, criterion, model=(params, config))[first][order]
        found = score(again, criterion, model=({**params, "layers": layers}, config))[first]
        np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("scope", ["expert", "layer"])
def test_experts_that_few_or_no_tokens_reached(scope):
    """Nothing is NaN; the weights that an unreached expert keeps stay as they were."""
    params, config = tiny_model()
    few = [{"tokens": np.array([[1, 2, 3]]), "mask": np.ones((1, 3), bool)}]
    stats = calibrate(params, config, few, second_moments=True, warn=False)
    assert len(stats.unreached()) > 2
    scores = score(stats, "obs", model=(params, config))
    plan = make_plan(scores, config, expert_width=4, repair=True, neuron_scope=scope)
    _, pruned = apply_plan(params, config, plan, stats)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(pruned))
    for i in config.moe_layers:
        for e in np.flatnonzero(stats.layers[i]["count"] == 0):
            assert not scores[i][e].any()
            kept = list(plan.layers[i].neurons[e])
            assert kept == (list(range(4)) if scope == "expert" else [0])
            before, after = (p["layers"][i]["moe"]["experts"] for p in (params, pruned))
            rows = np.asarray(before["down"][e])[kept]
            np.testing.assert_array_equal(after["down"][e][: len(kept)], rows)


def test_sharded_equals_single(measured):
    params, config, _, stats = measured
    plan = plan_of(measured, expert_width=4)
    _, single = apply_plan(params, config, plan, stats)
    mesh = make_mesh({"expert": 2, "data": 4})
    _, sharded = apply_plan(jax.device_put(params, spec_tree(config, mesh)), config, plan, stats)
    first = config.moe_layers[0]
    down = sharded["layers"][first]["moe"]["experts"]["down"]
    assert down.sharding.spec[0] == "expert"
    np.testing.assert_allclose(down, single["layers"][first]["moe"]["experts"]["down"], **ROUNDING)


def test_the_stock_class_loads_a_repaired_model(tmp_path):
    source = save_tiny(tmp_path / "source", "qwen3_moe")
    config, params = load_hf(source, dtype="float32")
    batches = [
        {"tokens": batch["tokens"] % config.vocab_size, "mask": batch["mask"]}
        for batch in token_batches(4)
    ]
    stats = calibrate(params, config, batches, second_moments=True, warn=False)
    scores = score(stats, "obs", model=(params, config))
    plan = make_plan(scores, config, width_ratio=0.5, repair=True)
    smaller, pruned = apply_plan(params, config, plan, stats)
    save_hf(tmp_path / "out", pruned, smaller, source=source)
    tokens = batches[0]["tokens"][:1]
    ours, _ = forward(pruned, smaller, tokens)
    np.testing.assert_allclose(ours, torch_logits(tmp_path / "out", tokens), 0, 2e-4)


def test_bad_requests_are_refused(measured):
    params, config, batches, stats = measured
    with pytest.raises(ValueError, match="needs the weights"):
        score(stats, "obs")
    plain = calibrate(params, config, batches[:1], warn=False)
    with pytest.raises(ValueError, match="calibrate with second_moments=True"):
        score(plain, "obs", model=(params, config))
    plan = plan_of(measured, expert_width=4)
    for wrong in (None, plain):
        with pytest.raises(ValueError, match=r"plan layer 0: repair needs statistics"):
            apply_plan(params, config, plan, wrong)
    with pytest.raises(
        ValueError, match="repair = True needs a ranking of neurons, got scores of experts"
    ):
        make_plan(score(stats, "mone"), config, keep_experts=4, repair=True)
    merged = LayerPlan(merges=(Merge(0, (1,), (1.0, 1.0)),), repair=True)
    with pytest.raises(ValueError, match="repair and merges exclude"):
        apply_plan(params, config, Plan({0: merged}), stats)


def test_a_run_and_its_plan_applied_again(tmp_path):
    """``method="obs"`` repairs, loads in the stock class, and its plan file gives the same."""
    save_model(tmp_path / "model", "olmoe")
    report, paths = compress(make_run(tmp_path, {"method": "obs", "width_ratio": 0.5}))
    assert report["stages"][0]["layers"][0]["importance"]
    named = [layer["fewer_tokens_than_neurons"] for layer in report["stages"][0]["layers"]]
    assert named == [[] for _ in named]
    (file,) = (tmp_path / "out/plans").glob("*.json")
    plan = Plan.from_json(file.read_text())
    assert plan.method == "obs"
    assert all(layer.repair for layer in plan.layers.values())
    config, params = load_hf(paths["checkpoint"])
    tokens = np.random.default_rng(0).integers(0, 15, (2, 12))
    ours, _ = forward(params, config, tokens)
    np.testing.assert_allclose(ours, torch_logits(paths["checkpoint"], tokens), 0, 2e-4)
    again = make_run(tmp_path, {"plan": str(file)}, output=str(tmp_path / "again"))
    _, same = compress(again)
    jax.tree.map(np.testing.assert_array_equal, load_hf(same["checkpoint"])[1], params)


def test_a_report_names_experts_with_fewer_tokens_than_neurons(tmp_path):
    save_model(tmp_path / "model", "olmoe")
    few = settings(tmp_path)["calibration"] | {"num_sequences": 2, "seq_len": 4}
    obs = {"method": "obs", "width_ratio": 0.5}
    run = make_run(tmp_path, obs, calibration=few, evaluation={})
    report, paths = compress(run)
    (stage,) = report["stages"]
    width = load_hf(tmp_path / "model")[0].moe(0).expert_width
    expected = [[e for e, n in enumerate(part["count"]) if n < width] for part in stage["layers"]]
    assert [part["fewer_tokens_than_neurons"] for part in stage["layers"]] == expected
    assert any(expected)
    told = next(text for text in report["warnings"] if "fewer tokens than they have" in text)
    assert told.startswith(f"Stage 0: {sum(map(len, expected))} of ")
    assert told in summary_table(report)
    assert "Experts with fewer tokens than neurons" in paths["report.html"].read_text()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_hf(paths["checkpoint"])[1]))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"method": "obs", "expert_width": 4}, (True, True, ())),
        ({"importance": "energy", "width_ratio": 0.5}, (False, True, ())),
        ({"importance": "fisher", "width_ratio": 0.5}, (False, False, ("lm",))),
        ({"importance": "fisher", "width_ratio": 0.5, "repair": True}, (True, True, ("lm",))),
        ({"method": "obs", "width_ratio": 0.5, "repair": False}, (False, True, ())),
    ],
)
def test_what_a_stage_needs(fields, expected):
    stage = Cut.from_dict(fields, "stages[0]")
    assert (stage.repairs, stage.needs_second_moments, stage.losses) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"method": "obs", "width_ratio": 0.5, "importance": "lm"},
            "needs method 'slim'",
        ),
        (
            {"method": "mone", "keep_ratio": 0.5, "repair": True},
            "needs a ranking of neurons",
        ),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        Cut.from_dict(fields, "stages[0]")
