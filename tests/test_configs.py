"""The shipped configurations are accepted, for the models that they name."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from moe_jax.hf.reader import read_config
from moe_jax.run.config import RunConfig

REPOSITORY = Path(__file__).parents[1]


def load(name: str):
    return runpy.run_path(str(REPOSITORY / "configs" / f"{name}.py"))["get_config"]


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("quickstart", "olmoe"),
        ("quickstart", "phimoe"),
        ("quickstart_slimmoe", "two_stages"),
        ("quickstart_slimmoe", "one_stage"),
        ("quickstart_slimmoe", "no_distillation"),
        ("stock", None),
        ("own", None),
    ],
)
def test_runs(name, variant):
    arguments = () if variant is None else (variant,)
    run = RunConfig.from_dict(load(name)(*arguments).to_dict())
    models = run.check_against(read_config(REPOSITORY / run.model))
    assert len(models) == len(run.stages)


def test_variants_of_the_slimmoe_quickstart_see_equally_many_tokens_and_end_alike():
    get_config = load("quickstart_slimmoe")
    runs = [RunConfig.from_dict(get_config(v).to_dict()) for v in ("two_stages", "one_stage")]
    steps = [sum(stage.distill.steps for stage in run.stages) for run in runs]
    assert steps[0] == steps[1] > 0
    assert runs[0].training == runs[1].training
    assert [run.stages[-1].cut.expert_width for run in runs] == [22, 22]


def test_the_reference_of_fields_is_that_of_the_code():
    page = (REPOSITORY / "configs" / "README.md").read_text(encoding="utf-8")
    tool = runpy.run_path(str(REPOSITORY / "tools" / "field_reference.py"))
    assert tool["updated"](page) == page, "run python tools/field_reference.py"
