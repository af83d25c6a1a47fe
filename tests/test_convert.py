"""Hugging Face to orbax and back."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_hf import FAMILIES, random_params, read_tensors, save_tiny, trees_equal

from moe_jax.checkpoint import load_params, open_params, save_params
from moe_jax.convert import MODEL_CONFIG, PARAMS, SIDECARS, convert
from moe_jax.hf import load_hf, save_hf
from moe_jax.hf.reader import open_hf
from moe_jax.stored import in_memory

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_gives_the_same_files(tmp_path, family, fused):
    source = save_tiny(tmp_path / "hf", family, fused=fused, dtype=torch.bfloat16)
    (source / "tokenizer.json").write_text("{}")
    config = convert(source, tmp_path / "orbax")
    assert convert(tmp_path / "orbax", tmp_path / "back", max_shard_bytes=3000) == config
    assert read_tensors(tmp_path / "back") == read_tensors(source)
    assert (tmp_path / "back" / "tokenizer.json").exists()
    assert (tmp_path / "back" / "generation_config.json").exists()


def test_a_stored_tied_head_comes_back(tmp_path):
    source = save_tiny(tmp_path / "hf", "olmoe", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == read_tensors(source)


def test_novices_survive(tmp_path):
    source = save_tiny(tmp_path / "hf", "phimoe")
    config = load_hf(source)[0].replace_moe(0, novice_ids=(2,))
    params = random_params(config)
    save_hf(tmp_path / "novices", params, config, source=source)
    assert convert(tmp_path / "novices", tmp_path / "orbax") == config
    assert trees_equal(load_params(tmp_path / "orbax" / PARAMS, config), params)
    convert(tmp_path / "orbax", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == read_tensors(tmp_path / "novices")
    assert (tmp_path / "back" / "modeling_moe_jax_novice.py").exists()


def test_dtype_converts(tmp_path):
    source = save_tiny(tmp_path / "hf", "olmoe")
    config = convert(source, tmp_path / "orbax", dtype="bfloat16")
    params = load_params(tmp_path / "orbax" / PARAMS, config)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_weights_of_another_architecture_are_refused(tmp_path):
    config, params = load_hf(save_tiny(tmp_path / "hf", "olmoe"))
    save_params(tmp_path / "params", params)
    slim = config.replace_moe(0, expert_width=4)
    with pytest.raises(ValueError, match=r"layers\.0\.moe\.experts\.down must have shape"):
        load_params(tmp_path / "params", slim)
    tied = load_hf(save_tiny(tmp_path / "tied", "olmoe", tie_word_embeddings=True))[0]
    with pytest.raises(ValueError, match=r"lm_head\.kernel must have shape none"):
        load_params(tmp_path / "params", tied)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_params(tmp_path / "absent", config)


def test_weights_are_placed_on_a_mesh(tmp_path):
    config, params = load_hf(save_tiny(tmp_path / "hf", "olmoe"))
    save_params(tmp_path / "params", params)
    axes = ("data", "fsdp", "expert", "tensor")
    mesh = jax.make_mesh((1, 2, 2, 2), axes, (jax.sharding.AxisType.Auto,) * 4)
    loaded = load_params(tmp_path / "params", config, mesh)
    assert trees_equal(loaded, params)
    assert not loaded["layers"][0]["moe"]["experts"]["gate"].sharding.is_fully_replicated


def test_folders_that_are_not_ours_are_left_alone(tmp_path):
    source = save_tiny(tmp_path / "hf", "olmoe")
    with pytest.raises(FileExistsError, match="must be empty"):
        convert(source, source)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        convert(tmp_path / "absent", tmp_path / "out")
    convert(source, tmp_path / "orbax")
    (tmp_path / "orbax" / MODEL_CONFIG).write_text("{}")
    with pytest.raises(ValueError, match="not a model configuration"):
        convert(tmp_path / "orbax", tmp_path / "out")
    assert (tmp_path / "orbax" / SIDECARS / "config.json").exists()
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path):
    source = save_tiny(tmp_path / "hf", "olmoe")
    command = [sys.executable, "-m", "moe_jax.convert"]
    config = f"--config={REPOSITORY / 'configs' / 'convert.py'}"

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)

    paths = (f"--config.source={source}", f"--config.output={tmp_path / 'out'}")
    done = run(config, *paths)
    assert done.returncode == 0, done.stderr
    assert "olmoe" in done.stdout
    misspelt = run(config, "--config.sorce=x")
    assert misspelt.returncode != 0
    assert "did you mean 'source'" in misspelt.stderr.strip().splitlines()[-1]
    assert "Traceback" not in misspelt.stderr
    assert "--config.output must name a folder" in run(config, paths[0]).stderr


def test_weights_are_written_and_read_an_array_at_a_time(tmp_path):
    """Stored leaves give the bytes that arrays in memory give, both ways."""
    source = save_tiny(tmp_path / "source", "qwen3_moe")
    config, whole = load_hf(source)
    _, stored = open_hf(source)
    save_params(tmp_path / "params", stored)
    for found in (
        load_params(tmp_path / "params", config),
        open_params(tmp_path / "params", config),
    ):
        jax.tree.map(np.testing.assert_array_equal, in_memory(found), whole)
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        open_params(tmp_path / "none", config)
    with pytest.raises(ValueError, match=r"embed\.embedding must have shape"):
        open_params(tmp_path / "params", dataclasses.replace(config, vocab_size=3))
