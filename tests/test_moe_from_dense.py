"""A Mixture-of-Experts model out of a dense one: nothing is lost where all experts are chosen."""

import importlib.util
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import transformers
from models import token_batches
from safetensors.numpy import load_file
from tiny_hf import random_params, save_tiny, torch_logits

from moe_jax import forward, load_hf
from moe_jax.hf.config_import import model_config
from moe_jax.params import Model, count_params

FILE = Path(__file__).parents[1] / "tools" / "moe_from_dense.py"
DENSE = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": True, "max_position_embeddings": 64,
}  # fmt: skip
BATCHES = token_batches(3, batch=2, length=16)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("moe_from_dense", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dense():
    config = model_config(DENSE)
    return Model(random_params(config), config)


def _split(tool, dense, chosen):
    split = tool.Split(shared_width=8, num_experts=4, experts_per_token=chosen)
    return tool.split_model(dense, BATCHES, split, tool.qwen2_moe_config(DENSE, split))


def test_all_experts_are_the_dense_model_if_their_weights_are_equal(tool, dense):
    params, config = _split(tool, dense, 4)
    # The split is of the sum over experts of equal weights.
    layers = [
        {
            **layer,
            "moe": {**layer["moe"], "router": {"kernel": 0 * layer["moe"]["router"]["kernel"]}},
        }
        for layer in params["layers"]
    ]
    tokens = BATCHES[0]["tokens"]
    expected, _ = forward(*dense, tokens)
    found, _ = forward({**params, "layers": layers}, config, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_no_neuron_is_used_twice_and_only_routers_are_new(tool, dense):
    params, config = _split(tool, dense, 2)
    before, after = count_params(dense.config).total, count_params(config).total
    routers = sum(layer["moe"]["router"]["kernel"].size for layer in params["layers"])
    gates = config.num_layers * config.width
    assert after == before + routers + gates
    for old, new in zip(dense.params["layers"], params["layers"], strict=True):
        moe = new["moe"]
        columns = np.concatenate([moe["shared"]["gate"], *moe["experts"]["gate"]], 1)
        order = np.lexsort(columns), np.lexsort(np.asarray(old["mlp"]["gate"]))
        np.testing.assert_array_equal(
            columns[:, order[0]], np.asarray(old["mlp"]["gate"])[:, order[1]]
        )


def test_the_router_finds_the_experts_that_contribute(tool):
    """Two groups of neurons, each active on one side of the input space."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6)).astype(np.float32)
    side = (x[:, 0] > 0)[:, None] == (np.arange(8) % 2 == 0)
    contribution = np.where(side, 1.0, 0.01) * rng.uniform(0.5, 1, (400, 8))
    active = tool.active_neurons(contribution, 0.5)
    clusters = tool.balanced_clusters(active, 2, rounds=8, seed=0)
    assert sorted(map(tuple, clusters)) == [(0, 2, 4, 6), (1, 3, 5, 7)]
    rows = tool.router_rows(x, contribution, clusters, tool.Split())
    chosen = (x @ rows).argmax(1)
    right = np.array([0 in cluster for cluster in clusters])[chosen] == (x[:, 0] > 0)
    assert right.mean() > 0.9


def test_neurons_that_do_not_divide_are_refused(tool):
    with pytest.raises(ValueError, match="shared_width must leave a multiple of 4 experts"):
        tool.qwen2_moe_config(DENSE, tool.Split(shared_width=7, num_experts=4))


def test_a_gguf_file_becomes_the_model_that_it_is_of(tool, tmp_path):
    """Written as llama.cpp has it, rotated pairs side by side; read back without torch."""
    save_tiny(tmp_path / "llama", "llama", num_key_value_heads=2, tie_word_embeddings=True)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "llama")
    tensors = load_file(tmp_path / "llama" / "model.safetensors")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    words = ["<|end|>", *(chr(97 + n) for n in range(26)), "ab"]
    writer.add_token_list(words)
    writer.add_token_types([3, *[1] * 27])
    writer.add_token_merges(["a b"])
    for name in ("bos_token_id", "eos_token_id", "padding_token_id", "unknown_token_id"):
        writer.add_uint32(f"tokenizer.ggml.{name}", 0)
    writer.add_chat_template("{{ messages }}")
    names = {theirs: ours for ours, theirs in tool._LAYER_NAMES.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for key, values in tensors.items():
        stem = key.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            name = names[part]
            if name in heads:
                halves = values.reshape(heads[name], 2, -1, values.shape[1])
                values = halves.swapaxes(1, 2).reshape(values.shape)
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ascontiguousarray(values))
        else:
            name = {theirs: ours for ours, theirs in tool._MODEL_NAMES.items()}[stem]
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "read").mkdir()
    tool.write_dense(tmp_path / "model.gguf", tmp_path / "read")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9))
    expected = torch_logits(tmp_path / "llama", tokens)
    np.testing.assert_allclose(torch_logits(tmp_path / "read", tokens), expected, atol=1e-5)
    ours = forward(*reversed(load_hf(tmp_path / "read", "float32")), tokens)[0]
    np.testing.assert_allclose(ours, expected, atol=2e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "read")
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"


def test_the_configuration_is_whole(tool):
    import runpy

    from moe_jax.run.config import RunConfig

    get_config = runpy.run_path(str(FILE.parents[1] / "configs" / "moe_smollm2.py"))["get_config"]
    for variant in ("standard", "short", "sparse"):
        config = get_config(variant)
        split = tool.section(tool.Split, config.split.to_dict(), "split")
        hf = tool.qwen2_moe_config({**DENSE, "intermediate_size": 1536}, split)
        assert model_config(hf).moe(0).num_experts == 16
        run = {"model": "split", "teacher": "dense", "output": "out", **config.run.to_dict()}
        assert RunConfig.from_dict(run).trains
    with pytest.raises(ValueError, match="takes one of"):
        get_config("huge")
