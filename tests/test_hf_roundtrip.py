"""What is read and written back is the same, to the byte."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_hf import FAMILIES, random_params, read_tensors, save_tiny, trees_equal

from moe_jax.hf import load_hf, save_hf
from moe_jax.hf.families import find_family
from moe_jax.params import leaves_with_path


@pytest.mark.parametrize(
    ("fused", "dtype", "max_shard_bytes"),
    [(False, torch.bfloat16, 2000), (True, torch.float32, 2000), (False, torch.float32, 5e9)],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_reading_and_writing_back_is_byte_identical(
    tmp_path, family, fused, dtype, max_shard_bytes
):
    source = save_tiny(tmp_path / "source", family, fused=fused, dtype=dtype)
    config, params = load_hf(source)
    save_hf(tmp_path / "out", params, config, source=source, max_shard_bytes=max_shard_bytes)
    assert read_tensors(tmp_path / "out") == read_tensors(source)
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes < 1e6)
    again, params_again = load_hf(tmp_path / "out")
    assert again == config
    assert trees_equal(params_again, params)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_missing_alias_is_added_to_an_unchanged_config(tmp_path, family):
    source = save_tiny(tmp_path / "source", family)
    config, params = load_hf(source)
    save_hf(tmp_path / "out", params, config, source=source)
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    added = {n for key in find_family(family).keys.values() if key.write_all for n in key.names}
    expected = {**before, **dict.fromkeys(added, 4)}
    assert after == expected
    assert list(after)[: len(before)] == list(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_source_the_architecture_survives(tmp_path, family):
    config, params = load_hf(save_tiny(tmp_path / "source", family))
    save_hf(tmp_path / "out", params, config)
    again, params_again = load_hf(tmp_path / "out")
    assert again == config
    assert trees_equal(params_again, params)


@pytest.mark.parametrize("stored", [False, True])
def test_tied_models_keep_their_head_if_it_was_stored(tmp_path, stored):
    source = save_tiny(tmp_path / "source", "olmoe", tie_word_embeddings=True)
    if stored:
        tensors = load_file(source / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config, params = load_hf(source)
    assert "lm_head" not in params
    save_hf(tmp_path / "out", params, config, source=source)
    assert read_tensors(tmp_path / "out") == read_tensors(source)


def test_a_stored_head_that_differs_from_tied_embeddings_is_refused(tmp_path):
    source = save_tiny(tmp_path / "source", "olmoe", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight must equal model.embed_tokens.weight"):
        load_hf(source)


def test_dtype_converts_every_weight_and_the_config(tmp_path):
    source = save_tiny(tmp_path / "source", "phimoe")
    config, params = load_hf(source, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    save_hf(tmp_path / "out", params, config, source=source)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {entry[0] for entry in read_tensors(tmp_path / "out").values()} == {"BF16"}
    save_hf(tmp_path / "wide", params, config, source=source, dtype="float32")
    assert {entry[0] for entry in read_tensors(tmp_path / "wide").values()} == {"F32"}


def test_mixed_dtypes_are_kept_per_leaf_and_refused_within_one(tmp_path):
    source = save_tiny(tmp_path / "source", "olmoe", dtype=torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    router = "model.layers.0.mlp.gate.weight"
    tensors[router] = tensors[router].float()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config, params = load_hf(source)
    save_hf(tmp_path / "out", params, config, source=source)
    assert read_tensors(tmp_path / "out") == read_tensors(source)
    expert = "model.layers.0.mlp.experts.2.up_proj.weight"
    tensors[expert] = tensors[expert].float()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"must share a dtype.*experts\.2\.up_proj"):
        load_hf(source)


def test_arrays_that_are_not_contiguous_are_written_right(tmp_path):
    config, _ = load_hf(save_tiny(tmp_path / "source", "olmoe"))
    params = jax.tree.map(np.asarray, random_params(config))
    turned = jax.tree.map(lambda leaf: np.asfortranarray(leaf), params)
    save_hf(tmp_path / "a", params, config)
    save_hf(tmp_path / "b", turned, config)
    assert read_tensors(tmp_path / "a") == read_tensors(tmp_path / "b")


def test_index_and_metadata_are_those_of_other_tools(tmp_path):
    config, params = load_hf(save_tiny(tmp_path / "source", "phimoe"))
    save_hf(tmp_path / "out", params, config, max_shard_bytes=3000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = read_tensors(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    for name in set(index["weight_map"].values()):
        with safe_open(tmp_path / "out" / name, "pt") as stream:
            assert stream.metadata() == {"format": "pt"}


def test_a_mesh_shards_what_is_read(tmp_path):
    source = save_tiny(tmp_path / "source", "olmoe")
    axes = ("data", "fsdp", "expert", "tensor")
    kinds = (jax.sharding.AxisType.Auto,) * 4
    mesh = jax.make_mesh((1, 2, 2, 2), axes, kinds)
    _, params = load_hf(source, mesh=mesh)
    _, whole = load_hf(source)
    assert trees_equal(params, whole)
    for _, leaf in leaves_with_path(params):
        assert leaf.sharding.mesh == mesh
    gate = params["layers"][0]["moe"]["experts"]["gate"]
    assert not gate.sharding.is_fully_replicated
