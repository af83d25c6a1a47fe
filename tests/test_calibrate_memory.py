"""Second moments laid out in passes: their bytes, the same bits in any number of passes, errors."""

from __future__ import annotations

import logging
import math

import jax
import numpy as np
import pytest
from models import EXPERT_WIDTH, EXPERTS, tiny_config, tiny_model, token_batches
from tiny_run import save_model, settings

from moe_jax.calibrate import (
    Measurement,
    calibrate,
    calibrate_domains,
    memory,
    plan_second_moments,
)
from moe_jax.calibrate.sums import batch_sums
from moe_jax.compress import compress
from moe_jax.config import LayerConfig, ModelConfig, MoeConfig
from moe_jax.hf.reader import read_config
from moe_jax.kinds import GroupedQueryAttention
from moe_jax.model import init_params
from moe_jax.run.config import RunConfig
from moe_jax.run.job import prepare
from moe_jax.statistics import Stats
from moe_jax.statistics_table import requested_bytes

LAYER = 4 * EXPERTS * (EXPERT_WIDTH + 1) ** 2


def assert_same_bits(a: Stats, b: Stats) -> None:
    mine, theirs = a.arrays(), b.arrays()
    assert list(mine) == list(theirs)  # saved in this order
    for name, array in mine.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.mark.parametrize("family", ["phimoe", "qwen3_moe"])
def test_several_passes_give_the_same_bits_as_one(family):
    params, config = tiny_model(family)
    batches = token_batches()
    whole = calibrate(params, config, batches, second_moments=True, warn=False)
    for i, layer in whole.layers.items():
        assert layer["hidden_gram"].nbytes == requested_bytes(config, "second_moments")[i]
    by_layer = calibrate(
        params,
        config,
        iter(batches),
        second_moments=True,
        second_moment_bytes=2 * LAYER,
        slices=2,
        warn=False,
    )
    assert_same_bits(by_layer, whole)


def test_novices_have_zeros_in_every_pass():
    params, config = tiny_model()
    for i in config.moe_layers:
        config = config.replace_moe(i, novice_ids=(2,))
    layers = [dict(layer) for layer in params["layers"]]
    for layer in layers:
        experts = {k: np.delete(leaf, 2, 0) for k, leaf in layer["moe"]["experts"].items()}
        novices = {"constant": np.ones((1, config.width), np.float32)}
        layer["moe"] = {**layer["moe"], "experts": experts, "novices": novices}
    params = {**params, "layers": layers}
    moments = [
        calibrate(
            params, config, token_batches(), second_moments=True, second_moment_bytes=n, warn=False
        )
        for n in (None, 2 * LAYER)
    ]
    assert_same_bits(*moments)
    assert not moments[1].layers[1]["hidden_gram"][2].any()


def test_passes_take_consecutive_layers_up_to_the_bound():
    config = tiny_config(layers=tiny_config().layers[:1] * 5)
    for bound, passes in (
        (2 * LAYER, ((0,), (1,), (2,), (3,), (4,))),
        (4 * LAYER + 1, ((0, 1), (2, 3), (4,))),
        (10 * LAYER, ((0, 1, 2, 3, 4),)),
    ):
        plan = plan_second_moments(config, True, bound)
        assert plan.passes == passes
        assert plan.on_device <= bound
        assert plan.total == 5 * LAYER
    assert plan_second_moments(config, (3, 1), 2 * LAYER).passes == ((1,), (3,))
    assert plan_second_moments(config, False).passes == ()


def test_what_is_free_bounds_a_pass(monkeypatch):
    config = tiny_config(layers=tiny_config().layers[:1] * 4)
    monkeypatch.setattr(memory, "free_device_bytes", lambda: 8 * LAYER)
    assert plan_second_moments(config).passes == ((0, 1), (2, 3))
    monkeypatch.setattr(memory, "free_device_bytes", lambda: None)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 6 * LAYER)
    # On CPU: the four layers' sums, and for a pass of one layer its batch's.
    assert plan_second_moments(config).passes == ((0,), (1,), (2,), (3,))
    monkeypatch.setattr(memory, "free_host_bytes", lambda: None)
    assert plan_second_moments(config).passes == ((0, 1, 2, 3),)


def test_free_memory_is_read_from_the_kernel(monkeypatch, tmp_path):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:  24684096 kB\nMemAvailable:   22639048 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", file)
    assert memory.free_host_bytes() == 22639048 * 1024
    file.unlink()
    assert memory.free_host_bytes() is None


def test_what_does_not_fit_is_refused(monkeypatch):
    params, config = tiny_model()
    with pytest.raises(ValueError, match=r"layer 0 take 3.89 kB .* second_moment_bytes = 3.89 kB"):
        calibrate(params, config, [], second_moments=True, second_moment_bytes=2 * LAYER - 1)
    with pytest.raises(ValueError, match="second_moment_bytes must be at least 1, got 0"):
        calibrate(params, config, [], second_moments=True, second_moment_bytes=0)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 3 * LAYER)
    domains = {"one": token_batches(1), "other": token_batches(1, seed=1)}
    with pytest.raises(ValueError, match=r"2 layers take 7.78 kB in host memory \(twice while"):
        calibrate_domains(params, config, domains, Measurement(second_moments=True))


def test_the_layout_is_logged_once(caplog):
    params, config = tiny_model()
    domains = {"one": token_batches(1), "other": token_batches(1, seed=1)}
    with caplog.at_level(logging.INFO, "moe_jax"):
        calibrate_domains(
            params,
            config,
            domains,
            Measurement(second_moments=True, second_moment_bytes=2 * LAYER),
        )
    (line,) = [text for text in caplog.messages if text.startswith("second moments")]
    assert line == (
        "second moments: 1.94 kB a layer, 3.89 kB for 2 layers in host memory; 2 passes over the "
        "text for at most one layer each, 3.89 kB of at most 3.89 kB on the device"
    )


def test_consumed_statistics_give_up_their_arrays():
    params, config = tiny_model()
    parts = [
        calibrate(params, config, token_batches(2, seed=n), second_moments=True, warn=False)
        for n in (0, 1)
    ]
    expected = parts[0].merge(parts[1])
    assert_same_bits(parts[0].merge(parts[1], consume=True), expected)
    assert not parts[0].layers
    assert not parts[1].layers


def test_a_runs_bound_changes_no_result(tmp_path, caplog):
    """The same statistics, under the same name, however many passes they took."""
    save_model(tmp_path / "model", "qwen3_moe")
    obs = {"method": "obs", "width_ratio": 0.5}
    settings_ = settings(tmp_path, obs, evaluation={})
    compress(RunConfig.from_dict(settings_))
    calibration = settings_["calibration"] | {"second_moment_bytes": 3000}
    bounded = {**settings_, "calibration": calibration, "output": str(tmp_path / "bounded")}
    with caplog.at_level(logging.INFO, "moe_jax"):
        compress(RunConfig.from_dict(bounded))
    assert "2 passes over the text for at most one layer each" in caplog.text
    for pattern in ("statistics/*.npz", "plans/*.json", "model/*.safetensors"):
        (one,), (other,) = ([*(tmp_path / name).glob(pattern)] for name in ("out", "bounded"))
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes()


def test_a_run_is_prepared_only_if_all_it_measures_fits(tmp_path, monkeypatch):
    """Two domains are merged, and the original's stream takes second moments of its own."""
    config = read_config(save_model(tmp_path / "model", "qwen3_moe"))
    obs = {"method": "obs", "width_ratio": 0.5}
    sizes = requested_bytes(config, "second_moments")
    fields = settings(tmp_path, obs, evaluation={})
    fields["calibration"]["mode"] = "whole"
    with monkeypatch.context() as patch:
        patch.setattr(memory, "free_host_bytes", lambda: 2 * sum(sizes.values()) - 1)
        with pytest.raises(ValueError, match="twice while domains are merged"):
            prepare(RunConfig.from_dict(fields))
    fields["calibration"]["second_moment_bytes"] = 2 * max(sizes.values())
    prepare(RunConfig.from_dict(fields))
    in_turn = {**obs, "sequential": True}
    prepare(RunConfig.from_dict({**fields, "stages": [{**in_turn, "repair_target": "own"}]}))
    towards_original = RunConfig.from_dict({**fields, "stages": [in_turn]})
    with pytest.raises(ValueError, match="which must be at most second_moment_bytes"):
        prepare(towards_original)


def test_bad_bounds_of_a_run_are_refused_before_any_work(tmp_path):
    save_model(tmp_path / "model", "qwen3_moe")
    fields = settings(tmp_path, {"method": "obs", "width_ratio": 0.5})
    fields["calibration"]["second_moment_bytes"] = -1
    with pytest.raises(ValueError, match=r"second_moment_bytes must be at least 0, got -1"):
        RunConfig.from_dict(fields)
    fields["calibration"]["second_moment_bytes"] = 100
    with pytest.raises(ValueError, match="which must be at most second_moment_bytes = 100 B"):
        compress(RunConfig.from_dict(fields))
    assert not (tmp_path / "out").exists()


def test_what_experts_compute_is_not_kept_for_all_layers():
    """A pass holds hidden activations and outputs of a layer until its sums are taken."""
    tokens, chosen, width = (4, 64), 4, 64
    batch = {"tokens": np.zeros(tokens, np.int32), "mask": np.ones(tokens, bool)}

    def temporaries(layers: int) -> int:
        layer = LayerConfig(2, 2, MoeConfig(8, chosen, width))
        config = ModelConfig(
            "olmoe", 61, width, GroupedQueryAttention(32, qk_norm="full"), (layer,) * layers
        )
        params = init_params(config, jax.random.key(0))
        compiled = batch_sums.lower(params, config, batch, "auto").compile()
        return compiled.memory_analysis().temp_size_in_bytes

    outputs = math.prod(tokens) * chosen * width * 4
    assert (temporaries(6) - temporaries(2)) / 4 < outputs
