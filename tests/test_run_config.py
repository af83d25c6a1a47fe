"""Configurations of runs: what is refused, and that the refusal names the field and its bound."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import EXPERT_WIDTH, EXPERTS, tiny_config, tiny_model, token_batches

from moe_jax.calibrate import calibrate
from moe_jax.config import LayerConfig, MoeConfig
from moe_jax.identity import digest
from moe_jax.plan import MERGE_RECIPES, LayerPlan, Plan, plan_cut, planned_config
from moe_jax.prune import apply_plan
from moe_jax.run.config import RunConfig
from moe_jax.settings import CalibrationConfig, section

MONE = {"method": "mone", "keep_ratio": 0.5}
SLIM = {"method": "slim", "width_ratio": 0.5}
MERGING = {"method": "ream", "keep_ratio": 0.5}


def make(*stages: dict[str, Any], **changes: Any) -> RunConfig:
    fields: dict[str, Any] = {
        "model": "model",
        "output": "out",
        "calibration": {"files": ("text.txt",), "seq_len": 16},
        "stages": stages or (MONE,),
    }
    return RunConfig.from_dict(fields | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sede": 1}, "field sede .*did you mean 'seed'"),
        ({"calibration": {"file": "x"}}, r"field calibration\.file .*did you mean 'files'"),
        ({"evaluation": {"max_byte": 1}}, r"field evaluation\.max_byte .*'max_bytes'"),
        ({"calibration": 3}, "calibration must be a dict, got 3"),
        ({"calibration": {"files": 3}}, r"calibration\.files must be a tuple of text, got 3"),
        ({"calibration": {"files": ()}}, r"calibration\.files must name text"),
        ({"calibration": {"files": "x", "seq_len": 0}}, r"calibration\.seq_len must be at least 1"),
        ({"calibration": {"files": "x", "seq_len": 1.5}}, r"seq_len must be int, got 1\.5"),
        ({"calibration": {"files": "x", "pack": "no"}}, "pack must be bool, got 'no'"),
        ({"evaluation": {"max_bytes": -1}}, r"evaluation\.max_bytes must be at least 0"),
        ({"model": ""}, "model must be given"),
        ({"output": ""}, "output must be given"),
        ({"output": 7}, "output must be text, got 7"),
        ({"dtype": "float8"}, "dtype must be one of .*got 'float8'"),
        ({"seed": -1}, "seed must be an integer, 0 or more, got -1"),
        ({"seed": True}, "seed must be int, got True"),
        ({"mesh": {"expert": "two"}}, r"mesh\.expert must be int, got 'two'"),
        ({"stages": ()}, r"\(at least one stage\) and target must be given, got none"),
        ({"stages": MONE}, "stages must be a tuple of dicts"),
        ({"stages": "mone"}, "stages must be a tuple of dicts"),
        ({"stages": ("mone",)}, r"stages\[0\] must be a dict, got 'mone'"),
    ],
    ids=str,
)
def test_wrong_fields_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"method": "mon"}, r"stages\[1\]\.method must be one of .*got 'mon' .*'mone'"),
        ({"method": "mone"}, "exactly one of .*keep_experts.*got none"),
        ({"method": "mone", "keep_ratio": 0.5, "keep_experts": 3}, "exactly one of"),
        ({"method": "slim"}, "exactly one of .*expert_width.*got none"),
        (
            {**SLIM, "keep_experts": 3},
            "'slim', which ranks neurons.*got ..keep_experts",
        ),
        ({**MONE, "importance": "lm"}, r"stages\[1\]\.importance = 'lm' needs method 'slim'"),
        ({**MONE, "keep_ratio": "half"}, "keep_ratio must be float or None"),
        ({**MONE, "scope": "model"}, "scope must be one of .*got 'model'"),
        ({**MONE, "replacement": "novices"}, "replacement must be one of .*mean 'novice'"),
        ({**MONE, "frequency": "count"}, "frequency must be one of"),
        ({**SLIM, "importance": "kd"}, "importance must be one of .*mean 'kd_topk'"),
        ({**SLIM, "aggregation": "sum"}, "aggregation must be one of"),
        (
            {**SLIM, "importance": "weight_norm", "aggregation": "batch_abs"},
            "of gradients",
        ),
        ({**SLIM, "round_to": 0}, "round_to must be at least 1, got 0"),
        (
            {**MERGING, "replacement": "merge"},
            "needs a ranking of experts that are not",
        ),
        (
            {**MERGING, "frequency": "mean_weight"},
            "needs a criterion with a frequency",
        ),
        ({"method": "m_smoe"}, "exactly one of .*keep_experts.*got none"),
        (
            {**MONE, "merge_cap": 4},
            "merge_cap = 4 needs a method that merges, or replacement 'merge'",
        ),
        ({**SLIM, "merge_align": True}, "merge_align = True needs a method that merges"),
        ({**MERGING, "merge_align": "yes"}, "merge_align must be bool or None, got 'yes'"),
        ({**MERGING, "merge_similarity": "cosine"}, r"stages\[1\].*similarity must be one of"),
        ({**MERGING, "merge_weights": "count"}, r"stages\[1\].*merge_weights must be one of"),
        ({**MERGING, "merge_router": "sum"}, r"stages\[1\].*merge_router must be one of"),
        ({**MERGING, "merge_cap": 1}, "merge_cap must be at least 2, got 1"),
        ({**MERGING, "method": "hc_smoe", "merge_cap": 4}, "clusters have no merge_cap, got 4"),
        ({"method": "angular"}, "exactly one of .*drop_layers.*'angular'.*got none"),
        ({"drop_layers": 1, "keep_ratio": 0.5}, "exactly one of .*'angular'.*got"),
        ({**MONE, "drop_layers": 1}, "exactly one of .*'mone'.*got"),
        ({"plan": "plan.json", "keep_ratio": 0.5}, r"takes nothing else, got \['keep_ratio'\]"),
        ({"plan": 3}, r"stages\[1\]\.plan must be text"),
    ],
    ids=str,
)
def test_wrong_stages_are_named(stage, message):
    with pytest.raises(ValueError, match=message):
        make(MONE, stage)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (({"keep_experts": 1},), rf"stages\[0\].*experts_per_token = 2, {EXPERTS}\], got 1"),
        (({"keep_experts": EXPERTS + 1},), rf"{EXPERTS}\], got {EXPERTS + 1}"),
        (({"keep_ratio": 0.0},), r"keep_ratio must be in \(0, 1\]"),
        (({"keep_ratio": 1.5},), r"keep_ratio must be in \(0, 1\]"),
        (({"method": "slim", "expert_width": 0},), rf"in \[1, {EXPERT_WIDTH}\], got 0"),
        (({"expert_width": 5, "round_to": 4},), r"multiple of round_to = 4, or all 8, got 5"),
        (({"method": "slim", "expert_width": 9},), rf"in \[1, {EXPERT_WIDTH}\], got 9"),
        (({"method": "slim", "width_ratio": float("nan")},), "width_ratio must be in"),
        (({**SLIM, "importance": "kd_full"},), "'kd_full' vanishes"),
        (({"keep_experts": 3}, {"keep_experts": 4}), r"stages\[1\].*, 3\], got 4"),
        ((SLIM, {"method": "slim", "expert_width": 5}), r"stages\[1\].*\[1, 4\], got 5"),
        (({"drop_layers": 2},), r"stages\[0\]: drop_layers must be in \[1, 2\), got 2"),
        (({"drop_layers": 1}, {"drop_layers": 1}), r"stages\[1\]: drop_layers .*got 1"),
        (({**MERGING, "keep_experts": 1, "keep_ratio": None},), "experts_per_token = 2, 6"),
        (
            ({"method": "ream", "keep_experts": 2, "merge_cap": 2},),
            r"stages\[0\]: 2 clusters of at most merge_cap = 2 experts cannot hold 6",
        ),
    ],
    ids=str,
)
def test_stages_that_the_model_cannot_go_through(stages, message):
    with pytest.raises(ValueError, match=message):
        make(*stages).check_against(tiny_config())


@pytest.mark.parametrize(
    ("stage", "method"),
    [
        ({"keep_ratio": 0.5}, "mone"),
        ({"drop_layers": 1}, "angular"),
        ({"expert_width": 4}, "slim"),
        ({"kv_groups": 1}, "slim"),
        ({"distill": {"steps": 3}}, "distill"),
        ({"keep_ratio": 0.5, "distill": {"steps": 3}}, "mone"),
    ],
    ids=str,
)
def test_the_method_follows_from_the_fields(stage, method):
    assert make(stage, training=TEXT).stages[0].method == method


TEXT = {"files": ("text.txt",), "seq_len": 16}
KD = {"steps": 20, "loss": "kd_full"}


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({**SLIM, "distill": {}}, r"stages\[0\]\.distill\.steps must be given"),
        ({**SLIM, "distill": {**KD, "step": 1}}, r"field stages\[0\]\.distill\.step .*'steps'"),
        ({**SLIM, "distill": {**KD, "loss": "kl"}}, r"stages\[0\]\.distill: .*kl"),
        ({**SLIM, "distill": {**KD, "steps": 0}}, r"distill: steps must be at least 1"),
        ({**SLIM, "distill": {**KD, "learning_rate": "fast"}}, "learning_rate must be float"),
        ({**SLIM, "distill": {**KD, "trainable": ("router", "x")}}, "trainable must be"),
        ({"method": "distill"}, "needs the field distill, got none"),
        ({"method": "distill", "keep_ratio": 0.5, "distill": KD}, "it takes no .'keep_ratio'"),
        ({**SLIM, "distill": {**KD, "steps": "100"}}, r"steps must be int, got '100'"),
        ({**SLIM, "distill": {**KD, "hidden_layers": 3}}, "tuple of int, got 3"),
        ({**SLIM, "distill": {**KD, "hidden_layers": (1,)}}, "needs a hidden_weight"),
        ({**SLIM, "neuron_scope": "all"}, r"neuron_scope must be one of"),
        ({**SLIM, "group_importance": "lm"}, "group_importance = 'lm' needs kv_groups"),
        ({"kv_groups": 1, "group_importance": "mone"}, "group_importance must be one of"),
    ],
    ids=str,
)
def test_wrong_trainings_are_named(stage, message):
    with pytest.raises(ValueError, match=message):
        make(stage, training=TEXT)


def test_training_needs_text():
    with pytest.raises(ValueError, match=r"training\.files must name text to train on"):
        make({**SLIM, "distill": KD})


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ({"kv_groups": 3}, {}, r"stages\[0\]: layer 0: kv_groups must be in \[1, 2\], got 3"),
        (
            {**SLIM, "distill": {**KD, "accumulation": 3}},
            {},
            r"of distill\.accumulation = 3",
        ),
        ({**SLIM, "distill": KD}, {"mesh": {"data": 3}}, "mesh's data x fsdp = 3"),
        ({**SLIM, "distill": {**KD, "trainable": "novices"}}, {}, "the model has none"),
        ({**SLIM, "distill": {**KD, "trainable": "mlp"}}, {}, "the model has none"),
        (
            {**SLIM, "distill": {**KD, "loss": "kd_topk", "top_k": 99}},
            {},
            r"top_k must be at most vocab_size = 61, got 99",
        ),
        (
            {"keep_experts": 4, "replacement": "delete", "distill": {**KD, "router_weight": 0.1}},
            {},
            "router_weight needs equal numbers of router rows, got 6 .* and 4",
        ),
        (
            {**SLIM, "distill": {**KD, "hidden_weight": 0.1}},
            {"training": {**TEXT, "teacher_cache": "cache"}},
            "need the live teacher",
        ),
    ],
    ids=str,
)
def test_trainings_that_the_model_cannot_go_through(stage, changes, message):
    run = make(stage, **{"training": TEXT, **changes})
    with pytest.raises(ValueError, match=message):
        run.check_against(tiny_config("phimoe"))


def test_another_vocabulary_of_the_teacher_is_refused():
    run = make({**SLIM, "distill": KD}, training=TEXT)
    with pytest.raises(ValueError, match="must share a vocabulary, got 99 and 61 entries"):
        run.check_against(tiny_config(), teacher=tiny_config(vocab_size=99))


def test_groups_of_heads_that_are_normalised_together_stay():
    with pytest.raises(ValueError, match=r"stages\[0\]: .*all heads"):
        make({"kv_groups": 1}).check_against(tiny_config("olmoe"))


def test_a_short_training_has_a_short_warm_up():
    steps = {n: make({**SLIM, "distill": {"steps": n}}, training=TEXT) for n in (5, 200, 5000)}
    assert [run.stages[0].distill.warmup_steps for run in steps.values()] == [0, 20, 100]


def test_each_stage_starts_from_the_last_one():
    stages = (
        {"keep_experts": 5},
        {"keep_experts": 4, "replacement": "delete"},
        {**SLIM, "importance": "weight_norm"},
    )
    first, second, third = (c.moe(0) for c in make(*stages).check_against(tiny_config()))
    assert (len(first.expert_ids), len(first.novice_ids)) == (5, 1)
    assert (second.num_experts, len(second.expert_ids), len(second.novice_ids)) == (5, 4, 1)
    assert third.expert_width == EXPERT_WIDTH // 2


@pytest.mark.parametrize(
    ("stage", "rows"),
    [
        ({"method": "mone", "keep_experts": 2}, 4),
        ({"method": "mone", "keep_experts": 2, "replacement": "delete"}, 2),
        ({"method": "m_smoe", "keep_experts": 2}, 2),
    ],
    ids=str,
)
def test_experts_go_from_a_model_with_own_widths(stage, rows):
    """Which ones is not known yet, so that their widths are not, either."""
    layer = LayerConfig(2, 2, MoeConfig(4, 1, 8, expert_widths=(8, 8, 4, 4)))
    (foreseen,) = make(stage).check_against(tiny_config(layers=(layer,)))
    assert foreseen.moe(0) == MoeConfig(rows, 1, 8, tuple(range(2, rows)))


def test_one_gradient_is_enough_for_aggregation():
    mixed = {**SLIM, "importance": "weight_norm", "kv_groups": 2, "aggregation": "sequence_abs"}
    stage = make({**mixed, "group_importance": "kd_topk"}).stages[0].cut
    assert stage.score_options == {}
    assert stage.kv_score_options == {"aggregation": "sequence_abs"}
    with pytest.raises(ValueError, match="needs a criterion of gradients"):
        make({**mixed, "group_importance": "weight_norm"})


@pytest.fixture(scope="module")
def stats():
    params, config = tiny_model()
    return calibrate(params, config, token_batches(1), warn=False)


@pytest.mark.parametrize(
    "stage",
    [
        *({"method": name, "keep_experts": 4} for name in ("m_smoe", "hc_smoe", "ream")),
        {"method": "m_smoe", "keep_ratio": 0.5, "merge_similarity": "weights"},
        {"method": "hc_smoe", "keep_experts": 2, "merge_similarity": "router"},
        {"method": "mone", "keep_experts": 3, "replacement": "merge"},
        {"method": "routing_mass", "keep_experts": 3, "replacement": "merge", "merge_cap": 2},
        {"method": "mone", "keep_experts": 4, "replacement": "weighted_novice"},
        {"drop_layers": 1},
    ],
    ids=str,
)
def test_what_is_foreseen_comes_out(stage, stats):
    """Counts are known before anything is measured."""
    params, config = tiny_model()
    run = make(stage)
    (foreseen,) = run.check_against(config)
    plan = plan_cut(run.stages[0].cut, stats, config, params=params).plan
    result, _ = apply_plan(params, config, plan, stats)
    assert plan.method == run.stages[0].method

    def sizes(model):
        return [(model.moe(i).num_experts, len(model.moe(i).expert_ids)) for i in model.moe_layers]

    assert sizes(result) == sizes(foreseen)
    assert result.num_layers == foreseen.num_layers


def test_options_of_merging_reach_the_plan(stats):
    _, config = tiny_model()
    options = {
        "merge_weights": "uniform",
        "merge_align": False,
        "merge_router": "kept",
        "merge_similarity": "output",
        "merge_cap": 4,
    }
    stage = make({"method": "m_smoe", "keep_experts": 2, **options}).stages[0]
    plan = plan_cut(stage.cut, stats, config).plan
    for layer in plan.layers.values():
        assert (layer.merge_align, layer.merge_router) == (False, "kept")
        for merge in layer.merges:
            assert len(set(merge.weights)) == 1
            assert len(merge.weights) <= 4
    assert plan.settings["replacement"] == "merge"
    assert plan.settings["similarity"] == "output"
    again = RunConfig.from_dict(make({**options, "method": "ream", "keep_ratio": 0.5}).to_dict())
    assert again.stages[0].cut.recipe == dataclasses.replace(
        MERGE_RECIPES["ream"],
        **{name.removeprefix("merge_"): value for name, value in options.items()},
    )
    by_weights = make({"method": "hc_smoe", "keep_ratio": 0.5, "merge_similarity": "weights"})
    with pytest.raises(ValueError, match="needs the model's params"):
        plan_cut(by_weights.stages[0].cut, stats, config)


def test_global_merging_keeps_more_where_experts_are_used_more(stats):
    _, config = tiny_model()
    scores = {**stats.layers[1], "count": stats.layers[1]["count"] * 100}
    skewed = dataclasses.replace(stats, layers={0: stats.layers[0], 1: scores})
    stage = make({"method": "m_smoe", "keep_experts": 4, "scope": "global"}).stages[0]
    plan = plan_cut(stage.cut, skewed, config).plan
    assert [len(plan.layers[i].vanishing) for i in (0, 1)] == [4, 0]


def test_sequences_must_fit_the_context_if_there_is_text():
    with pytest.raises(ValueError, match="at most the model's 64 positions, got 512"):
        make(evaluation={"files": "x"}).check_against(tiny_config())
    make().check_against(tiny_config())


def test_one_string_of_files_may_name_several():
    files = section(CalibrationConfig, {"files": "a.txt, b*.jsonl"}).files
    assert files == ("a.txt", "b*.jsonl")


def test_what_is_written_down_is_read_back():
    distill = {"steps": 30, "loss": "kd_full", "trainable": ("router", "norms")}
    run = make(
        MONE,
        {**SLIM, "round_to": 2, "kv_groups": 1, "distill": distill},
        training={"files": {"a.txt": 2, "b.txt": 1.5}},
        mesh={"expert": 2},
        dtype="bfloat16",
    )
    again = RunConfig.from_dict(run.to_dict())
    assert digest(again.to_dict()) == digest(run.to_dict())
    assert again.stages == run.stages


experts = st.sets(st.integers(0, EXPERTS - 1), max_size=2)


@settings(max_examples=10, deadline=None)
@given(deleted=experts, novices=experts, width=st.integers(1, EXPERT_WIDTH))
def test_the_planned_architecture_is_the_one_that_comes_out(deleted, novices, width):
    params, config = tiny_model()
    left = set(range(EXPERTS)) - deleted - novices
    layer = LayerPlan(
        tuple(sorted(deleted)),
        tuple(sorted(novices - deleted)),
        "zero",
        {e: tuple(range(width)) for e in left},
    )
    plan = Plan({1: layer})
    once = planned_config(config, plan)
    assert once == apply_plan(params, config, plan)[0]


def test_plans_for_layers_without_experts_are_refused():
    with pytest.raises(ValueError, match=r"plan layers must be among .*got \[7\]"):
        planned_config(tiny_config(), Plan({7: LayerPlan()}))


def test_trainings_draw_from_the_seed_of_the_run():
    """Each stage from one of its own, unless it says so itself."""
    fixed = {**KD, "seed": 3}
    stages = ({**SLIM, "distill": KD}, {"distill": KD}, {"distill": fixed})
    run = make(*stages, training=TEXT, seed=7)
    assert [stage.distill.seed for stage in run.stages] == [7, 8, 3]


def test_trackers_that_are_not_installed_are_missed_at_once(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install tensorboardX"):
        make(tracking={"tensorboard": True})
