"""Experts that differ in width or add a constant: on disk, in transformers, in orbax, on a mesh."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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

from moe_jax.checkpoint import load_params, save_params
from moe_jax.config import LayerConfig, ModelConfig, MoeConfig
from moe_jax.convert import PARAMS, convert
from moe_jax.hf import load_hf, save_hf
from moe_jax.hf.config_export import export_config, needs_modeling_file
from moe_jax.hf.config_import import model_config
from moe_jax.hf.families import find_family
from moe_jax.hf.folder import CONFIG, read_json
from moe_jax.hf.names import expand
from moe_jax.hf.novices import experts_path
from moe_jax.hf.source import stored_layout
from moe_jax.inspect import describe
from moe_jax.kinds import GroupedQueryAttention
from moe_jax.model import forward
from moe_jax.params import count_params
from moe_jax.processes import make_mesh, spec_tree

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 20))


def everything(config: ModelConfig) -> ModelConfig:
    """Widths, constants and a novice in the first layer, constants alone in the last."""
    first, last = config.moe_layers[0], config.moe_layers[-1]
    count = config.moe(first).num_experts
    config = config.replace_moe(
        first,
        expert_width=9,
        expert_widths=(4, 0, 9, 4) * (count // 4),
        expert_bias=True,
        novice_ids=tuple(range(1, count, 4)),
    )
    return config.replace_moe(last, expert_bias=True)


def widths(config: ModelConfig) -> ModelConfig:
    """Each expert of each layer of its own width."""
    for i in config.moe_layers:
        each = (2, 7, 3, 5) * (config.moe(i).num_experts // 4)
        config = config.replace_moe(i, expert_width=7, expert_widths=each)
    return config


def constants(config: ModelConfig) -> ModelConfig:
    """Experts of the stock class's shapes that add constants."""
    for i in config.moe_layers:
        config = config.replace_moe(i, expert_bias=True)
    return config


@pytest.mark.parametrize(
    ("family", "change"),
    [*((family, everything) for family in MIXTURES), ("olmoe", widths), ("qwen3_moe", constants)],
)
def test_transformers_gives_the_same_logits(tmp_path, family, change):
    source = save_tiny(tmp_path / "source", family, fused=True)
    config = change(load_hf(source)[0])
    params = random_params(config)
    save_hf(tmp_path / "out", params, config, source=source)
    again, loaded = load_hf(tmp_path / "out")
    assert again == config
    assert trees_equal(loaded, params)
    expected = jax.jit(lambda weights: forward(weights, config, jnp.asarray(TOKENS))[0])(params)
    got = torch_logits(tmp_path / "out", TOKENS, trust_remote_code=True)
    assert np.abs(got - np.asarray(expected)).max() < 2e-4


@pytest.mark.parametrize(("dtype", "max_shard_bytes"), [(jnp.float32, 1500), (jnp.bfloat16, 5e9)])
@pytest.mark.parametrize("family", MIXTURES)
def test_every_expert_has_tensors_of_its_own_shapes(tmp_path, family, dtype, max_shard_bytes):
    source = save_tiny(tmp_path / "source", family)
    config = everything(load_hf(source)[0])
    params = random_params(config, dtype=dtype)
    out, back = tmp_path / "out", tmp_path / "back"
    save_hf(out, params, config, source=source, max_shard_bytes=max_shard_bytes)
    tensors = read_tensors(out)
    assert (len(list(out.glob("*.safetensors"))) > 1) == (max_shard_bytes < 1e6)
    row = find_family(family)
    i = config.moe_layers[0]
    experts = experts_path(row, i)
    down = row.layouts["per_expert"]["layers.{layer}.moe.expert_bias"].name.split(".")[-2]
    shapes = {key: tensors[key][1] for key in tensors if key.startswith(f"{experts}.")}
    assert shapes[f"{experts}.1.approx_value"] == (16,)
    assert sum(key.startswith(f"{experts}.1.") for key in shapes) == 1
    for e, width in ((0, 4), (2, 9), (3, 4)):
        assert shapes[f"{experts}.{e}.{down}.weight"] == (16, width)
        assert shapes[f"{experts}.{e}.{down}.bias"] == (16,)
    moe = params["layers"][i]["moe"]  # stored: expert 2, and 6, then 0 and 3
    row = config.moe(i).expert_ids.index(0)
    assert tensors[f"{experts}.0.{down}.bias"][2] == np.asarray(moe["expert_bias"][row]).tobytes()
    stored = np.asarray(moe["experts"][1]["down"][1]).T
    assert tensors[f"{experts}.3.{down}.weight"][2] == np.ascontiguousarray(stored).tobytes()
    again, loaded = load_hf(out)
    assert again == config
    assert trees_equal(loaded, params)
    save_hf(back, loaded, again, source=out)
    assert read_tensors(back) == tensors
    assert read_json(back / CONFIG) == read_json(out / CONFIG)


@pytest.mark.parametrize("family", MIXTURES)
def test_config_says_what_the_layers_hold(tmp_path, family):
    source = save_tiny(tmp_path / "source", family)
    plain = load_hf(source)[0]
    config = everything(plain)
    before = read_json(source / CONFIG)
    hf = export_config(config, before)
    (key,) = find_family(family).keys["expert_width"].names
    assert hf[key] == 9
    first, last = (hf["moe_jax_layers"][i] for i in (config.moe_layers[0], -1))
    assert first["expert_widths"][:4] == [4, 0, 9, 4]
    told = None if find_family(family).holds_constants else True
    assert first.get("expert_bias") is last.get("expert_bias") is told
    assert "expert_widths" not in last
    assert "compression_config" not in hf  # the serving proposal has no words for such experts
    assert needs_modeling_file(config)
    assert needs_modeling_file(constants(plain)) == bool(told)
    assert needs_modeling_file(widths(plain))
    restored = export_config(plain, hf)
    assert not {"auto_map", "moe_jax_layers"} & set(restored)
    assert model_config(restored) == plain


def test_what_transformers_saves_of_it_is_read_again(tmp_path):
    source = save_tiny(tmp_path / "source", "qwen3_moe")
    config = everything(load_hf(source)[0])
    params = random_params(config)
    save_hf(tmp_path / "out", params, config, source=source)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    again, loaded = load_hf(tmp_path / "again")
    assert again == config
    assert trees_equal(loaded, params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_widths": [4, 9, 4]}, r"layer 0: expert_widths must be 4 numbers"),
        ({"expert_widths": [4, 2, 9, 4]}, r"0 for the novices \(1,\)"),
        ({"expert_widths": [4, 0, 0, 9]}, r"0 for the novices \(1,\)"),
        ({"expert_widths": [4, 0, -9, 9]}, r"positive for the others"),
        ({"expert_widths": [4, 0, 8, 4]}, r"reach expert_width = 9"),
        ({"expert_widths": [9, 0, 9, 9]}, r"must differ"),
        ({"expert_widths": 9}, r"moe_jax_layers: layer 0: expert_widths must be a list"),
        ({"expert_widths": [4, 0, 9, "4"]}, r"layer 0: expert_widths must be of type int"),
        ({"expert_widths": [4, False, 9, 4]}, r"layer 0: expert_widths must be of type int"),
        ({"expert_bias": 1}, r"moe_jax_layers: layer 0: expert_bias must be of type bool"),
        ({"expert_width": 9.0}, r"moe_jax_layers: layer 0: expert_width must be of type int"),
    ],
)
def test_bad_facts_are_named(tmp_path, change, message):
    hf = export_config(everything(load_hf(save_tiny(tmp_path, "olmoe"))[0]))
    hf["moe_jax_layers"][0].update(change)
    with pytest.raises(ValueError, match=message):
        model_config(hf)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"expert_widths": [5, 0, 9, 4]}, r"experts\.0\.\w+_proj\.weight must have shape"),
        ({"expert_bias": False}, r"none missing, 3 \(.*experts\.0\.down_proj\.bias.* unexpected"),
    ],
)
def test_tensors_that_do_not_follow_from_the_facts_are_named(tmp_path, facts, message):
    config = everything(load_hf(save_tiny(tmp_path / "source", "olmoe"))[0])
    save_hf(tmp_path / "out", random_params(config), config)
    hf = read_json(tmp_path / "out" / CONFIG)
    hf["moe_jax_layers"][0].update(facts)
    (tmp_path / "out" / CONFIG).write_text(json.dumps(hf))
    with pytest.raises(ValueError, match=message):
        load_hf(tmp_path / "out")


@pytest.mark.parametrize("change", [everything, widths, constants])
def test_stacked_layouts_cannot_hold_them(tmp_path, change):
    source = save_tiny(tmp_path, "phimoe", fused=True)
    plain = load_hf(source)[0]
    row = find_family("phimoe")
    assert stored_layout(plain, source)["layout"] == "fused"
    assert stored_layout(change(plain), source)["layout"] == "per_expert"
    with pytest.raises(ValueError, match=r"'fused' has no tensor name for layers\.0\.moe\.expert"):
        expand(row, change(plain), "fused")


def test_inspect_shows_the_span_of_widths(tmp_path):
    config = everything(load_hf(save_tiny(tmp_path, "qwen3_moe"))[0])
    counts = count_params(config)
    assert counts.total == sum(leaf.size for leaf in jax.tree.leaves(random_params(config)))
    report = describe(export_config(config))
    assert f"{counts.total:,}" in report
    rows = [line.split() for line in report.splitlines()[-3:]]
    assert [row[6] for row in rows] == ["4-9", "12", "8"]
    assert rows[0][3:5] == ["4", "1"]


# Two buckets of two experts, one of them beside novices: all divide a mesh axis of two.
WIDE = ModelConfig(
    family="olmoe",
    vocab_size=32,
    width=16,
    attention=GroupedQueryAttention(8, qk_norm="full"),
    layers=(
        LayerConfig(2, 2, MoeConfig(4, 2, 8, (), (8, 4, 8, 4), True)),
        LayerConfig(2, 2, MoeConfig(4, 2, 6, (0, 3), expert_bias=True)),
        LayerConfig(2, 2, MoeConfig(4, 2, 8)),
    ),
)
# As many widths as experts: more than ten.
MANY = WIDE.replace_moe(0, num_experts=12, expert_width=12, expert_widths=(*range(1, 13),))
UNEVEN = WIDE.replace_moe(0, expert_widths=(8, 4, 4, 4))


def test_a_mesh_shards_what_is_read_and_saved(tmp_path):
    params, mesh = random_params(WIDE), make_mesh({"expert": 2, "fsdp": 2, "tensor": 2})
    save_hf(tmp_path / "out", params, WIDE)
    config, loaded = load_hf(tmp_path / "out", mesh=mesh)
    assert config == WIDE
    assert trees_equal(loaded, params)
    moe = loaded["layers"][0]["moe"]
    for leaf in (moe["experts"][1]["gate"], moe["expert_bias"]):
        assert leaf.sharding.shard_shape(leaf.shape)[0] == leaf.shape[0] // 2
    save_hf(tmp_path / "again", loaded, config)
    assert read_tensors(tmp_path / "again") == read_tensors(tmp_path / "out")


def test_a_bucket_that_does_not_divide_its_mesh_axis_is_named(tmp_path):
    params = random_params(UNEVEN)
    save_hf(tmp_path / "out", params, UNEVEN)
    save_params(tmp_path / "params", params)
    mesh = make_mesh({"expert": 2})
    message = r"layers\.0\.moe\.experts\.0\.down: .* mesh axis 'expert', got 1 over 2 devices"
    with pytest.raises(ValueError, match=message):
        load_hf(tmp_path / "out", mesh=mesh)
    with pytest.raises(ValueError, match=message):
        load_params(tmp_path / "params", UNEVEN, mesh)


def test_orbax_reads_and_writes_sharded_weights(tmp_path):
    params, mesh = random_params(WIDE), make_mesh({"expert": 2, "fsdp": 2, "tensor": 2})
    save_params(tmp_path / "params", jax.device_put(params, spec_tree(WIDE, mesh)))
    loaded = load_params(tmp_path / "params", WIDE, mesh)
    assert trees_equal(loaded, params)
    gate = loaded["layers"][0]["moe"]["experts"][1]["gate"]
    assert gate.sharding.shard_shape(gate.shape) == (1, 8, 2)
    with pytest.raises(ValueError, match=r"layers\.0\.moe\.experts\.0\.down must have shape"):
        load_params(tmp_path / "params", UNEVEN)
    uniform = WIDE.replace_moe(0, expert_widths=())
    with pytest.raises(ValueError, match=r"layers\.0\.moe\.experts\.0\.down must have shape none"):
        load_params(tmp_path / "params", uniform)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(WIDE, jnp.float32), (MANY, jnp.bfloat16)],
    ids=["two widths", "twelve widths"],
)
def test_there_and_back_gives_the_same_files(tmp_path, config, dtype):
    params = random_params(config, dtype=dtype)
    save_hf(tmp_path / "hf", params, config)
    assert convert(tmp_path / "hf", tmp_path / "orbax") == config
    assert trees_equal(load_params(tmp_path / "orbax" / PARAMS, config), params)
    assert convert(tmp_path / "orbax", tmp_path / "back") == config
    assert read_tensors(tmp_path / "back") == read_tensors(tmp_path / "hf")
    assert read_json(tmp_path / "back" / CONFIG) == read_json(tmp_path / "hf" / CONFIG)
    assert (tmp_path / "back" / "modeling_moe_jax_novice.py").exists()
