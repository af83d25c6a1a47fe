"""OBS layer by layer: equal to one pass where nothing was cut before, and to its own definition."""

from __future__ import annotations

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_model, token_batches
from tiny_hf import torch_logits
from tiny_run import make_run, save_model

from moe_jax.calibrate import LayerMeasurement, Measurement, calibrate_domains, memory
from moe_jax.compress import compress
from moe_jax.config import DenseConfig
from moe_jax.hf import load_hf
from moe_jax.model import forward, hidden_states
from moe_jax.plan import Cut, LayerPlan, Plan, make_plan, plan_cut
from moe_jax.prune import apply_plan
from moe_jax.prune.sequential import sequential_cut
from moe_jax.repair import RIDGE
from moe_jax.run.stage import StageConfig
from moe_jax.scoring import score
from moe_jax.statistics import Stats

FAMILIES = ["olmoe", "phimoe", "qwen3_moe"]
DOMAINS = {"one": token_batches(3), "other": token_batches(2, seed=1)}
WIDTH = 4


def in_turn(params, config, domains, **fields):
    """A sequential cut; ``fields`` are its own and those of the cut."""
    names = ("second_moment_bytes", "dtype")
    measured = LayerMeasurement(**{name: fields.pop(name) for name in names if name in fields})
    keep = fields.pop("keep_second_moments", False)
    cut = Cut("obs", **fields)
    return sequential_cut(params, config, domains, cut, measured, keep_second_moments=keep)


def cut(family, **options):
    params, config = tiny_model(family)
    size = {} if "width_ratio" in options else {"expert_width": WIDTH}
    return in_turn(params, config, DOMAINS, **size, **options)


@pytest.fixture(scope="module", params=FAMILIES)
def sequential(request):
    return request.param, cut(request.param, keep_second_moments=True, repair_target="own")


def one_pass(family, scope="expert"):
    params, config = tiny_model(family)
    stats = calibrate_domains(params, config, DOMAINS, Measurement(second_moments=True))
    scores = score(stats, "obs", model=(params, config))
    plan = make_plan(scores, config, expert_width=WIDTH, repair=True, neuron_scope=scope)
    return stats, plan, apply_plan(params, config, plan, stats)[1]


def test_the_first_layer_is_that_of_one_pass_to_the_bit(sequential):
    family, found = sequential
    stats, plan, params = one_pass(family)
    first = found.config.moe_layers[0]
    expected = stats.layers[first]
    assert found.stats.layers[first].keys() == {*expected, "removal_cost"}
    for name, array in expected.items():
        np.testing.assert_array_equal(found.stats.layers[first][name], array, err_msg=name)
    assert found.stats.attention.keys() == stats.attention.keys()
    for i, arrays in stats.attention.items():  # of dense layers, too
        for name, array in arrays.items():
            np.testing.assert_array_equal(found.stats.attention[i][name], array)
    assert found.plan.layers[first] == plan.layers[first]
    mine, theirs = found.params["layers"][first], params["layers"][first]
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)
    towards_original = cut(family).params["layers"][first]
    jax.tree.map(np.testing.assert_array_equal, towards_original, theirs)
    assert (found.stats.tokens, found.stats.sequences) == (stats.tokens, stats.sequences)
    for name, told in stats.facts["domains"].items():
        mine = found.stats.facts["domains"][name]
        assert mine["tokens"] == told["tokens"]
        assert mine["count"][str(first)] == told["count"][str(first)]
        assert mine["count"].keys() == told["count"].keys()


def test_each_layer_is_measured_on_the_compressed_prefix(sequential):
    """By definition: calibrate the model whose layers up to this one are cut, but not this one."""
    family, found = sequential
    params, config = tiny_model(family)
    last = config.moe_layers[-1]
    layers = [*found.config.layers[:last], *config.layers[last:]]
    weights = [*found.params["layers"][:last], *params["layers"][last:]]
    prefix = {**params, "layers": weights}
    half = dataclasses.replace(config, layers=tuple(layers))
    stats = calibrate_domains(prefix, half, DOMAINS, Measurement(second_moments=(last,)))
    for name, array in stats.layers[last].items():
        np.testing.assert_allclose(
            found.stats.layers[last][name], array, rtol=2e-5, atol=1e-5, err_msg=name
        )
    plan = make_plan(
        score(
            Stats({0: found.stats.layers[last]}, 1, 1, 1),
            "obs",
            model=({"layers": [weights[last]]}, dataclasses.replace(config, layers=layers[last:])),
        ),
        dataclasses.replace(config, layers=(config.layers[last],)),
        expert_width=WIDTH,
        repair=True,
    )
    assert found.plan.layers[last] == plan.layers[0]


def test_the_plan_applied_to_the_statistics_gives_the_same_weights(sequential, tmp_path):
    family, found = sequential
    params, config = tiny_model(family)
    found.stats.save(tmp_path / "stats")
    plan = Plan.from_json(found.plan.to_json())
    smaller, again = apply_plan(params, config, plan, Stats.load(tmp_path / "stats"))
    assert smaller == found.config
    jax.tree.map(np.testing.assert_array_equal, again, found.params)
    assert plan.method == "obs"
    assert plan.settings["sequential"] is True


def test_second_moments_are_let_go(sequential):
    family, found = sequential
    again = cut(family, repair_target="own")
    assert all("hidden_gram" not in layer for layer in again.stats.layers.values())
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_across_a_layer_all_are_padded_to_the_widest(family):
    found = cut(family, neuron_scope="layer", keep_second_moments=True)
    params, config = tiny_model(family)
    _, again = apply_plan(params, config, found.plan, found.stats)
    jax.tree.map(np.testing.assert_array_equal, again, found.params)
    widths = {plan.padded_width for plan in found.plan.layers.values()}
    assert widths == {found.config.moe(i).expert_width for i in config.moe_layers}
    first = config.moe_layers[0]
    assert found.plan.layers[first].neurons == one_pass(family, "layer")[1].layers[first].neurons
    tokens = token_batches(1)[0]["tokens"]
    logits = [forward(p, found.config, tokens)[0] for p in (found.params, again)]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("active_share", [0, 0.5])
def test_own_widths_and_constants(active_share):
    params, config = tiny_model()
    found = cut(
        "olmoe",
        neuron_scope="layer",
        own_widths=True,
        constants=True,
        active_share=active_share,
        keep_second_moments=True,
    )
    widths = [found.config.moe(i).expert_widths for i in config.moe_layers]
    assert any(len(set(each)) > 1 for each in widths)
    assert all(found.config.moe(i).expert_bias for i in config.moe_layers)
    smaller, again = apply_plan(params, config, found.plan, found.stats)
    assert smaller == found.config
    jax.tree.map(np.testing.assert_array_equal, again, found.params)


def test_keeping_all_is_the_identity():
    params, config = tiny_model()
    found = in_turn(params, config, DOMAINS, width_ratio=1.0, repair_target="own")
    assert found.config == config
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


def test_the_residual_stream_is_that_of_the_model():
    """With all kept, every layer's statistics are those of one pass, up to rounding."""
    params, config = tiny_model("qwen3_moe")
    found = in_turn(
        params,
        config,
        DOMAINS,
        width_ratio=1.0,
        repair_target="own",
        keep_second_moments=True,
    )
    stats = calibrate_domains(params, config, DOMAINS, Measurement(second_moments=True))
    for i, layer in stats.layers.items():
        for name, array in layer.items():
            np.testing.assert_allclose(
                found.stats.layers[i][name], array, rtol=2e-5, atol=1e-5, err_msg=f"{i} {name}"
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_originals_stream_as_target_equals_float64_least_squares(family):
    """Each expert of the last layer by itself: its rows, and its share of the gap, stacked."""
    found = cut(family, keep_second_moments=True)
    params, config = tiny_model(family)
    last = config.moe_layers[-1]
    prefix = {
        **params,
        "layers": [*found.params["layers"][:last], *params["layers"][last:]],
    }
    half = dataclasses.replace(config, layers=(*found.config.layers[:last], *config.layers[last:]))
    rows = {e: ([], [], []) for e in range(config.moe(last).num_experts)}
    taps = ("layer_output", "hidden", "row_token", "row_weight", "group_sizes")
    for batch in (b for domain in DOMAINS.values() for b in domain):
        segments = jnp.asarray(batch["mask"], jnp.int32)
        streams = []
        for each, shape in ((params, config), (prefix, half)):
            _, aux = forward(each, shape, batch["tokens"], segments, taps)
            streams.append({k: np.asarray(v, np.float64) for k, v in aux["layers"][last].items()})
        original, now = streams
        gap = (original["layer_output"] - now["layer_output"]).reshape(-1, config.width)
        token = now["row_token"].astype(int)
        used = int(now["group_sizes"].sum())
        squares = np.zeros(len(gap))
        np.add.at(squares, token[:used], now["row_weight"][:used] ** 2)
        ends = np.cumsum(now["group_sizes"]).astype(int)
        for e, end in enumerate(ends):
            part = slice(end - int(now["group_sizes"][e]), end)
            weight = now["row_weight"][part, None]
            change = weight * gap[token[part]] / squares[token[part], None]
            for kept, new in zip(rows[e], (weight, now["hidden"][part], change), strict=True):
                kept.append(new)
    for e, parts in rows.items():
        weight, hidden, change = map(np.concatenate, parts)
        down = np.asarray(params["layers"][last]["moe"]["experts"]["down"][e], np.float64)
        kept = list(found.plan.layers[last].neurons[e])
        system = weight * hidden
        penalty = np.diag(np.sqrt(RIDGE * np.square(system[:, kept]).sum(0)))
        goal = np.concatenate([system @ down + weight * change, penalty @ down[kept]])
        expected = np.linalg.lstsq(np.concatenate([system[:, kept], penalty]), goal, rcond=None)[0]
        after = found.params["layers"][last]["moe"]["experts"]["down"][e]
        np.testing.assert_allclose(after, expected, rtol=5e-3, atol=5e-4, err_msg=str(e))
    _, again = apply_plan(params, config, found.plan, found.stats)
    jax.tree.map(np.testing.assert_array_equal, again, found.params)


def test_the_originals_stream_is_come_nearer_to():
    params, config = tiny_model("qwen3_moe")
    errors = []
    for target in ("own", "original"):
        found = cut("qwen3_moe", repair_target=target)
        error = 0.0
        for batch in (b for domain in DOMAINS.values() for b in domain):
            segments = jnp.asarray(batch["mask"], jnp.int32)
            states = [
                hidden_states(p, c, batch["tokens"], segments, ("layer_output",))[1]["layers"][-1]
                for p, c in ((params, config), (found.params, found.config))
            ]
            gap = states[0]["layer_output"] - states[1]["layer_output"]
            error += float(np.square(np.asarray(gap)[batch["mask"]]).sum())
        errors.append(error)
    assert errors[1] < errors[0]


def test_computation_in_another_dtype_leaves_that_of_the_weights():
    params, config = tiny_model()
    found = in_turn(params, config, DOMAINS, expert_width=WIDTH, dtype=jnp.bfloat16)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(found.params)}
    assert dtypes == {np.dtype("float32")}


def test_what_it_takes_is_logged_and_checked_before_any_work(caplog, monkeypatch):
    params, config = tiny_model()
    with caplog.at_level(logging.INFO, "moe_jax"):
        in_turn(params, config, DOMAINS, expert_width=WIDTH)
    # 5 batches of 4 x 12 tokens, 16 wide, float32.
    assert "the residual stream of 240 positions takes 30.7 kB of host memory" in caplog.text
    with pytest.raises(ValueError, match=r"expert_width must be in \[1, 8\], got 9"):
        in_turn(params, config, DOMAINS, expert_width=9)
    with pytest.raises(ValueError, match="exactly one of"):
        in_turn(params, config, DOMAINS)
    with pytest.raises(ValueError, match="neuron_scope 'model' needs own_widths"):
        in_turn(params, config, DOMAINS, expert_width=WIDTH, neuron_scope="model")
    for nothing in ({}, {"none": []}, {**DOMAINS, "none": []}):
        with pytest.raises(ValueError, match="needs text"):
            in_turn(params, config, nothing, expert_width=WIDTH)
    dense = dataclasses.replace(config.layers[0], feed_forward=DenseConfig(12))
    without_experts = dataclasses.replace(config, layers=(dense, dense))
    with pytest.raises(ValueError, match="needs a model with experts"):
        in_turn(params, without_experts, DOMAINS, expert_width=WIDTH)
    with pytest.raises(ValueError, match="second_moment_bytes = 100 B"):
        in_turn(params, config, DOMAINS, expert_width=WIDTH, second_moment_bytes=100)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 10_000)
    with pytest.raises(ValueError, match=r"takes 30.7 kB of host memory, of which 10 kB are"):
        in_turn(params, config, DOMAINS, expert_width=WIDTH)


def test_errors_name_the_layer():
    params, config = tiny_model("qwen3_moe")
    narrow = config.replace_moe(2, expert_width=3)
    with pytest.raises(ValueError, match=r"layer 2: expert_width must be in \[1, 3\], got 4"):
        in_turn(params, narrow, DOMAINS, expert_width=WIDTH)
    layers = [dict(layer) for layer in params["layers"]]
    experts = layers[2]["moe"]["experts"]
    silent = {**experts, "down": jnp.zeros_like(experts["down"])}
    layers[2]["moe"] = {**layers[2]["moe"], "experts": silent}
    with pytest.raises(ValueError, match=r"obs scores of layers \[2\] are all zero"):
        in_turn({**params, "layers": layers}, config, DOMAINS, expert_width=WIDTH)


def test_new_novices_come_near_to_the_originals_stream():
    """An expert that keeps no neuron is a constant: its mean output, and its share of the gap."""
    params, config = tiny_model()
    last = config.moe_layers[-1]
    measured = cut("olmoe", keep_second_moments=True).stats
    gone = (1, 4)
    plan = Plan({last: LayerPlan(novices=gone, novice_value="least_squares")})
    _, pruned = apply_plan(params, config, plan, measured)
    arrays = measured.layers[last]
    assert np.abs(arrays["hidden_gap"][list(gone), -1]).max() > 0.1
    for row, e in enumerate(gone):
        gram = arrays["hidden_gram"][e].astype(np.float64)
        down = np.asarray(params["layers"][last]["moe"]["experts"]["down"][e], np.float64)
        wanted = gram[-1, :-1] @ down + arrays["hidden_gap"][e, -1]
        expected = wanted / (gram[-1, -1] * (1 + RIDGE))
        constant = pruned["layers"][last]["moe"]["novices"]["constant"][row]
        np.testing.assert_allclose(constant, expected, rtol=2e-3, atol=2e-5)


STAGE = {"method": "obs", "width_ratio": 0.5, "sequential": True}


def written(folder):
    """Files of a folder, and when each was written."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_a_run_goes_on_from_what_it_left(tmp_path):
    save_model(tmp_path / "model", "qwen3_moe")
    report, paths = compress(make_run(tmp_path, STAGE))
    (stage,) = report["stages"]
    assert stage["settings"]["sequential"] is True
    for layer in stage["layers"]:
        assert layer["expert_width"] == [8, 4]
        assert layer["importance"]["kept_share"]
        assert "fewer_tokens_than_neurons" in layer
    assert stage["layers"][0]["frequency"].keys() == {"prose", "code"}
    assert stage["confidence"]["coverage"]["tokens"] > 0
    config, params = load_hf(paths["checkpoint"])
    tokens = np.random.default_rng(0).integers(0, 15, (2, 12))
    ours, _ = forward(params, config, tokens)
    np.testing.assert_allclose(ours, torch_logits(paths["checkpoint"], tokens), 0, 2e-4)

    # Without the export, the weights come from what the stage left.
    (paths["checkpoint"] / "moe_jax_run.json").unlink()
    left = written(tmp_path / "out/cuts")
    _, again = compress(make_run(tmp_path, STAGE))
    assert written(tmp_path / "out/cuts") == left
    jax.tree.map(np.testing.assert_array_equal, load_hf(again["checkpoint"])[1], params)
    (file,) = (tmp_path / "out/plans").glob("*.json")
    plan = Plan.from_json(file.read_text())
    # Its plan is applied layer by layer, too: at once, repair would see another input.
    _, applied = compress(make_run(tmp_path, {"plan": str(file)}, output=str(tmp_path / "again")))
    jax.tree.map(np.testing.assert_array_equal, load_hf(applied["checkpoint"])[1], params)
    file.write_text(dataclasses.replace(plan, method="by hand").to_json())
    with pytest.raises(ValueError, match="was changed, but the weights in"):
        compress(make_run(tmp_path, STAGE))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequential": True, "width_ratio": 0.5}, "sequential = True needs method 'obs'"),
        ({**STAGE, "kv_groups": 1}, "kv_groups are ranked by gradients through the whole model"),
        ({**STAGE, "sequential": 1}, "sequential must be bool, got 1"),
        (
            {**STAGE, "neuron_scope": "model", "own_widths": True},
            "neuron_scope 'model' ranks across layers",
        ),
        ({**STAGE, "repair_target": "teacher"}, "repair_target must be one of"),
        (
            {"method": "obs", "width_ratio": 0.5, "repair_target": "own"},
            "repair_target = 'own' needs sequential and repair",
        ),
    ],
)
def test_stages_that_cannot_be_sequential(fields, message):
    with pytest.raises(ValueError, match=message):
        StageConfig.from_dict(fields, "stages[0]")


def test_a_sequential_stage_is_not_planned_from_statistics():
    cut = Cut.from_dict(STAGE)
    assert not cut.needs_second_moments
    assert cut.losses == ()
    with pytest.raises(ValueError, match="planned layer by layer"):
        plan_cut(cut, Stats({}, 0, 0, 0), tiny_model()[1])
