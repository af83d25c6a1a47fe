"""Rounded weights against a loop over groups in float64, and GGUF's own Q4_0 and Q4_1."""

import math

import gguf
import jax
import numpy as np
import pytest
from models import tiny_config
from test_compare import compare, settings
from tiny_run import save_model

from moe_jax.compare.grid import Grid
from moe_jax.model import init_params
from moe_jax.params import abstract_params, count_params, leaves_with_path
from moe_jax.quantization import Quantization, quantized, stored_bytes
from moe_jax.run.config import RunConfig


def _model(seed=0):
    config = tiny_config("qwen3_moe", vocab_size=64)
    return init_params(config, jax.random.key(seed)), config


def _by_hand(matrix: np.ndarray, how: Quantization) -> np.ndarray:
    """[in, out], each group of inputs of each output by itself."""
    found = np.zeros(matrix.shape)
    for column in range(matrix.shape[1]):
        for start in range(0, matrix.shape[0], how.group_size):
            group = matrix[start : start + how.group_size, column].astype(np.float64)
            if how.minimum:
                low = float(np.float16(group.min()))
                scale = float(np.float16((group.max() - low) / (2**how.bits - 1)))
                bounds = (0, 2**how.bits - 1)
            else:
                low, half = 0.0, 2 ** (how.bits - 1)
                scale = float(np.float16(group[np.abs(group).argmax()] / -half))
                bounds = (-half, half - 1)
            codes = np.clip(np.round((group - low) / scale), *bounds)
            found[start : start + how.group_size, column] = codes * scale + low
    return found


@pytest.mark.parametrize("minimum", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 8), (3, 5), (8, 128)])
def test_equals_a_loop_over_groups(bits, group_size, minimum):
    params, config = _model()
    how = Quantization(bits, group_size, minimum)
    found = quantized(params, config, how)
    moe, rounded = params["layers"][0]["moe"], found["layers"][0]["moe"]
    for name in ("gate", "up", "down"):
        for before, after in zip(moe["experts"][name], rounded["experts"][name], strict=True):
            expected = _by_hand(np.asarray(before), how)
            scale = np.abs(expected).max() / 2 ** (bits - 1)
            # A scale may be the next number in 16 bits, and what lies in the middle of two
            # steps may go either way.
            error = np.abs(np.asarray(after) - expected)
            assert (error > 1e-2 * scale).mean() < 0.01
            assert error.max() < 2.5 * scale
    attention = params["layers"][0]["attention"], found["layers"][0]["attention"]
    query = [np.asarray(part["query"]["kernel"]).reshape(config.width, -1) for part in attention]
    np.testing.assert_allclose(query[1], _by_hand(query[0], how), atol=2e-2 / 2 ** (bits - 4))
    out = [np.asarray(part["out"]["kernel"]).reshape(-1, config.width) for part in attention]
    np.testing.assert_allclose(out[1], _by_hand(out[0], how), atol=2e-2 / 2 ** (bits - 4))
    for part in ("embed", "lm_head", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, found[part], params[part])
    np.testing.assert_array_equal(rounded["router"]["kernel"], moe["router"]["kernel"])


@pytest.mark.parametrize("minimum", [True, False])
def test_groups_of_32_at_four_bits_are_those_of_gguf(minimum):
    kind = gguf.GGMLQuantizationType.Q4_1 if minimum else gguf.GGMLQuantizationType.Q4_0
    config = tiny_config("qwen3_moe", vocab_size=64, width=64)
    params = init_params(config, jax.random.key(1))
    found = quantized(params, config, Quantization(4, 32, minimum))
    before = np.asarray(params["layers"][0]["moe"]["experts"]["gate"][0]).T.copy()
    theirs = gguf.dequantize(gguf.quantize(before, kind), kind)
    ours = np.asarray(found["layers"][0]["moe"]["experts"]["gate"][0]).T
    step = np.abs(before).max() / 8
    # GGUF chooses codes before it rounds scales to 16 bits: a few differ by one.
    assert (np.abs(ours - theirs) > 0.05 * step).mean() < 0.02
    assert np.abs(ours - theirs).max() < 1.5 * step


def test_more_bits_lose_less_and_bytes_are_counted():
    params, config = _model()
    errors = []
    for bits in (2, 3, 4, 6, 8):
        found = quantized(params, config, Quantization(bits, 8))
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True)
        errors.append(sum(float(((a - b) ** 2).sum()) for a, b in pairs))
    assert errors == sorted(errors, reverse=True)
    how = Quantization(4, 8, minimum=False, parts=("experts",))
    leaves = leaves_with_path(abstract_params(config))
    experts = sum(leaf.size for _, leaf in leaves if leaf.part == "experts")
    moe = config.moe(0)
    groups = sum(
        moe.num_experts * rows * math.ceil(inputs / 8)
        for rows, inputs in (
            (2 * moe.expert_width, config.width), (config.width, moe.expert_width)
        )
    ) * len(config.moe_layers)  # fmt: skip
    others = count_params(config).total - experts
    assert stored_bytes(config, how, 2) == experts // 2 + groups * 2 + others * 2


def test_bad_settings_are_refused():
    params, config = _model()
    with pytest.raises(ValueError, match=r"must be among .*got \['router'\]"):
        quantized(params, config, Quantization(parts=("router",)))
    stage = {"method": "mone", "keep_ratio": 0.5, "quantize": {"bits": 1}}
    run = {"model": "m", "output": "o", "calibration": {"files": ["a.txt"]}, "stages": [stage]}
    with pytest.raises(ValueError, match=r"stages\[0\].quantize.bits must be in \[2, 8\], got 1"):
        RunConfig.from_dict(run)
    stage["quantize"] = {"bits": 4}
    with pytest.raises(ValueError, match="quantize is simulated, in comparisons alone"):
        RunConfig.from_dict(run)


def test_it_goes_with_the_last_stage_of_a_comparison(tmp_path):
    save_model(tmp_path / "model", "olmoe")
    raw = settings(tmp_path)
    cut = {"method": "reap", "replacement": "delete"}
    four = {"quantize": {"bits": 4}}
    raw["methods"] = (("twice", ({"method": "slim", "width_ratio": 0.5, **four}, cut)),)
    raw |= {"blocks": (), "focus": "", "rival": ""}
    with pytest.raises(ValueError, match="goes with the last stage"):
        Grid.from_dict(raw)
    raw |= {"methods": (("REAP", {**cut, **four}),), "marks": (0.5, 1.0)}
    with pytest.raises(ValueError, match="does not go with marks"):
        Grid.from_dict(raw)


def test_a_comparison_has_rows_of_fewer_bits(tmp_path):
    save_model(tmp_path / "model", "olmoe")
    raw = settings(tmp_path)
    cut = {"method": "reap", "replacement": "delete"}
    raw["methods"] = (
        ("REAP", cut),
        ("REAP in 4 bits", {**cut, "quantize": {"bits": 4, "group_size": 8}}),
        ("3 bits", {**cut, "quantize": {"bits": 3, "group_size": 8}}),
    )
    raw["blocks"] = (
        {"methods": ("REAP", "REAP in 4 bits"), "ratios": (0.5,), "seeds": (0,)},
        {"methods": ("3 bits",), "ratios": (1.0,), "seeds": (0,)},
    )
    raw["focus"], raw["rival"] = "REAP", "REAP in 4 bits"
    compare(raw)
    stages = Grid.from_dict(raw).stages("3 bits", 1.0, 2)
    assert stages[0].quantize == Quantization(3, 8)
    text = next((tmp_path / "out").glob("*.csv")).read_text().splitlines()
    names = text[0].split(",")
    rows = {
        line.split(",")[1]: dict(zip(names, line.split(","), strict=False)) for line in text[1:]
    }
    sizes = {name: int(row["bytes"]) for name, row in rows.items() if row["bytes"]}
    assert sizes["REAP in 4 bits"] < sizes["REAP"]
    assert sizes["3 bits"] < sizes["REAP"]
