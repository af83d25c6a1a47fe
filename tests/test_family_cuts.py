"""Methods on the families: plans that their routers allow, exports that transformers loads."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from family_cuts import export_error, make_cut, random_batches
from safetensors.torch import load_file, save_file
from tiny_hf import FAMILIES, MIXTURES, SHARED, WEIGHTS, read_tensors, save_tiny, with_further_layer
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

from moe_jax import Plan, apply_plan, calibrate, forward, load_hf, make_plan, save_hf
from moe_jax.convert import convert
from moe_jax.hf.config_export import needs_modeling_file
from moe_jax.hf.reader import prevalent_dtype
from moe_jax.hf.writer import check_source
from moe_jax.kinds import SigmoidRouter, SoftmaxRouter
from moe_jax.model.router import share_logits
from moe_jax.params import Model, abstract_params, cast_params
from moe_jax.plan import Cut, LayerPlan, foreseen, plan_cut
from moe_jax.plan.merge import MERGE_RECIPES

# The families that other tests do not cut; two kinds each here, all of them by
# tools/check_families.py.
_NEW = [f for f in MIXTURES if f not in ("phimoe", "olmoe", "qwen3_moe")]
_PAIRS = (("MoNE", "slim"), ("REAP", "own widths"), ("merge", "OBS"))


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for n, family in enumerate(_NEW) for name in _PAIRS[n % len(_PAIRS)]],
)
def test_an_export_gives_the_logits_of_the_cut(tmp_path, family, name):
    source = save_tiny(tmp_path / "source", family)
    error, stock = export_error(source, tmp_path / "out", name)
    assert error <= 2e-4
    assert stock == (name in ("REAP", "slim", "OBS", "merge"))


def test_constants_beside_neurons_are_stock_where_the_class_has_them(tmp_path):
    config, params = load_hf(save_tiny(tmp_path, "gpt_oss"))
    batches = random_batches()
    cut = Cut.from_dict({"method": "obs", "width_ratio": 0.5, "constants": True})
    stats = calibrate(params, config, batches, second_moments=True, warn=False)
    plan = plan_cut(cut, stats, config, params=params).plan
    small, weights = apply_plan(params, config, plan, stats)
    assert not needs_modeling_file(small)
    before, after = (p["layers"][0]["moe"]["expert_bias"] for p in (params, weights))
    assert np.abs(before - after).max() > 1e-3
    # They take over what goes also where the cut does not ask for any.
    same = plan_cut(dataclasses.replace(cut, constants=False), stats, config, params=params).plan
    assert [one.neurons for one in same.layers.values()] == [
        one.neurons for one in plan.layers.values()
    ]


def _grouped(tmp_path, **changes):
    """Eight experts in four groups of two, of which a token chooses two."""
    facts = {"n_group": 4, "topk_group": 2, "n_routed_experts": 16, **changes}
    return load_hf(save_tiny(tmp_path / "grouped", "deepseek_v3", **facts))


def test_groups_of_a_router_keep_equally_many_experts(tmp_path):
    config, params = _grouped(tmp_path)
    scores = {i: np.arange(16.0) for i in config.moe_layers}
    plan = make_plan(scores, config, keep_ratio=0.5, replacement="delete")
    for layer in plan.layers.values():
        assert layer.deleted == (0, 1, 4, 5, 8, 9, 12, 13)
    small, _ = apply_plan(params, config, plan)
    assert {small.moe(i).num_experts for i in small.moe_layers} == {8}
    # Novices leave the router as it is, so that groups do not matter to them.
    plan = make_plan(scores, config, keep_ratio=0.5)
    assert plan.layers[1].novices == tuple(range(8))


def test_groups_that_cannot_be_equal_or_large_enough_are_refused(tmp_path):
    config, _ = _grouped(tmp_path)
    scores = {i: np.arange(16.0) for i in config.moe_layers}
    with pytest.raises(ValueError, match=r"layer 1: kept experts must be in \[8, 16\].* got 4"):
        make_plan(scores, config, keep_ratio=0.25, replacement="delete")
    with pytest.raises(ValueError, match="multiple of 4"):
        make_plan(scores, config, keep_experts=10, replacement="delete")
    uneven = Plan({1: LayerPlan(deleted=(0, 1))})
    with pytest.raises(ValueError, match=r"4 groups .* at least 2 each, got \[2, 4, 4, 4\]"):
        apply_plan({}, config, uneven)
    stats = calibrate(*reversed(_grouped(tmp_path)), random_batches(), warn=False)
    recipe = next(name for name, one in MERGE_RECIPES.items() if one.grouping == "clusters")
    with pytest.raises(ValueError, match="would leave the router's 4 groups unequal"):
        plan_cut(Cut.from_dict({"method": recipe, "keep_ratio": 0.5}), stats, config)


def test_layers_for_further_tokens_are_carried_or_left_out_on_purpose(tmp_path):
    source = with_further_layer(save_tiny(tmp_path / "source", "deepseek_v3"))
    config, params = load_hf(source)
    save_hf(tmp_path / "same", params, config, source=source)
    assert read_tensors(tmp_path / "same") == read_tensors(source)
    cut = make_cut(Model(params, config), "slim")
    with pytest.warns(UserWarning, match="multi-token prediction behind layer 2 are left out"):
        save_hf(tmp_path / "cut", cut.params, cut.config, source=source)
    hf = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert hf["num_nextn_predict_layers"] == 0
    assert not any(".layers.3." in name for name in read_tensors(tmp_path / "cut"))
    assert load_hf(tmp_path / "cut")[0] == cut.config
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_nextn_predict_layers": 0}))
    with pytest.raises(ValueError, match=r"unexpected.*|.*layers\.3\."):
        load_hf(source)


def test_tensors_beside_the_layers_are_carried_too(tmp_path):
    """ERNIE keeps its layer for a further token under names of its own."""
    source = save_tiny(tmp_path / "source", "ernie4_5_moe")
    tensors = load_file(source / WEIGHTS)
    tensors["model.mtp_block.0.mlp.up_proj.weight"] = torch.ones(3, 4)
    tensors["model.mtp_linear_proj.0.weight"] = torch.ones(2, 2)
    save_file(tensors, source / WEIGHTS, {"format": "pt"})
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_nextn_predict_layers": 1}))
    config, params = load_hf(source)
    save_hf(tmp_path / "same", params, config, source=source)
    assert read_tensors(tmp_path / "same") == read_tensors(source)


def test_what_small_files_announce_and_no_tensor_holds_is_taken_back(tmp_path):
    source = with_further_layer(save_tiny(tmp_path / "source", "deepseek_v3"))
    convert(source, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    hf = json.loads((tmp_path / "back" / "config.json").read_text())
    assert hf["num_nextn_predict_layers"] == 0
    assert not any(".layers.3." in name for name in read_tensors(tmp_path / "back"))


def test_frequencies_that_old_files_store_are_no_weights(tmp_path):
    source = save_tiny(tmp_path / "source", "deepseek_v3")
    plain = load_hf(source)
    tensors = load_file(source / WEIGHTS)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, source / WEIGHTS, {"format": "pt"})
    config, params = load_hf(source)
    assert config == plain[0]
    jax.tree.map(np.testing.assert_array_equal, params, plain[1])


def test_corrections_are_no_weights_to_be_cast(tmp_path):
    config, params = load_hf(save_tiny(tmp_path / "source", "deepseek_v3"))
    cast = cast_params(params, abstract_params(config), "bfloat16")
    router, before = cast["layers"][1]["moe"]["router"], params["layers"][1]["moe"]["router"]
    assert router["kernel"].dtype == "bfloat16"
    np.testing.assert_array_equal(router["correction"], before["correction"])


def test_what_a_router_cannot_be_cut_by_is_known_before_work(tmp_path):
    config, _ = _grouped(tmp_path)
    for method in (
        "rerouted",
        next(n for n, r in MERGE_RECIPES.items() if r.grouping == "clusters"),
    ):
        fields = {"method": method, "keep_ratio": 0.5}
        if method == "rerouted":
            fields["replacement"] = "delete"
        with pytest.raises(ValueError, match="groups"):
            foreseen(Cut.from_dict(fields), config)


def test_exports_name_the_dtype_of_all_but_corrections(tmp_path):
    source = save_tiny(tmp_path / "source", "deepseek_v3")
    config, params = load_hf(source)
    save_hf(tmp_path / "out", params, config, source=source, dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert prevalent_dtype(tmp_path / "out") == "bfloat16"


def test_shares_of_a_router_are_its_scores_over_their_sum():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)))
    scores = 1 / (1 + np.exp(-np.asarray(logits)))
    found = jax.nn.softmax(share_logits(logits, SigmoidRouter()), -1)
    np.testing.assert_allclose(found, scores / scores.sum(-1, keepdims=True), rtol=1e-5)
    assert share_logits(logits, SoftmaxRouter()) is logits


def test_corrections_of_a_router_keep_their_own_dtype(tmp_path):
    source = save_tiny(tmp_path / "source", "deepseek_v3")
    config, params = load_hf(source, dtype="bfloat16")
    router = params["layers"][1]["moe"]["router"]
    assert (router["kernel"].dtype, router["correction"].dtype) == ("bfloat16", "float32")
    save_hf(tmp_path / "out", params, config, source=source, dtype="bfloat16")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert read_tensors(tmp_path / "out")[name] == read_tensors(source)[name]


def _multimodal(folder):
    """A tiny Kimi-K2.5, whose text model is a DeepSeek-V3's."""
    row = FAMILIES["deepseek_v3"]
    vision = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    config = Kimi_K25Config(
        text_config={**SHARED, **row.facts, "model_type": "deepseek_v3"},
        vision_config={**vision, "intermediate_size": 8},
        projection_hidden_size=16,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Kimi_K25ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    # It renames layers of the text model too, which published files do not.
    tensors = load_file(folder / WEIGHTS)
    inner = "language_model.model."
    tensors = {k.replace(f"{inner}blocks.", f"{inner}layers."): t for k, t in tensors.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def test_a_text_model_inside_another_is_cut_in_its_place(tmp_path):
    source = _multimodal(tmp_path / "source")
    config, params = load_hf(source)
    assert config.family == "deepseek_v3"
    save_hf(tmp_path / "same", params, config, source=source)
    tensors = read_tensors(source)
    assert read_tensors(tmp_path / "same") == tensors
    first, same = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "same")
    )
    assert same == first
    fewer = Plan(dict.fromkeys(config.moe_layers, LayerPlan(deleted=(0, 4))))
    small, cut = apply_plan(params, config, fewer)
    save_hf(tmp_path / "out", cut, small, source=source)
    written = read_tensors(tmp_path / "out")
    others = {key for key in tensors if not key.startswith("language_model.")}
    assert others
    assert all(written[key] == tensors[key] for key in others)
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf["text_config"]["n_routed_experts"] == 6
    assert {**hf, "text_config": None} == {**first, "text_config": None}
    tokens = random_batches(1)[0]["tokens"]
    for folder, model in ((source, (params, config)), (tmp_path / "out", (cut, small))):
        theirs = Kimi_K25ForConditionalGeneration.from_pretrained(
            folder, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        with torch.no_grad():
            logits = theirs(torch.tensor(tokens).long()).logits.numpy()
        ours = np.asarray(forward(*model, tokens)[0])
        assert np.abs(logits - ours).max() <= 2e-4
    with pytest.raises(ValueError, match="kimi_k25: its text model must be one of the stock class"):
        check_source(source, config.replace_moe(1, novice_ids=(0,)))
    with pytest.raises(ValueError, match="what surrounds the text model has no place"):
        convert(source, tmp_path / "orbax")


def test_kimi_keeps_its_own_name(tmp_path):
    source = save_tiny(tmp_path / "source", "deepseek_v3")
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "kimi_k2"}))
    config, params = load_hf(source)
    save_hf(tmp_path / "out", params, config, source=source)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "kimi_k2"
    assert load_hf(tmp_path / "out")[0] == config
