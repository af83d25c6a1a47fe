"""Stages that follow from a target, the shipped recipes, and the table of what a run will do."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh
from models import EXPERT_WIDTH, tiny_config
from test_run_config import make

from moe_jax.config import ModelConfig
from moe_jax.hf.config_import import model_config
from moe_jax.params import count_params
from moe_jax.plan import Cut, foreseen
from moe_jax.processes import MESH_AXES, spec_tree
from moe_jax.run.config import RunConfig
from moe_jax.run.target import TargetConfig, stage_table

HERE = Path(__file__).parent
TEXT = {"files": ("text.txt",)}


def phi(name: str) -> ModelConfig:
    return model_config(json.loads((HERE / "fixtures" / f"{name}.json").read_text()))


def sizes(model: ModelConfig, **target: Any) -> list[tuple[int, int]]:
    """Expert width and key/value groups after each stage."""
    run = make(stages=(), target=target, training=TEXT).for_model(model)
    models = run.check_against(dataclasses.replace(model, max_positions=4096))
    return [(m.moe(0).expert_width, m.layers[0].num_kv_heads) for m in models]


def test_the_published_sizes_follow_from_their_parameter_counts():
    """Phi-mini-MoE and Phi-tiny-MoE are the widest experts that their counts allow."""
    big = phi("phi_3_5_moe")
    assert sizes(big, total_params=7_647_632_704)[-1] == (960, 8)
    tiny = {"total_params": 3_755_220_288, "kv_groups": 4}
    assert sizes(big, **tiny, stages=3) == [(2638, 7), (1088, 6), (448, 4)]
    assert sizes(big, **tiny, stages=3, round_to=64) == [(2688, 7), (1088, 6), (448, 4)]


def test_schedules():
    big = phi("phi_3_5_moe")
    goal = {"total_params": 7_647_632_704, "stages": 3}
    # 6400 * (960 / 6400) ** (1 / 3) = 3400.5..., and rounded up.
    assert [w for w, _ in sizes(big, **goal)] == [3401, 1807, 960]
    assert [w for w, _ in sizes(big, **goal, schedule="linear")] == [4587, 2774, 960]
    assert [w for w, _ in sizes(big, **goal | {"stages": 1})] == [960]


@settings(max_examples=30, deadline=None)
@given(
    ratio=st.floats(0.75, 1.0),
    stages=st.integers(1, 4),
    round_to=st.sampled_from([1, 2, 4]),
    schedule=st.sampled_from(["geometric", "linear"]),
)
def test_stages_shrink_to_the_widest_experts_that_fit(ratio, stages, round_to, schedule):
    model = tiny_config("phimoe")
    bound = count_params(model).total * ratio
    target = TargetConfig.from_dict(
        {"ratio": ratio, "stages": stages, "round_to": round_to, "schedule": schedule}
    )
    widths = [stage.cut.expert_width for stage in target.stages_for(model)]
    assert len(widths) == stages
    assert all(b <= a for a, b in zip([EXPERT_WIDTH, *widths], widths, strict=False))
    assert all(w % round_to == 0 for w in widths)

    def total(width):
        return count_params(foreseen(Cut("slim", expert_width=width), model)).total

    assert total(widths[-1]) <= bound
    assert widths[-1] + round_to > EXPERT_WIDTH or total(widths[-1] + round_to) > bound


def test_exact_powers_are_not_rounded_up():
    """27 * (1 / 27) ** (1 / 3) is a little above 9 in floating point."""
    assert TargetConfig(ratio=0.5, stages=3)._between(27, 1) == [9, 3, 1]
    assert TargetConfig(ratio=0.5, stages=3)._between(64, 1) == [16, 4, 1]


def test_active_parameters_as_the_bound():
    model = tiny_config("phimoe")
    bound = count_params(model).active - 1
    (end,) = sizes(model, active_params=bound, stages=1)
    assert end[0] == EXPERT_WIDTH - 1


@given(steps=st.integers(4, 1000), shares=st.lists(st.floats(0.1, 9), min_size=2, max_size=4))
@settings(max_examples=30, deadline=None)
def test_steps_of_all_stages_add_up(steps, shares):
    target = TargetConfig.from_dict(
        {
            "ratio": 0.9,
            "stages": len(shares),
            "step_shares": shares,
            "distill": {"steps": steps, "loss": "kd_full"},
        }
    )
    stages = target.stages_for(tiny_config("phimoe"))
    found = [stage.distill.steps for stage in stages]
    assert sum(found) == pytest.approx(steps, abs=len(shares) - 1)
    for share, n in zip(shares, found, strict=True):
        assert n == pytest.approx(steps * share / sum(shares), abs=1.01)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "exactly one of stages .* and target must be given, got none"),
        ({"stages": 2}, "target needs exactly one of .*total_params.*got none"),
        ({"ratio": 0.5, "total_params": 7}, "exactly one of"),
        ({"ratio": 1.5}, r"target\.ratio must be in \(0, 1\]"),
        ({"active_params": 0}, r"target\.active_params must be at least 1, got 0"),
        ({"ratio": 0.5, "stages": 0}, r"target\.stages must be at least 1"),
        ({"ratio": 0.5, "schedule": "cubic"}, r"target\.schedule must be one of"),
        ({"ratio": 0.5, "ratoi": 1}, r"field target\.ratoi .*did you mean 'ratio'"),
        ({"ratio": 0.5, "step_shares": (1, 1)}, r"target\.step_shares must be"),
        ({"ratio": 0.5, "distill": {"steps": 1}}, r"target\.distill\.steps must be at least one"),
        ({"ratio": 0.9, "slim": {"importanse": "lm"}}, r"field target\.slim\.importanse"),
        ({"ratio": 0.9, "slim": {"expert_width": 1}}, r"field target\.slim\.expert_width"),
        ({"ratio": 0.5, "distill": {"steps": None}}, r"target\.distill\.steps must be at least"),
        ({"ratio": 0.01}, r"target: total_params must be at least [\d,]+, .*got 91"),
        ({"ratio": 0.9, "kv_groups": 3}, r"kv_groups must be in \[1, 2\], got 3"),
    ],
    ids=str,
)
def test_wrong_targets_are_named(target, message):
    with pytest.raises(ValueError, match=message):
        make(stages=(), target=target, training=TEXT).for_model(tiny_config("phimoe"))


def test_stages_and_target_exclude_each_other():
    with pytest.raises(ValueError, match="must be given, got both"):
        make(target={"ratio": 0.5})


@pytest.mark.parametrize("mesh", ["gpu", "tpu"])
@pytest.mark.parametrize(
    ("recipe", "fixture"),
    [("slimmoe_phi_mini", "phi_mini_moe"), ("slimmoe_phi_tiny", "phi_tiny_moe")],
)
def test_the_shipped_recipes_end_at_the_published_models(recipe, fixture, mesh):
    """Sizes from the published configurations, on meshes that every stage can be laid out on."""
    get_config = runpy.run_path(str(HERE.parent / "configs" / f"{recipe}.py"))["get_config"]
    run = RunConfig.from_dict(get_config(mesh).to_dict())
    models = run.check_against(phi("phi_3_5_moe"))
    published = phi(fixture)
    last = models[-1]
    assert count_params(last) == count_params(published)
    assert last.moe(0) == published.moe(0)
    assert last.layers[0].num_heads == published.layers[0].num_heads
    assert last.head_dim == published.head_dim
    device_mesh = AbstractMesh(tuple(run.mesh.get(axis, 1) for axis in MESH_AXES), MESH_AXES)
    for model in models:
        spec_tree(model, device_mesh)
    tokens = sum(s.distill.steps for s in run.stages) * run.training.batch_size
    assert tokens * run.training.seq_len == pytest.approx(400e9, rel=1e-3)


def test_the_table_states_sizes_and_tokens():
    model = phi("phi_3_5_moe")
    distill = {"steps": 10, "loss": "kd_full"}
    training = {**TEXT, "seq_len": 128, "batch_size": 4}
    run = make({"expert_width": 960, "distill": distill}, training=training)
    table = stage_table(run.stages, run.training, model, run.check_against(model)).splitlines()
    assert len(table) == 3
    assert table[1].split()[:2] == ["start", "6400"]
    last = table[2].split()
    assert last[:3] == ["0", "slim", "960"]
    assert last[-4:] == ["7,647,632,704", "2,362,809,664", "10", f"{10 * 4 * 128:,}"]
