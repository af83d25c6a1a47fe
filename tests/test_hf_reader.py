"""Damaged, incomplete and hostile checkpoints: a clear error before any weight is read."""

from __future__ import annotations

import json
import os
import pickle
import struct

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_hf import save_tiny

from moe_jax.hf import load_hf, save_hf
from moe_jax.hf.safetensors_file import TensorReader, read_header, write_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"


@pytest.fixture
def model(tmp_path):
    return save_tiny(tmp_path / "model", "olmoe")


@pytest.fixture
def sharded(model, tmp_path):
    config, params = load_hf(model)
    save_hf(tmp_path / "sharded", params, config, source=model, max_shard_bytes=4000)
    return tmp_path / "sharded"


def rewrite(folder, change):
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def rewrite_header(file, change):
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def rewrite_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_missing_and_unexpected_tensors_are_counted_and_named(model):
    def change(tensors):
        del tensors[EXPERT]
        del tensors["model.norm.weight"]
        tensors["mtp.head.weight"] = torch.zeros(2)

    rewrite(model, change)
    message = r"2 \(model\.norm\.weight, .*experts\.1\.up_proj.*missing, 1 \(mtp\.head\.weight\)"
    with pytest.raises(ValueError, match=message):
        load_hf(model)


def test_an_expert_too_many_is_not_dropped(model):
    rewrite(model, lambda t: t.update({EXPERT.replace(".1.", ".4."): t[EXPERT].clone()}))
    with pytest.raises(ValueError, match=r"none missing, 1 \(.*experts\.4\.up_proj"):
        load_hf(model)


def test_wrong_shapes_are_named(model):
    rewrite(model, lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()}))
    with pytest.raises(ValueError, match=r"experts\.1\.up_proj.* \(8, 16\), got \(16, 8\)"):
        load_hf(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_named(model, dtype, bad):
    def change(tensors):
        for key in list(tensors):
            tensors[key] = tensors[key].to(dtype)
        tensors[EXPERT][3, 2] = bad

    rewrite(model, change)
    with pytest.raises(ValueError, match=r"NaN or infinity in .*experts\.1\.up_proj"):
        load_hf(model)
    load_hf(model, check_finite=False)


def test_overflow_by_conversion_is_not_silent(model):
    rewrite(model, lambda t: t[EXPERT].fill_(1e6))
    with pytest.raises(ValueError, match=r"experts\.1\.up_proj.* read as float16"):
        load_hf(model, dtype="float16")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_files_are_refused(model, keep):
    file = model / SINGLE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated"):
        load_hf(model)


def test_header_that_is_not_json_is_refused(model):
    file = model / SINGLE
    raw = bytearray(file.read_bytes())
    raw[8:12] = b"\xff{[("
    file.write_bytes(raw)
    with pytest.raises(ValueError, match="not valid JSON"):
        load_hf(model)


def test_header_that_is_no_object_or_repeats_a_name_is_refused(tmp_path):
    file = tmp_path / SINGLE
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    for text, message in (
        ("[]", "must be a JSON object"),
        (f'{{"a":{entry},"a":{entry}}}', "'a' occurs more than once"),
        ('{"a":{}}', "malformed entry of a"),
        ('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "malformed entry of a"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "a must span 8 bytes"),
    ):
        file.write_bytes(struct.pack("<Q", len(text)) + text.encode())
        with pytest.raises(ValueError, match=message):
            read_header(file)


def test_header_longer_than_the_file_is_refused(model):
    file = model / SINGLE
    raw = bytearray(file.read_bytes())
    raw[:8] = struct.pack("<Q", 1 << 60)
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=f"got {1 << 60}"):
        load_hf(model)


def shift(header, begin, end):
    key = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])
    offsets = header[key]["data_offsets"]
    header[key]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]


@pytest.mark.parametrize(
    ("begin", "end", "message"),
    [(-4, -4, "overlaps"), (4, 4, "hole"), (0, 4, "must span")],
)
def test_offsets_that_overlap_or_leave_holes_are_refused(model, begin, end, message):
    rewrite_header(model / SINGLE, lambda header: shift(header, begin, end))
    with pytest.raises(ValueError, match=message):
        load_hf(model)


def test_bytes_after_the_last_tensor_are_refused(model):
    with (model / SINGLE).open("ab") as stream:
        stream.write(b"\0" * 16)
    with pytest.raises(ValueError, match="16 bytes after the last tensor"):
        load_hf(model)


def test_quantised_dtypes_are_refused(model):
    rewrite(model, lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}))
    with pytest.raises(ValueError, match=r"experts\.1\.up_proj.*F8_E4M3.*dequantised"):
        load_hf(model)


def test_quantisation_in_the_config_is_refused(model):
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="fp8"):
        load_hf(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_and_not_opened(model, name, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    (model / SINGLE).unlink()
    (model / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=f"pickle.*{name}"):
        load_hf(model)
    assert not (tmp_path / "exploded").exists()


def test_a_folder_without_weights_or_config_says_which(model):
    (model / SINGLE).unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_hf(model)
    (model / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_hf(model)


def test_a_config_that_is_not_json_is_refused(model):
    for text in ("{", "[]"):
        (model / "config.json").write_text(text)
        with pytest.raises(ValueError, match="JSON"):
            load_hf(model)


def test_paths_that_are_no_folder_are_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        load_hf(tmp_path / "absent")
    with pytest.raises(NotADirectoryError, match=r"config\.json"):
        load_hf(model / "config.json")
    with pytest.raises(FileNotFoundError, match="neither a local folder nor"):
        load_hf("nobody/nothing-of-that-name")


@pytest.mark.parametrize("name", ["../{}", "/{}", "sub/{}", "", "..", None])
def test_an_index_may_not_name_files_outside_the_folder(sharded, name):
    outside = sharded.parent / "elsewhere.safetensors"
    first = json.loads((sharded / INDEX).read_text())["weight_map"]["model.norm.weight"]
    (sharded / first).rename(outside)
    target = name and name.format(outside.name)

    def change(weights):
        for key, file in weights.items():
            if file == first:
                weights[key] = target

    rewrite_index(sharded, change)
    with pytest.raises(ValueError, match="must not leave the folder"):
        load_hf(sharded)


def test_links_may_not_leave_the_folder(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    outside = sharded.parent / "elsewhere.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(ValueError, match="links must not leave"):
        load_hf(sharded)


def test_links_of_the_hub_cache_are_followed(sharded, tmp_path):
    repository = tmp_path / "hub" / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    expected = load_hf(sharded)
    for i, file in enumerate(sorted(sharded.iterdir())):
        file.rename(repository / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    found = load_hf(snapshot)
    assert found[0] == expected[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


def test_missing_shards_and_disagreeing_indices_are_named(sharded):
    shards = sorted(file.name for file in sharded.glob("*.safetensors"))
    rewrite_index(sharded, lambda weights: weights.update({"ghost": shards[0]}))
    with pytest.raises(ValueError, match="ghost"):
        load_hf(sharded)
    rewrite_index(sharded, lambda weights: weights.pop("ghost"))
    rewrite_index(sharded, lambda weights: weights.update({"model.norm.weight": shards[-1]}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight lies in"):
        load_hf(sharded)
    rewrite_index(sharded, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(ValueError, match="the index says None"):
        load_hf(sharded)
    (sharded / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=shards[1]):
        load_hf(sharded)


def test_an_index_beside_a_single_file_is_ambiguous(sharded, model):
    (sharded / SINGLE).write_bytes((model / SINGLE).read_bytes())
    with pytest.raises(ValueError, match="got both"):
        load_hf(sharded)


def test_unsupported_dtype_arguments_are_refused(model):
    with pytest.raises(ValueError, match="dtype must be one of"):
        load_hf(model, dtype="int8")


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), max_size=5),
    kind=st.sampled_from(["float32", "float16"]),
)
def test_written_files_are_read_back_and_by_the_reference_library(tmp_path_factory, shapes, kind):
    file = tmp_path_factory.mktemp("file") / SINGLE
    generator = np.random.default_rng(0)
    arrays = [generator.normal(size=shape).astype(kind) for shape in shapes]
    header = [(f"t{i}", array.shape, array.dtype) for i, array in enumerate(arrays)]
    write_file(file, header, iter(arrays))
    reader, infos = TensorReader(), read_header(file)
    reference = load_file(file)
    assert set(infos) == set(reference)
    for i, array in enumerate(arrays):
        np.testing.assert_array_equal(reader.read(infos[f"t{i}"]), array)
        np.testing.assert_array_equal(reference[f"t{i}"].numpy(), array)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_a_damaged_header_is_read_or_refused(tmp_path_factory, position, value):
    folder = tmp_path_factory.mktemp("file")
    header = [(f"t{i}", (2, 3), np.dtype(np.float32)) for i in range(4)]
    write_file(folder / SINGLE, header, [np.ones((2, 3), np.float32)] * 4)
    raw = bytearray((folder / SINGLE).read_bytes())
    raw[position % len(raw)] = value
    (folder / SINGLE).write_bytes(raw)
    try:
        infos = read_header(folder / SINGLE)
    except ValueError:
        return
    for info in infos.values():
        assert TensorReader().read(info).shape == info.shape
