"""Compressed exports give the model's logits in transformers, and are read back unchanged."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_hf import (
    MIXTURES,
    VOCAB,
    random_params,
    read_tensors,
    save_tiny,
    torch_logits,
    trees_equal,
)
from transformers import AutoModelForCausalLM

from moe_jax.config import DenseConfig
from moe_jax.hf import load_hf, save_hf
from moe_jax.hf.config_import import model_config
from moe_jax.hf.families import find_family
from moe_jax.hf.novices import describe_novices, describe_substitution, experts_path
from moe_jax.model import forward

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 20))


def logits(params, config) -> np.ndarray:
    run = jax.jit(lambda weights, tokens: forward(weights, config, tokens)[0])
    return np.asarray(run(params, jnp.asarray(TOKENS)))


def with_novices(folder):
    """The model of ``folder`` with novices in its first and last MoE layer only."""
    config, _ = load_hf(folder)
    config = config.replace_moe(config.moe_layers[0], novice_ids=(1, 3))
    config = config.replace_moe(config.moe_layers[-1], novice_ids=(0,))
    return config, random_params(config)


def uneven(folder):
    """Layers that differ in heads, experts, novices, width and experts per token."""
    config, _ = load_hf(folder)
    i = config.moe_layers[0]
    first = config.layers[i]
    moe = dataclasses.replace(
        first.feed_forward,
        num_experts=3 * config.router.groups,
        expert_width=6,
        novice_ids=(1,),
        experts_per_token=2,
    )
    layers = list(config.layers)
    layers[i] = dataclasses.replace(
        first, num_heads=2, num_kv_heads=first.num_kv_heads // 2, feed_forward=moe
    )
    for i, layer in enumerate(layers):
        if isinstance(layer.feed_forward, DenseConfig):
            layers[i] = dataclasses.replace(layer, feed_forward=DenseConfig(5))
    config = dataclasses.replace(config, layers=tuple(layers))
    if config.rope.kind == "longrope":
        config = dataclasses.replace(
            config, rope=dataclasses.replace(config.rope, switch_factor=True)
        )
    return config, random_params(config)


@pytest.mark.parametrize("change", [with_novices, uneven])
@pytest.mark.parametrize("family", MIXTURES)
def test_transformers_gives_the_same_logits(tmp_path, family, change):
    source = save_tiny(tmp_path / "source", family, fused=True)
    config, params = change(source)
    out = tmp_path / "out"
    save_hf(out, params, config, source=source)
    again, loaded = load_hf(out)
    assert again == config
    assert trees_equal(loaded, params)
    difference = torch_logits(out, TOKENS, trust_remote_code=True) - logits(params, config)
    assert np.abs(difference).max() < 2e-4


def test_novices_of_a_class_with_constants_are_experts_without_weights(tmp_path):
    """Which ones, says config.json; the stock class runs them as it runs the others."""
    source = save_tiny(tmp_path / "source", "gpt_oss")
    config, params = with_novices(source)
    save_hf(tmp_path / "out", params, config, source=source)
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf["model_type"] == "gpt_oss"
    assert "compression_config" not in hf  # which would name tensors that are not there
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    constants = params["layers"][0]["moe"]["novices"]["constant"]
    np.testing.assert_array_equal(tensors[f"{name}_bias"][[1, 3]], constants)
    assert not tensors[name][[1, 3]].any()
    assert tensors[name][[0, 2]].any()
    tensors[name][3, 0, 0] = 1.0
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"0\.mlp\.experts\.down_proj must be zero .* expert 3"):
        load_hf(tmp_path / "out")


def test_what_transformers_saves_of_it_is_read_again(tmp_path):
    source = save_tiny(tmp_path / "source", "phimoe")
    config, params = with_novices(source)
    save_hf(tmp_path / "out", params, config, source=source)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    generated = model.generate(torch.tensor(TOKENS), max_new_tokens=2, do_sample=False)
    assert generated.shape[1] > TOKENS.shape[1]
    model.save_pretrained(tmp_path / "again")
    again, loaded = load_hf(tmp_path / "again")
    assert again == config
    assert trees_equal(loaded, params)


@pytest.mark.parametrize("family", [f for f in MIXTURES if not find_family(f).holds_constants])
def test_novices_are_stored_as_their_authors_do(tmp_path, family):
    source = save_tiny(tmp_path / "source", family, dtype=torch.bfloat16)
    config, _ = with_novices(source)
    params = random_params(config, dtype=jnp.bfloat16)
    save_hf(tmp_path / "out", params, config, source=source)
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    first, last = config.moe_layers[0], config.moe_layers[-1]
    assert hf["model_type"] == f"{family}_compressed"
    assert hf["approximate_experts"] == {str(first): [1, 3], str(last): [0]}
    assert hf["approximate_expert_init_tokens"] == {str(first): [0, 0], str(last): [0]}
    path = experts_path(find_family(family), first)
    tensors = read_tensors(tmp_path / "out")
    assert tensors[f"{path}.3.approx_value"][:2] == ("BF16", (config.width,))
    parts = {key.rsplit(".", 2)[-2] for key in tensors if key.startswith(f"{path}.2.")}
    assert parts in ({"w1", "w2", "w3"}, {"gate_proj", "up_proj", "down_proj"})
    assert [key for key in tensors if key.startswith(f"{path}.3.")] == [f"{path}.3.approx_value"]
    substitution = hf["compression_config"]["transform_config"]["expert_substitution"]
    assert substitution["version"] == 1
    target = substitution["targets"][path]
    assert target["num_logical_experts"] == config.moe(first).num_experts
    assert target["weight_layout"] == "compact_retained_experts"
    assert target["replacements"]["1"] == {
        "format": "constant-v1",
        "tensors": {"value": f"{path}.1.approx_value"},
    }
    given = {"method": "mone", "transform_config": {"other": 1}}
    save_hf(tmp_path / "bare", params, config, source, None, 5e9, None, given)
    hf = json.loads((tmp_path / "bare" / "config.json").read_text())
    assert hf["compression_config"]["method"] == "mone"
    assert set(hf["compression_config"]["transform_config"]) == {"other", "expert_substitution"}
    save_hf(tmp_path / "bare", params, config, source=source, expert_substitution=False)
    hf = json.loads((tmp_path / "bare" / "config.json").read_text())
    assert "compression_config" not in hf
    assert load_hf(tmp_path / "bare")[0] == config


@pytest.mark.parametrize("form", ["authors", "substitution"])
def test_either_description_alone_is_enough(tmp_path, form):
    source = save_tiny(tmp_path / "source", "olmoe")
    config, params = with_novices(source)
    save_hf(tmp_path / "out", params, config, source=source)
    file = tmp_path / "out" / "config.json"
    hf = json.loads(file.read_text())
    if form == "authors":
        del hf["compression_config"], hf["auto_map"]
    else:
        del hf["approximate_experts"], hf["approximate_expert_init_tokens"]
    file.write_text(json.dumps(hf))
    again, loaded = load_hf(tmp_path / "out")
    assert again == config
    assert trees_equal(loaded, params)


def test_descriptions_that_are_wrong_are_refused(tmp_path):
    source = save_tiny(tmp_path / "source", "olmoe")
    config, params = with_novices(source)
    save_hf(tmp_path / "out", params, config, source=source)
    good = json.loads((tmp_path / "out" / "config.json").read_text())
    path = "model.layers.0.mlp.experts"

    def broken(change):
        hf = json.loads(json.dumps(good))
        del hf["approximate_experts"]
        change(hf["compression_config"]["transform_config"]["expert_substitution"])
        return hf

    changes = [
        (lambda raw: raw.update(version=2), "version 1"),
        (lambda raw: raw["router_semantics"].update(preserve_router_weights=False), "semantics"),
        (lambda raw: raw["targets"].update({"mlp.experts": {}}), "target must be"),
        (lambda raw: raw["targets"][path].update(weight_layout="dense"), "weight_layout"),
        (lambda raw: raw["targets"][path]["replacements"]["1"].pop("tensors"), "replacement"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            model_config(broken(change))
    with pytest.raises(ValueError, match="same novices"):
        model_config({**good, "approximate_experts": {"0": [2]}})


def test_a_model_without_novices_is_a_stock_model_again(tmp_path):
    source = save_tiny(tmp_path / "source", "qwen3_moe")
    plain, plain_params = load_hf(source)
    config, params = with_novices(source)
    save_hf(tmp_path / "novices", params, config, source=source)
    save_hf(tmp_path / "out", plain_params, plain, source=tmp_path / "novices")
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after == {**before, "num_experts": 4}
    assert not (tmp_path / "out" / "modeling_moe_jax_novice.py").exists()


def slimmed(config):
    for i in config.moe_layers:
        config = config.replace_moe(i, expert_width=2)
    return config


def fewer_experts(config):
    for i in config.moe_layers:
        config = config.replace_moe(i, num_experts=3 * config.router.groups)
    return config


def fewer_groups(config):
    layers = tuple(
        dataclasses.replace(la, num_heads=2, num_kv_heads=la.num_kv_heads // 2)
        for la in config.layers
    )
    return dataclasses.replace(config, layers=layers)


@pytest.mark.parametrize("change", [slimmed, fewer_experts, fewer_groups])
@pytest.mark.parametrize("family", MIXTURES)
def test_uniform_pruning_loads_in_stock_classes(tmp_path, family, change):
    source = save_tiny(tmp_path / "source", family)
    config = change(load_hf(source)[0])
    params = random_params(config)
    warns = pytest.warns(UserWarning, match="width 2") if change is slimmed else nullcontext()
    with warns:
        save_hf(tmp_path / "out", params, config, source=source)
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    # OLMoE's norms over all heads take their size from the width.
    stock = not (family == "olmoe" and change is fewer_groups)
    assert ("auto_map" not in hf) == stock
    assert hf["model_type"] == (family if stock else "olmoe_compressed")
    got = torch_logits(tmp_path / "out", TOKENS, trust_remote_code=not stock)
    assert np.abs(got - logits(params, config)).max() < 2e-4
    assert load_hf(tmp_path / "out")[0] == config


def test_hub_style_phi_with_novices_keeps_its_long_factors(tmp_path):
    source = save_tiny(tmp_path / "source", "phimoe")
    file = source / "config.json"
    hub = json.loads(file.read_text())
    hub["auto_map"] = {"AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM"}
    file.write_text(json.dumps({**hub, "head_dim": 4}))
    config, params = with_novices(source)
    assert config.rope.switch_factor
    save_hf(tmp_path / "out", params, config, source=source)
    assert load_hf(tmp_path / "out")[0] == config
    assert TOKENS.shape[1] > config.rope.original_positions
    difference = torch_logits(tmp_path / "out", TOKENS, trust_remote_code=True)
    assert np.abs(difference - logits(params, config)).max() < 2e-4


def test_descriptions_name_every_moe_layer(tmp_path):
    config, _ = with_novices(save_tiny(tmp_path, "qwen3_moe"))
    row = find_family(config.family)
    none = config.replace_moe(0, novice_ids=())
    assert describe_novices(none)["approximate_experts"] == {"0": [], "2": [0]}
    assert list(describe_substitution(row, none)["targets"]) == ["model.layers.2.mlp.experts"]
