"""What an export says of itself: where every tensor went, and whether it arrived."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from family_cuts import random_batches
from safetensors.torch import load_file, save_file
from tiny_hf import WEIGHTS, save_tiny, with_further_layer

from moe_jax import load_hf, save_hf
from moe_jax.calibrate import calibrate
from moe_jax.hf.account import check_export
from moe_jax.lineage import Lineage
from moe_jax.plan import LayerPlan, Plan
from moe_jax.prune import apply_plan

HALF = dict.fromkeys(range(4), (0, 2, 3, 6))
GONE, NARROW = (1, 2, 5, 6), {0: (1, 4, 5, 6), 3: (0, 2, 4, 7), 4: (0, 1, 2, 3), 7: (1, 5, 6, 7)}


def exported(source, out, plan, **options):
    """A cut, its lineage and its weights, exported."""
    config, params = load_hf(source)
    stats = calibrate(params, config, random_batches(), second_moments=True, warn=False)
    smaller, weights = apply_plan(params, config, plan, stats)
    lineage = Lineage.of(config).after(plan, smaller)
    save_hf(out, weights, smaller, source=source, lineage=lineage, **options)
    return lineage, weights


def test_every_tensor_is_accounted_for(tmp_path):
    """Four experts of two layers: one removed, one a constant, the others narrowed, one layer."""
    source = save_tiny(tmp_path / "source", "qwen3_moe")
    plan = Plan(
        {
            0: LayerPlan(novices=(1,), deleted=(3,)),
            2: LayerPlan(neurons=HALF, repair=True),
        }
    )
    lineage, weights = exported(source, tmp_path / "out", plan)
    account = check_export(tmp_path / "out", source, lineage, weights)
    tensors = load_file(source / WEIGHTS)
    assert account.outcomes.keys() == tensors.keys()
    expert = "model.layers.{}.mlp.experts.{}.{}_proj.weight".format
    wanted = dict.fromkeys(tensors, "kept")
    for name in ("gate", "up", "down"):
        wanted |= {expert(0, 1, name): "replaced", expert(0, 3, name): "removed"}
        outcome = "changed" if name == "down" else "sliced"
        wanted |= {expert(2, e, name): outcome for e in range(4)}
    wanted["model.layers.0.mlp.gate.weight"] = "sliced"
    assert account.outcomes == wanted
    (made,) = account.made
    assert made == "model.layers.0.mlp.experts.1.approx_value"
    same = sum(t.numel() * 4 for key, t in tensors.items() if wanted[key] == "kept")
    sliced = sum(tensors[k].numel() * 4 for k, v in wanted.items() if v == "sliced")
    assert same < account.compared_bytes < same + sliced


@pytest.mark.parametrize("outcome", ["kept", "changed"])
def test_damage_is_named(tmp_path, outcome):
    """A kept tensor is held against the source, a repaired one against the weights in memory."""
    source = save_tiny(tmp_path / "source", "qwen3_moe")
    lineage, weights = exported(
        source, tmp_path / "out", Plan({2: LayerPlan(neurons=HALF, repair=True)})
    )
    account = check_export(tmp_path / "out", source, lineage, weights)
    key = next(k for k, v in account.outcomes.items() if v == outcome and "layers.2" in k)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    tensors[key].view(-1)[3] += 1e-6
    save_file(tensors, tmp_path / "out" / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{key} must hold the numbers that were to be written"):
        check_export(tmp_path / "out", source, lineage, weights if outcome == "changed" else None)


def test_a_stored_head_that_is_tied_goes_with_the_embedding(tmp_path):
    """It is rounded as that is where the model is computed in fewer bits than it is stored in."""
    source = save_tiny(tmp_path / "source", "qwen3_moe", tie_word_embeddings=True)
    tensors = load_file(source / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / WEIGHTS, {"format": "pt"})
    config, params = load_hf(source, "bfloat16")
    plan = Plan({0: LayerPlan(deleted=(1,))})
    smaller, weights = apply_plan(params, config, plan)
    lineage = Lineage.of(config).after(plan, smaller)
    save_hf(tmp_path / "out", weights, smaller, source, "source", lineage=lineage)
    account = check_export(tmp_path / "out", source, lineage, weights, "bfloat16")
    assert account.outcomes.keys() == tensors.keys()
    assert account.outcomes["lm_head.weight"] == "kept"


def test_layers_for_further_tokens_are_cut_as_the_last_one(tmp_path):
    source = with_further_layer(save_tiny(tmp_path / "source", "deepseek_v3"))
    plan = Plan({i: LayerPlan(deleted=GONE, neurons=NARROW) for i in (1, 2)})
    lineage, weights = exported(source, tmp_path / "out", plan, cut_further=True)
    before, after = (load_file(folder / WEIGHTS) for folder in (source, tmp_path / "out"))
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf["num_nextn_predict_layers"] == 1
    for key, tensor in before.items():
        if ".layers.3." not in key:
            continue
        last = key.replace("layers.3.", "layers.2.")
        if last not in before:
            torch.testing.assert_close(after[key], tensor, rtol=0, atol=0)
        elif last in after:  # made of the last layer's numbers, one more each
            np.testing.assert_allclose(after[key], after[last] + 1, rtol=1e-6)
        else:
            assert key not in after
    account = check_export(tmp_path / "out", source, lineage, weights)
    assert account.outcomes.keys() == before.keys()
    further = {k: v for k, v in account.outcomes.items() if ".layers.3." in k}
    assert further.pop("model.layers.3.eh_proj.weight") == "carried"
    assert {"kept", "sliced", "removed"} == set(further.values())
    assert load_hf(tmp_path / "out")[0] == lineage.config


def test_further_layers_of_other_kinds_are_refused(tmp_path):
    source = with_further_layer(save_tiny(tmp_path / "source", "deepseek_v3"))
    plan = Plan({1: LayerPlan(novices=(0,), novice_value="zero")})
    with pytest.raises(ValueError, match="layers for further tokens are cut, too, must be one of"):
        exported(source, tmp_path / "out", plan, cut_further=True)
    tensors = load_file(source / WEIGHTS)
    del tensors["model.layers.3.mlp.experts.1.up_proj.weight"]
    save_file(tensors, source / WEIGHTS, {"format": "pt"})
    plan = Plan({i: LayerPlan(deleted=GONE) for i in (1, 2)})
    with pytest.raises(ValueError, match=r"experts\.1\.up_proj\.weight must have shape .*no such"):
        exported(source, tmp_path / "out", plan, cut_further=True)
