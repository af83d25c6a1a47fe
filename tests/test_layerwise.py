"""A model read layer by layer from disk: equal to the whole model in memory, and resumable."""

from __future__ import annotations

import numpy as np
import pytest
from models import token_batches
from tiny_run import save_model

from moe_jax.calibrate import Measurement, calibrate_domains
from moe_jax.calibrate.layerwise import calibrate_layerwise
from moe_jax.hf.reader import load_hf, open_hf


def batches(count, seed=0):
    return [{**b, "tokens": b["tokens"] % 48} for b in token_batches(count, seed=seed)]


DOMAINS = {"one": batches(4), "other": batches(3, seed=1)}
ALL = Measurement(
    ("lm", "kd_topk", "rerouting"), second_moments=True, attention_moments=True, slices=4
)


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


@pytest.mark.parametrize("family", ["phimoe", "qwen3_moe"])
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
