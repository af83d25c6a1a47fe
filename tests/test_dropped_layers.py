"""Whole layers that go: which block, what is left of the model, and who can load it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_config, tiny_model, token_batches
from tiny_hf import save_tiny, torch_logits
from transformers import AutoModelForCausalLM

from moe_jax.calibrate import calibrate
from moe_jax.hf import load_hf, save_hf
from moe_jax.model import forward
from moe_jax.plan import LayerPlan, Plan, angular_plan, planned_config, validate_plan
from moe_jax.prune import apply_plan
from moe_jax.statistics import Stats

FAMILIES = ["olmoe", "phimoe", "qwen3_moe"]
TOKENS = np.random.default_rng(0).integers(0, 48, (2, 12))


def deep_config(layers: int = 4):
    config = tiny_config()
    return dataclasses.replace(config, layers=config.layers[:1] * layers)


def with_stream(distance: np.ndarray, tokens: int = 10) -> Stats:
    return Stats({}, tokens, 1, 1, stream={"angular_distance": distance * tokens})


@given(st.integers(1, 3), st.integers(0, 100))
def test_the_block_that_turns_the_stream_least_goes(drop, seed):
    distance = np.random.default_rng(seed).random((5, 5))
    plan = angular_plan(with_stream(distance), deep_config(), drop)
    validate_plan(plan, deep_config())
    first = min(range(5 - drop), key=lambda i: distance[i, i + drop])
    assert plan.dropped_layers == tuple(range(first, first + drop))
    np.testing.assert_allclose(
        plan.settings["angular_distance"], [distance[i, i + drop] for i in range(5 - drop)]
    )
    assert Plan.from_json(plan.to_json()) == plan


def test_layers_that_add_nothing_are_found():
    """Of four layers, the second and third write zeros into the stream."""
    params, config = tiny_model("olmoe")
    config = dataclasses.replace(config, layers=config.layers * 2)
    layers = [*params["layers"], *params["layers"]]
    for i in (1, 2):
        silent = jax.tree.map(lambda leaf: leaf, layers[i])
        silent["attention"]["out"] = jax.tree.map(jnp.zeros_like, silent["attention"]["out"])
        silent["moe"]["experts"]["down"] = jnp.zeros_like(silent["moe"]["experts"]["down"])
        layers[i] = silent
    params = {**params, "layers": layers}
    stats = calibrate(params, config, token_batches(1), warn=False)
    plan = angular_plan(stats, config, 2)
    assert plan.dropped_layers == (1, 2)
    # Of equal vectors, float32 cosines are 1 to about 1e-7, and arccos of that is about 5e-4.
    assert plan.settings["angular_distance"][1] < 1e-3 < plan.settings["angular_distance"][0]
    small, pruned = apply_plan(params, config, plan)
    tokens = token_batches(1)[0]["tokens"]
    np.testing.assert_array_equal(
        forward(pruned, small, tokens)[0], forward(params, config, tokens)[0]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_is_the_model_without_these_layers(family, tmp_path):
    """Also in transformers: against its own model, from whose list they were taken."""
    layers = {"num_hidden_layers": 4}
    if family == "qwen3_moe":
        layers["mlp_only_layers"] = [0, 3]
    source = save_tiny(tmp_path / "source", family, **layers)
    config, params = load_hf(source)
    plan = Plan({}, dropped_layers=(1, 2) if family != "qwen3_moe" else (0, 1))
    small, pruned = apply_plan(params, config, plan)
    assert small == planned_config(config, plan)
    stayed = [i for i in range(4) if i not in plan.dropped_layers]
    assert small.layers == tuple(config.layers[i] for i in stayed)
    for position, i in enumerate(stayed):
        assert pruned["layers"][position] is params["layers"][i]
    save_hf(tmp_path / "out", pruned, small, source=source)
    again, _ = load_hf(tmp_path / "out")
    assert again == small
    model = AutoModelForCausalLM.from_pretrained(
        source,
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
    ).eval()
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in stayed)
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS), use_cache=False).logits.numpy()
    np.testing.assert_allclose(torch_logits(tmp_path / "out", TOKENS), expected, 0, 1e-5)
    with jax.default_matmul_precision("highest"):
        ours = forward(pruned, small, TOKENS)[0]
    # Float32 in both, in another order; logits are of order 10.
    np.testing.assert_allclose(ours, expected, 0, 2e-4)


def test_other_layers_can_be_cut_in_the_same_plan():
    """Their numbers are those from before."""
    params, config = tiny_model("qwen3_moe")
    plan = Plan({2: LayerPlan(deleted=(1, 4))}, dropped_layers=(0,))
    small, pruned = apply_plan(params, config, plan)
    assert small.num_layers == 2
    assert small.moe(1).num_experts == 4
    first = apply_plan(params, config, Plan({}, dropped_layers=(0,)))
    expected_config, expected = apply_plan(first[1], first[0], Plan({1: LayerPlan(deleted=(1, 4))}))
    assert small == expected_config
    tokens = token_batches(1)[0]["tokens"]
    np.testing.assert_array_equal(
        forward(pruned, small, tokens)[0], forward(expected, expected_config, tokens)[0]
    )


@pytest.mark.parametrize(
    ("stats", "drop", "message"),
    [
        (with_stream(np.ones((5, 5))), 0, r"drop_layers must be in \[1, 4\), got 0"),
        (with_stream(np.ones((5, 5))), 4, r"\[1, 4\), got 4"),
        (with_stream(np.ones((4, 4))), 1, r"angular_distance \[5, 5\] .*got \[4, 4\]"),
        (Stats({}, 1, 1, 1), 1, "got none; calibrate again"),
    ],
)
def test_impossible_drops_are_refused(stats, drop, message):
    with pytest.raises(ValueError, match=message):
        angular_plan(stats, deep_config(), drop)
