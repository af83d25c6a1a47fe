"""A model read layer by layer from disk: equal to the whole model in memory, and resumable."""

from __future__ import annotations

import dataclasses
import itertools
import json
import socket

import jax
import numpy as np
import pytest
from models import token_batches
from tiny_run import make_run, save_model, settings

from moe_jax.calibrate import Measurement, calibrate_domains, calibrate_layerwise, check_losses
from moe_jax.compress import compress
from moe_jax.hf.reader import load_hf, open_hf
from moe_jax.layer_store import LayerStore
from moe_jax.params import Model
from moe_jax.plan import Cut, LayerPlan, Plan, planned_config
from moe_jax.prune import apply_plan, cut_in_turn, refit, refit_in_turn
from moe_jax.prune.sequential import sequential_cut
from moe_jax.run.config import RunConfig
from moe_jax.stored import StoredLeaf, in_memory


def batches(count, seed=0):
    return [{**b, "tokens": b["tokens"] % 48} for b in token_batches(count, seed=seed)]


DOMAINS = {"one": batches(4), "other": batches(3, seed=1)}
ALL = Measurement(
    ("lm", "kd_topk", "rerouting"), second_moments=True, attention_moments=True,
    shared_moments=True, slices=4,
)  # fmt: skip


def stored(folder, family):
    save_model(folder / family, family)
    config, params = open_hf(folder / family, "float32")
    return params, config


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        scale = np.abs(array).max() or 1
        assert found[name].dtype == array.dtype, name
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=2e-5 * scale, err_msg=name)


@pytest.mark.parametrize("family", ["phimoe", "qwen2_moe"])
def test_statistics_are_those_of_the_whole_model(family, tmp_path):
    params, config = stored(tmp_path, family)
    measurement = ALL
    if family == "phimoe":
        measurement = Measurement(("lm", "kd_topk"), second_moments=True, slices=4)
    found = calibrate_layerwise(
        params, config, DOMAINS, measurement, save_as=tmp_path / "s", digest="d"
    )
    whole = load_hf(tmp_path / family, "float32")[1]
    expected = calibrate_domains(whole, config, DOMAINS, measurement)
    assert found.facts["domains"] == expected.facts["domains"]
    assert (found.tokens, found.sequences, found.batches) == (
        expected.tokens, expected.sequences, expected.batches,
    )  # fmt: skip
    assert_close(found.arrays(), expected.arrays())
    assert found.slices.keys() == expected.slices.keys()
    for key, part in expected.slices.items():
        assert_close(found.slices[key].arrays(), part.arrays())
    assert {file.name for file in tmp_path.glob("s*")} == {
        "s.json", "s.npz", *(file.name for file in tmp_path.glob("s.*.npy")),
    }  # fmt: skip
    again = calibrate_layerwise(
        params, config, DOMAINS, measurement, save_as=tmp_path / "s", digest="d"
    )
    for name, array in found.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], array)


def broken_from(params, layer):
    """A model whose disk fails at a layer."""

    def fail(_):
        raise OSError("the disk is gone")

    layers = [
        jax.tree.map(lambda leaf: StoredLeaf(leaf.shape, leaf.dtype, fail), one)
        if i >= layer
        else one
        for i, one in enumerate(params["layers"])
    ]
    return {**params, "layers": layers}


def files_of(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_a_walk_that_stopped_goes_on_to_the_same_bytes(tmp_path):
    params, config = stored(tmp_path, "qwen3_moe")
    for name, stops in (("whole", ()), ("stopped", (1, 2))):
        (tmp_path / name).mkdir()
        for layer in stops:
            with pytest.raises(OSError, match="the disk is gone"):
                calibrate_layerwise(
                    broken_from(params, layer), config, DOMAINS, ALL,
                    save_as=tmp_path / name / "s", digest="d",
                )  # fmt: skip
            assert (tmp_path / name / f"s.layer-{layer - 1}.npz").exists()
        calibrate_layerwise(params, config, DOMAINS, ALL, save_as=tmp_path / name / "s", digest="d")
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "stopped")


def test_a_walk_of_other_text_begins_anew_and_leaves_nothing(tmp_path):
    params, config = stored(tmp_path, "qwen3_moe")
    light = Measurement(("lm",))
    with pytest.raises(OSError, match="the disk is gone"):
        calibrate_layerwise(
            broken_from(params, 1), config, DOMAINS, light, save_as=tmp_path / "s", digest="a"
        )
    left = next(tmp_path.glob("s.streams-*/forward"))
    (left / f".2.stream.writing-{socket.gethostname()}-999999999").write_bytes(b"of a killed run")
    other = {"other": batches(4, seed=7)}
    for name, domains, digest in (("s", DOMAINS, "a"), ("s", other, "b"), ("t", other, "b")):
        calibrate_layerwise(params, config, domains, light, save_as=tmp_path / name, digest=digest)
        assert not list(tmp_path.glob("*.streams-*"))
    assert (tmp_path / "s.npz").read_bytes() == (tmp_path / "t.npz").read_bytes()


def test_a_layer_that_is_written_again_is_read_as_it_is(tmp_path):
    store = LayerStore(tmp_path)
    for size in (3, 3, 50_000):
        weights = {"a": np.arange(size) + float(size), "b": np.zeros(size, np.float32)}
        weights["a"] = weights["a"].astype(np.float32)
        store.write(0, weights)
        jax.tree.map(np.testing.assert_array_equal, in_memory(store.layer(0)), weights)


def text_batches():
    return [batch for domain in DOMAINS.values() for batch in domain]


def test_cuts_and_refits_go_on_to_the_same_bytes(tmp_path):
    params, config = stored(tmp_path, "qwen3_moe")
    layers = {i: LayerPlan(novices=(0, 2), novice_value="zero") for i in config.moe_layers}
    plan = Plan(layers)
    smaller = planned_config(config, plan)
    for name, stops in (("whole", ()), ("stopped", (1, 2))):
        cuts, fits = LayerStore(tmp_path / name / "cuts"), LayerStore(tmp_path / name / "fits")
        for stop in (*stops, config.num_layers):
            first = sum(cuts.has(n) for n in range(config.num_layers))
            for n, weights in itertools.islice(
                cut_in_turn(params, config, plan, None, first), stop - first
            ):
                cuts.write(n, weights)
        cut = Model({**params, "layers": cuts.layers(config.num_layers)}, smaller)
        original = Model(params, config)
        for stop in (*stops, 99):
            walk = refit_in_turn(original, cut, text_batches(), folder=fits.folder / "stream")
            for n, weights in walk:
                if n == stop:
                    break
                fits.write(n, weights)
            walk.close()
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "stopped")
    whole = load_hf(tmp_path / "qwen3_moe", "float32")[1]
    whole_cut = Model(apply_plan(whole, config, plan)[1], smaller)
    expected = refit(Model(whole, config), whole_cut, text_batches())
    found = in_memory(fits.layers(config.num_layers))
    jax.tree.map(np.testing.assert_array_equal, found, expected["layers"])


def test_a_sequential_cut_goes_on_to_the_same_bytes(tmp_path):
    params, config = stored(tmp_path, "qwen3_moe")
    # Layers are padded to the widest of them once it is known.
    cut = Cut("obs", width_ratio=0.25, neuron_scope="layer")
    for name, stops in (("whole", ()), ("stopped", (1, 2)), ("damaged", (1,))):
        store = LayerStore(tmp_path / name)
        for layer in stops:
            with pytest.raises(OSError, match="the disk is gone"):
                sequential_cut(broken_from(params, layer), config, DOMAINS, cut, store=store)
        if name == "damaged":  # what follows the first layer was measured behind it
            (tmp_path / name / "statistics-0.npz").write_bytes(b"of another version")
        found = sequential_cut(params, config, DOMAINS, cut, store=store)
    for name in ("stopped", "damaged"):
        assert files_of(tmp_path / name) == files_of(tmp_path / "whole")
    whole = load_hf(tmp_path / "qwen3_moe", "float32")[1]
    expected = sequential_cut(whole, config, DOMAINS, cut)
    assert found.plan == expected.plan
    kept = [max(map(len, layer.neurons.values())) for layer in found.plan.layers.values()]
    assert len({*kept}) > 1
    assert found.config == expected.config
    jax.tree.map(
        np.testing.assert_array_equal, in_memory(found.params["layers"]), expected.params["layers"]
    )
    assert found.stats.arrays().keys() == expected.stats.arrays().keys()


STAGES = {
    "novices": ({"method": "mone", "keep_ratio": 0.5},),
    "costs and refit": ({"method": "token_fisher", "width_ratio": 0.5, "refit": True},),
    "merge, then obs": (
        {"method": "m_smoe", "keep_ratio": 0.5},
        {"method": "obs", "width_ratio": 0.5, "repair": True},
    ),
    "obs in turn": ({"method": "obs", "width_ratio": 0.5, "sequential": True},),
}


@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES.keys())
def test_a_run_layer_by_layer_makes_the_same_model(stages, tmp_path):
    save_model(tmp_path / "model", "qwen3_moe")
    run = make_run(tmp_path, *stages)
    found = {}
    for mode in ("whole", "layerwise"):
        calibration = dataclasses.replace(run.calibration, mode=mode)
        output = str(tmp_path / mode)
        report, paths = compress(dataclasses.replace(run, calibration=calibration, output=output))
        plans = [json.loads(f.read_text()) for f in sorted((tmp_path / mode / "plans").iterdir())]
        found[mode] = report, plans, load_hf(paths["checkpoint"])
    (report, plans, (config, params)), (told, others, (its, mine)) = found.values()
    assert told["config"]["calibration"]["mode"] == "layerwise"
    assert [plan["layers"] for plan in others] == [plan["layers"] for plan in plans]
    assert its == config
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), mine, params)
    for when in ("before", "after"):
        mean = [r[when]["evaluation"]["mean"]["nll"] for r in (report, told)]
        np.testing.assert_allclose(*mean, rtol=1e-5)
    assert told["after"]["evaluation"]["tokens_per_second"] is None
    assert not list((tmp_path / "layerwise").rglob("*.stream"))


def test_what_needs_the_whole_model_is_refused(tmp_path):
    calibration = {"mode": "layerwise"}
    raw = settings(tmp_path, {"method": "mone", "keep_ratio": 0.5, "distill": {"steps": 1}})
    raw["training"] = {"files": raw["calibration"]["files"]}
    with pytest.raises(ValueError, match=r"layerwise.* goes without distill"):
        RunConfig.from_dict({**raw, "calibration": raw["calibration"] | calibration})
    raw = settings(tmp_path, {"method": "mone", "keep_ratio": 0.5}, mesh={"data": 2})
    with pytest.raises(ValueError, match=r"layerwise.* goes without mesh"):
        RunConfig.from_dict({**raw, "calibration": raw["calibration"] | calibration})
    with pytest.raises(ValueError, match=r"losses must be among .*kd_full"):
        check_losses(["kd_full"], own_teacher=True)
    with pytest.raises(ValueError, match="the model is its own teacher"):
        check_losses(["kd_topk"], own_teacher=False)
