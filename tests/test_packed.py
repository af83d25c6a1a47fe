"""Packed checkpoints: read as published, written with the same bytes, packed again."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from public_models import PUBLIC
from safetensors.torch import load_file, save_file
from tiny_hf import read_tensors, save_tiny, trees_equal
from tiny_run import make_run, save_tokenizer
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_jax.compress import compress
from moe_jax.hf import load_hf, save_hf
from moe_jax.hf.folder import read_config_file, read_tensor_infos
from moe_jax.hf.packed import Floats4, Floats8
from moe_jax.hf.reader import read_config
from moe_jax.hf.stored_weights import foreseen_export
from moe_jax.lineage import Lineage
from moe_jax.params import Model, leaves_with_path, path_name
from moe_jax.plan import LayerPlan, Plan
from moe_jax.prune import apply_plan
from moe_jax.run.config import RunConfig
from moe_jax.run.dry_run import dry_run

UNPACKED = "model.layers.2.self_attn.o_proj"
CHANNELS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
SCHEMES = {
    "fp8": {
        "quant_method": "fp8",
        "weight_block_size": [4, 4],
        "modules_to_not_convert": ["model.layers.1.mlp.gate", UNPACKED, "lm_head"],
    },
    "channel": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": CHANNELS}},
        "ignore": ["lm_head", "re:.*mlp.gate$", UNPACKED],
    },
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router"]},
}


def _describe(folder: Path, scheme) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": scheme}))


def _fp8(folder: Path, block=(4, 4), suffix="_scale_inv", dtype=torch.float32):
    """A tiny DeepSeek-V3 with matrices in FP8, and what they stand for; 0 columns are all."""
    save_tiny(folder, "deepseek_v3", dtype=torch.bfloat16)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for key, tensor in list(tensors.items()):
        if "proj.weight" not in key or UNPACKED in key:
            continue
        steps = [step or size for size, step in zip(tensor.shape, block, strict=True)]
        counts = [-(-size // step) for size, step in zip(tensor.shape, steps, strict=True)]
        scale = torch.rand(counts, generator=torch.Generator().manual_seed(len(key))) + 0.5
        scale = (scale / 448).to(dtype)
        whole = scale.repeat_interleave(steps[0], 0).repeat_interleave(steps[1], 1)
        whole = whole[: tensor.shape[0], : tensor.shape[1]]
        packed = (tensor.float() / whole.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        # Blocks: in float32. Channels: in the scales' own dtype (compressed_tensors' dequantize).
        exact = torch.float32 if suffix == "_scale_inv" else dtype
        expected[key] = (packed.to(exact) * whole.to(exact)).to(torch.bfloat16)
        tensors |= {key: packed, key + suffix: scale}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return expected


def _mxfp4(folder: Path):
    """A tiny gpt-oss of all bytes, with all exponents that leave numbers finite."""
    save_tiny(folder, "gpt_oss", dtype=torch.bfloat16, hidden_size=32, intermediate_size=64)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(key).shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(253, shape, generator=generator, dtype=torch.uint8)
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        expected[key] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return expected


def _source(folder: Path, name: str):
    if name == "mxfp4":
        expected = _mxfp4(folder)
    else:
        expected = _fp8(folder) if name == "fp8" else _fp8(folder, (1, 0), "_scale")
    _describe(folder, SCHEMES[name])
    return expected


@pytest.fixture(scope="module", params=SCHEMES)
def source(request, tmp_path_factory):
    """Folder, name of the scheme, and the model as it is read."""
    folder = tmp_path_factory.mktemp("packed") / request.param
    _source(folder, request.param)
    return folder, request.param, Model(*load_hf(folder)[::-1])


@pytest.mark.parametrize("name", [*SCHEMES, "channel in 16 bits", "odd blocks"])
def test_packed_weights_are_read_as_published(tmp_path, name):
    """To the bit; without a lineage they are written in 16 bits."""
    folder = tmp_path / "source"
    if name == "odd blocks":
        expected = _fp8(folder, (3, 6), dtype=torch.bfloat16)
        _describe(folder, SCHEMES["fp8"] | {"weight_block_size": [3, 6]})
    elif name == "channel in 16 bits":
        expected = _fp8(folder, (1, 0), "_scale", torch.float16)
        _describe(folder, SCHEMES["channel"])
    else:
        expected = _source(folder, name)
    config, params = load_hf(folder)
    assert read_config(folder) == config
    found = save_hf(tmp_path / "out", params, config, source=folder)
    assert not found.packed
    assert "no lineage" in found.reason
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(key.endswith(("_scale_inv", "_scale", "_scales", "_blocks")) for key in written)
    for key, tensor in expected.items():
        assert torch.equal(written[key].view(torch.int16), tensor.view(torch.int16)), key
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert trees_equal(load_hf(tmp_path / "out")[1], params)


def _saved(source, out, lineage: Lineage, model: Model, packing="keep", size=5e9):
    """What was written; it is what was foreseen, and its bytes are those of the files."""
    folder = source[0]
    found = save_hf(out, *model, folder, "source", size, lineage=lineage, packing=packing)
    hf, infos = read_config_file(folder), read_tensor_infos(folder)
    foreseen = foreseen_export(model.config, hf, infos, lineage, packing)
    for name in ("nbytes", "packed", "reason", "kept", "repacked"):
        assert getattr(found, name) == getattr(foreseen, name)
    assert found.nbytes == sum(len(data) for *_, data in read_tensors(out).values())
    return found


def test_what_was_not_cut_is_written_byte_for_byte(source, tmp_path):
    folder, _, model = source
    found = _saved(source, tmp_path / "out", Lineage.of(model.config), model, size=3000)
    assert found.packed
    assert read_tensors(tmp_path / "out") == read_tensors(folder)
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out")
    )
    assert after["quantization_config"] == before["quantization_config"]


def _cut(model: Model, plan: Plan) -> tuple[Lineage, Model]:
    config, params = apply_plan(*model, plan)
    return Lineage.of(model.config).after(plan, config), Model(params, config)


def test_removal_leaves_the_bytes_of_what_stays(source, tmp_path):
    """Layer 0 goes, experts 1 and 6 (of gpt-oss 1) of the last one: names follow."""
    folder, name, model = source
    gone = (1,) if name == "mxfp4" else (1, 6)
    last = model.config.num_layers - 1
    lineage, cut = _cut(model, Plan({last: LayerPlan(deleted=gone)}, dropped_layers=(0,)))
    found = _saved(source, tmp_path / "out", lineage, cut)
    assert found.packed, found.reason
    assert found.repacked == 0
    assert trees_equal(load_hf(tmp_path / "out")[1], cut.params)
    before, after = read_tensors(folder), read_tensors(tmp_path / "out")
    kept = [e for e in range(model.config.moe(last).num_experts) if e not in gone]
    if name == "mxfp4":
        for part in ("blocks", "scales"):
            key = "model.layers.{}.mlp.experts.gate_up_proj_" + part
            _, shape, data = before[key.format(last)]
            rows = np.frombuffer(data, np.uint8).reshape(shape)[kept]
            assert after[key.format(last - 1)][1:] == (rows.shape, rows.tobytes())
        return
    suffix = "_scale_inv" if name == "fp8" else "_scale"
    for new, old in enumerate(kept):
        for part in ("gate_proj", "up_proj", "down_proj"):
            for end in (".weight", ".weight" + suffix):
                key = f"model.layers.{{}}.mlp.experts.{{}}.{part}{end}"
                assert after[key.format(last - 1, new)] == before[key.format(last, old)]
    scheme = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    modules = scheme.get("modules_to_not_convert") or scheme["ignore"]
    assert "model.layers.1.self_attn.o_proj" in modules
    assert modules[0] == ("model.layers.0.mlp.gate" if name == "fp8" else "lm_head")


def test_a_width_cut_in_whole_blocks_leaves_bytes_too(source, tmp_path):
    """Each expert keeps a block of its own; a novice of gpt-oss, zeros. Elsewhere 16 bits are."""
    _, name, model = source
    moe, last = model.config.moe(model.config.num_layers - 1), model.config.num_layers - 1
    half = moe.expert_width // 2
    blocks = {e: tuple(range(e % 2 * half, e % 2 * half + half)) for e in range(moe.num_experts)}
    layers = model.config.moe_layers
    plans = dict.fromkeys(layers, LayerPlan(neurons=blocks))
    if name == "mxfp4":
        plans[last] = LayerPlan(neurons=blocks, novices=(2,), novice_value="zero")
    lineage, cut = _cut(model, Plan(plans))
    found = _saved(source, tmp_path / "out", lineage, cut)
    assert found.packed, found.reason
    assert trees_equal(load_hf(tmp_path / "out")[1], cut.params)
    odd = dict.fromkeys(blocks, tuple(range(1, half + 1)))
    lineage, cut = _cut(model, Plan(dict.fromkeys(layers, LayerPlan(neurons=odd))))
    found = _saved(source, tmp_path / "odd", lineage, cut)
    assert trees_equal(load_hf(tmp_path / "odd")[1], cut.params)
    assert found.packed == (name == "channel")  # whose scales know no columns
    assert name == "channel" or "not cut in whole blocks" in found.reason


@pytest.mark.parametrize("packing", ["keep", "source"])
def test_experts_that_stop_being_stacked_are_unpacked(source, tmp_path, packing):
    """gpt-oss with fewer experts in one layer alone has one tensor each: no form of MXFP4."""
    _, name, model = source
    gone = {model.config.num_layers - 1: LayerPlan(deleted=(1,) if name == "mxfp4" else (1, 6))}
    lineage, cut = _cut(model, Plan(gone))
    found = _saved(source, tmp_path / "out", lineage, cut, packing)
    assert found.packed == (name != "mxfp4")
    assert found.packed or "is stacked" in found.reason
    assert trees_equal(load_hf(tmp_path / "out")[1], cut.params)


def test_what_cannot_stay_is_packed_again_on_request(source, tmp_path):
    """Experts whose numbers changed; the error that is told is that of the files."""
    _, name, model = source
    lineage = Lineage.of(model.config).changed(("experts",))
    noise = np.random.default_rng(0)
    params = jax.tree.map_with_path(
        lambda path, leaf: leaf * noise.uniform(0.9, 1.1, leaf.shape).astype(leaf.dtype)
        if "experts" in str(path) and "bias" not in str(path)
        else leaf,
        model.params,
    )
    changed = Model(params, model.config)
    found = _saved(source, tmp_path / "plain", lineage, changed)
    assert not found.packed
    assert "numbers of its own" in found.reason
    assert trees_equal(load_hf(tmp_path / "plain")[1], params)
    found = _saved(source, tmp_path / "out", lineage, changed, "source")
    assert found.packed
    assert found.repacked > 0
    assert (found.kept > 0) == (name != "mxfp4")  # attention stays
    again = load_hf(tmp_path / "out")[1]
    errors: dict[str, list] = {}
    for (path, read), (_, leaf) in zip(
        leaves_with_path(again), leaves_with_path(params), strict=True
    ):
        exact, read = (np.asarray(x).astype(np.float64) for x in (leaf, read))
        if "experts" in path and "bias" not in path[-1]:
            kind = path_name(path[2:])
            if name == "mxfp4" and path[-1] in ("gate", "up"):  # one tensor
                kind = "moe.experts.gate"
            errors.setdefault(kind, []).append([((read - exact) ** 2).sum(), (exact**2).sum()])
        else:
            np.testing.assert_array_equal(read, exact)
    for kind, sums in errors.items():
        error, whole = np.sum(sums, 0)
        assert found.errors[kind] == pytest.approx(np.sqrt(error / whole), rel=1e-4)
        assert found.errors[kind] <= found.worst[0] < (0.2 if name == "mxfp4" else 0.04)
    assert errors.keys() == found.errors.keys()
    # What is on the grid stays there.
    _saved(
        (tmp_path / "out", name), tmp_path / "twice", lineage, Model(again, model.config), "source"
    )
    assert trees_equal(load_hf(tmp_path / "twice")[1], again)


@pytest.mark.parametrize("block", [(3, 4), (1, 0), (1, 4)])
def test_eight_bits_are_the_nearest_of_all(block):
    """For the scale that reaches the largest magnitude of a block."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(7, 10)) * np.exp(rng.normal(size=(7, 10)) * 3)
    matrix[:3, :4] = 0
    matrix = matrix.astype(ml_dtypes.bfloat16)
    weights, scales = Floats8(block, "_scale").pack(matrix)
    grid = np.arange(256).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    grid = grid[np.isfinite(grid)]
    for i, j in np.ndindex(matrix.shape):
        at = (i // block[0], j // block[1] if block[1] else 0)
        columns = slice(at[1] * block[1], (at[1] + 1) * block[1]) if block[1] else slice(None)
        part = matrix[at[0] * block[0] : (at[0] + 1) * block[0], columns].astype(np.float64)
        scale, exact = float(scales[at]), float(matrix[i, j])
        assert scale == pytest.approx(np.abs(part).max() / 448 or 1, rel=1e-6)
        nearest = np.abs(grid * scale - exact).min()
        assert abs(float(weights[i, j]) * scale - exact) <= nearest * (1 + 1e-5)


def test_four_bits_are_the_best_of_all_numbers_and_two_exponents():
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(2, 64, 5)) * np.exp(rng.normal(size=(2, 64, 5)))
    numbers[0, :32, 0], numbers[0, :32, 1] = 0, -0.0
    numbers[1, 32, 2] = 1e-38
    numbers = numbers.astype(ml_dtypes.bfloat16)
    scheme = Floats4()
    found = scheme.unpack(*scheme.pack(numbers)).astype(np.float64)
    assert np.signbit(found[0, :32, 1]).all()
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = np.concatenate([magnitudes, -magnitudes])
    for e, g, column in np.ndindex(2, 2, 5):
        group = numbers[e, g * 32 : g * 32 + 32, column].astype(np.float64)
        floor = np.floor(np.log2(np.abs(group).max() or 1)) - 2
        best = min(
            (np.abs(group[:, None] - grid * 2.0**n).min(1) ** 2).sum() for n in (floor, floor + 1)
        )
        error = ((found[e, g * 32 : g * 32 + 32, column] - group) ** 2).sum()
        assert error == pytest.approx(best, rel=1e-6)


INTEGERS = {"num_bits": 4, "type": "int", "strategy": "group"}


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "got quant_method 'awq' and 4-bit integers with zero"),
        ({"quant_method": "gptq", "bits": 4}, "got quant_method 'gptq' and integers packed"),
        ({"quant_method": "bitsandbytes"}, "got quant_method 'bitsandbytes' and 4-bit code books"),
        (
            {"quant_method": "compressed-tensors"},
            "'compressed-tensors' and format None of no groups",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": INTEGERS}},
            },
            r"format 'pack-quantized' of \[\(4, 'int', 'group', None\)\]",
        ),
        ({"quant_method": "fp8"}, r"weight_block_size \[\]"),
        ({"quant_method": "fp8", "weight_block_size": [8, 8]}, r"must be \(.*scales of blocks"),
        ({"quant_method": "mxfp4"}, r"proj.weight must be one of .*got 'F8_E4M3'"),
    ],
)
def test_other_schemes_are_refused_by_name(source, tmp_path, scheme, message):
    folder, name, _ = source
    if name != "fp8":
        return
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    _describe(tmp_path, scheme)
    with pytest.raises(ValueError, match=message):
        load_hf(tmp_path)


def test_four_bits_without_their_scales_are_refused(tmp_path):
    _mxfp4(tmp_path)
    with pytest.raises(ValueError, match=r"proj_blocks must be one of .* got 'U8'"):
        load_hf(tmp_path)
    _describe(tmp_path, SCHEMES["mxfp4"])
    tensors = load_file(tmp_path / "model.safetensors")
    short = {key: t[..., :1, :] if "_blocks" in key else t for key, t in tensors.items()}
    save_file({k: t.contiguous() for k, t in short.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"down_proj_blocks and .*_scales alone must be bytes"):
        load_hf(tmp_path)


def test_transformers_reads_what_stayed_packed(tmp_path):
    """The stock class, which unpacks where there is no GPU, has the weights of 16 bits."""
    folder = tmp_path / "source"
    _source(folder, "fp8")
    model = Model(*load_hf(folder)[::-1])
    removal = dict.fromkeys(model.config.moe_layers, LayerPlan(deleted=(1, 6)))
    lineage, cut = _cut(model, Plan(removal))
    assert save_hf(tmp_path / "packed", *cut, folder, lineage=lineage).packed
    assert not save_hf(tmp_path / "plain", *cut, folder).packed
    packed, plain = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16).state_dict()
        for name in ("packed", "plain")
    )
    assert packed.keys() == plain.keys()
    for key, tensor in plain.items():
        assert torch.equal(packed[key], tensor), key


def test_a_run_tells_how_its_result_is_stored(tmp_path, caplog):
    """Before work and in the report; what attention has stays, a repair is packed again."""
    _source(tmp_path / "model", "fp8")
    save_tokenizer(tmp_path / "model")
    narrow = {"method": "slim", "importance": "weight_norm", "width_ratio": 0.5, "repair": True}
    run = make_run(tmp_path, narrow, evaluation={}, export={"packing": "source"})
    caplog.set_level("INFO", "moe_jax.compress")
    report, paths = compress(run)
    assert "weights as stored: 21 kB before, 17.1 kB after\n  Packed as the source" in caplog.text
    assert "Packing again moved weights by a relative error" in caplog.text
    output = report["output"]
    assert output["packed"]
    assert 0 < output["packing_error"]["moe.experts.down"] < 0.1
    before, after = read_tensors(tmp_path / "model"), read_tensors(paths["checkpoint"])
    assert {key for key, found in before.items() if after[key] == found} >= {
        key for key in before if "self_attn" in key
    }
    assert compress(run)[0]["output"] == output


def test_a_dry_run_says_that_half_of_gpt_oss_is_larger(tmp_path):
    """13.76 GB are what the hub has of gpt-oss-20b; a half of it in 16 bits is more."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**PUBLIC["gpt_oss_20b"].hf, "dtype": "bfloat16"}))
    half = {"method": "slim", "importance": "lm", "width_ratio": 0.5}
    run = {"model": str(file), "output": "out", "calibration": {"files": ["a.txt"]}}
    text = dry_run(RunConfig.from_dict({**run, "stages": [half]}))
    assert "weights as stored: 13.8 GB before, 22.7 GB after: LARGER than the source" in text
    assert "export.packing = 'source' would leave 8.68 GB" in text
    removal = {"method": "reap", "replacement": "delete", "keep_ratio": 0.5}
    text = dry_run(RunConfig.from_dict({**run, "stages": [removal]}))
    assert "48 tensors have its bytes, 0 are packed again" in text
