"""What holds for every family: sizes, lists by layer, dtypes and small files; dense models."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_hf import (
    FAMILIES,
    MIXTURES,
    VOCAB,
    WEIGHTS,
    random_params,
    read_tensors,
    save_tiny,
    torch_logits,
)

from moe_jax import Plan, apply_plan, calibrate, forward, load_hf, make_plan, save_hf
from moe_jax.convert import convert
from moe_jax.hf.config_export import export_config
from moe_jax.hf.config_import import model_config
from moe_jax.hf.families import FAMILIES as ROWS
from moe_jax.hf.reader import read_config
from moe_jax.hf.writer import check_source
from moe_jax.plan import LayerPlan


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_every_module_of_families_has_a_row_in_the_table_of_tests():
    assert set(ROWS) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", [1_000_000_000, 2**63 - 1])
def test_sizes_that_no_file_holds_are_refused_at_once(tmp_path, family, number):
    folder = save_tiny(tmp_path, family)
    keys = ROWS[family].keys
    for fact in ("num_layers", *(["num_experts"] if family in MIXTURES else [])):
        changes = dict.fromkeys(keys[fact].names, number)
        hf = {"model_type": family, **changes}
        with pytest.raises(ValueError, match=f"got .*{number}|at most"):
            model_config(hf)
        before = (folder / "config.json").read_text()
        edit(folder, **changes)
        for read in (read_config, load_hf):
            message = f"num_hidden_layers|experts must be [48].*{number}"
            with pytest.raises(ValueError, match=message):
                read(folder)
        (folder / "config.json").write_text(before)


def test_a_number_of_experts_that_is_only_a_little_wrong_is_named(tmp_path):
    folder = save_tiny(tmp_path, "olmoe")
    edit(folder, num_experts=5)
    with pytest.raises(ValueError, match=r"must be 4, the rows of model.*gate.weight, got 5"):
        load_hf(folder)


def test_lists_by_layer_follow_dropped_layers(tmp_path):
    folder = save_tiny(tmp_path / "s", "qwen2_moe", num_hidden_layers=4, mlp_only_layers=[1])
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    edit(folder, layer_types=kinds, my_layer_pattern=[0, 1, 2, 3], eos_token_id=[0, 1, 2, 3])
    config, params = load_hf(folder)
    smaller, cut = apply_plan(params, config, Plan(layers={}, dropped_layers=(2,)))
    smaller, cut = apply_plan(cut, smaller, Plan(layers={}, dropped_layers=(0,)))
    assert smaller.kept_layers == (1, 3)
    save_hf(tmp_path / "out", cut, smaller, source=folder)
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf["layer_types"] == ["sliding_attention"] * 2
    assert hf["my_layer_pattern"] == [1, 3]
    assert hf["eos_token_id"] == [0, 1, 2, 3]
    assert hf["mlp_only_layers"] == [0]
    tokens = np.arange(24).reshape(2, 12) % VOCAB
    expected = forward(cut, smaller, tokens)[0]
    assert np.abs(torch_logits(tmp_path / "out", tokens) - np.asarray(expected)).max() < 2e-4


@pytest.mark.parametrize("family", ["olmoe", "phimoe", "mixtral", "qwen3_moe"])
def test_lists_that_a_family_ignores_follow_too(tmp_path, family):
    folder = save_tiny(tmp_path, family)
    source = json.loads((folder / "config.json").read_text())
    config = model_config(source)
    kept = config.keep_layers(range(config.num_layers - 1))
    source["layer_types"] = ["full_attention"] * config.num_layers
    assert len(export_config(kept, source)["layer_types"]) == kept.num_layers
    source["layer_types"][-1] = "sliding_attention"
    assert set(export_config(kept, source)["layer_types"]) == {"full_attention"}
    unknown = model_config({**source, "num_hidden_layers": kept.num_layers, "mlp_only_layers": []})
    with pytest.raises(ValueError, match="layer_types has an entry for each of"):
        export_config(unknown, source)


def mixed_dtypes(folder):
    """A checkpoint in bfloat16 with float32 routers."""
    save_tiny(folder, "qwen2_moe", dtype=torch.bfloat16)
    tensors = load_file(folder / WEIGHTS)
    tensors = {k: t.float() if k.endswith("mlp.gate.weight") else t for k, t in tensors.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def test_each_tensor_keeps_its_dtype_whatever_was_computed_in(tmp_path):
    source = mixed_dtypes(tmp_path / "s")
    config, params = load_hf(source, dtype="float32")
    save_hf(tmp_path / "same", params, config, source=source, dtype="source")
    assert read_tensors(tmp_path / "same") == read_tensors(source)
    layers = {
        0: LayerPlan(deleted=(1,), novices=(2,), novice_value="zero"),
        2: LayerPlan(neurons={0: (1, 2)}, own_widths=True),
    }
    small, params = apply_plan(params, config, Plan(layers=layers))
    save_hf(tmp_path / "out", params, small, source=source, dtype="source")
    for key, (dtype, _, _) in read_tensors(tmp_path / "out").items():
        assert dtype == ("F32" if key.endswith("mlp.gate.weight") else "BF16"), key


def test_folders_of_small_files_travel_along(tmp_path):
    source = save_tiny(tmp_path / "s", "olmoe")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ x }}")
    (source / "onnx").mkdir()
    for name in ("model.onnx", "notes.txt"):
        (source / "onnx" / name).write_text("another model")
    config, params = load_hf(source)
    save_hf(tmp_path / "out", params, config, source=source)
    convert(source, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    for folder in ("out", "back"):
        carried = tmp_path / folder / "additional_chat_templates" / "tools.jinja"
        assert carried.read_text() == "{{ x }}"
        assert not (tmp_path / folder / "onnx").exists()


def test_what_an_export_cannot_carry_is_found_without_one(tmp_path):
    source = save_tiny(tmp_path / "s", "olmoe")
    check_source(source)
    (tmp_path / "secret").write_text("x")
    (source / "templates").mkdir()
    (source / "templates" / "a.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="links must not leave"):
        check_source(source)


def test_ids_outside_the_vocabulary_are_refused():
    config = model_config(
        {
            "model_type": "llama",
            "num_hidden_layers": 1,
            "hidden_size": 8,
            "num_attention_heads": 2,
            "vocab_size": 10,
            "intermediate_size": 4,
        }
    )
    params = random_params(config)
    for wrong, message in (
        ([[1, 10]], r"\[0, vocab_size = 10\), got 10"),
        (np.array([[-1, 2]]), "got -1"),
        (torch.tensor([[2**40, 1]]), f"got {2**40}"),
        (jnp.array([[11]]), "got 11"),
        ([1, 2], r"integers \[B, S\], got int64 \(2,\)"),
        (np.ones((1, 2)), r"integers \[B, S\], got float64"),
    ):
        with pytest.raises(ValueError, match=message):
            forward(params, config, wrong)
    expected = forward(params, config, np.array([[1, 2]]))[0]
    for same in ([[1, 2]], torch.tensor([[1, 2]]), np.array([[1, 2]], np.uint8)):
        np.testing.assert_array_equal(forward(params, config, same)[0], expected)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.float64, "F64.*32 bits"),
        (torch.int64, "I64.*integers"),
        (torch.float8_e4m3fn, "quant"),
    ],
)
def test_dtypes_that_are_no_weights_are_told_apart(tmp_path, dtype, message):
    folder = save_tiny(tmp_path, "olmoe")
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=message) as error:
        load_hf(folder)
    assert ("quantised weights" in str(error.value)) == (dtype == torch.float8_e4m3fn)


def test_what_needs_experts_refuses_a_dense_model_by_name(tmp_path):
    config, params = load_hf(save_tiny(tmp_path, "llama"))
    batch = {"tokens": np.ones((1, 4), np.int32), "mask": np.ones((1, 4), bool)}
    with pytest.raises(ValueError, match="calibration needs a model with experts; llama"):
        calibrate(params, config, [batch])
    with pytest.raises(ValueError, match="plan needs a model with experts; llama"):
        make_plan({}, config, keep_experts=1)
    with pytest.raises(ValueError, match="mlp_bias must be False"):
        model_config({"model_type": "llama", "mlp_bias": True})


def test_pruning_leaves_a_shared_expert_alone(tmp_path):
    config, params = load_hf(save_tiny(tmp_path, "qwen2_moe"))
    rng = np.random.default_rng(0)
    batch = {"tokens": rng.integers(1, VOCAB, (2, 12)), "mask": np.ones((2, 12), bool)}
    stats = calibrate(params, config, [batch])
    scores = {i: np.arange(4.0) for i in config.moe_layers}
    plan = make_plan(scores, config, keep_experts=2)
    small, cut = apply_plan(params, config, plan, stats)
    for i in config.moe_layers:
        jax.tree.map(
            np.testing.assert_array_equal,
            cut["layers"][i]["moe"]["shared"],
            params["layers"][i]["moe"]["shared"],
        )
        assert small.moe(i).shared == config.moe(i).shared
