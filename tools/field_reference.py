"""Writes the reference of all configuration fields into configs/README.md, from the code.

    python tools/field_reference.py

A test holds the page in step: fields, defaults, choices and what each applies to are told once, by
the dataclasses that check them.
"""

from __future__ import annotations

from pathlib import Path

from moe_jax.distill import TrainSettings
from moe_jax.plan import Cut
from moe_jax.plan.__main__ import PlanRequest
from moe_jax.run.config import RunConfig
from moe_jax.run.serving import ServeConfig
from moe_jax.run.stage import StageConfig
from moe_jax.run.target import TargetConfig
from moe_jax.settings import field_table

PAGE = Path(__file__).parents[1] / "configs" / "README.md"
BEGIN, END = "<!-- fields -->", "<!-- /fields -->"
SECTIONS = (
    ("A run (`compress`)", RunConfig),
    ("A stage, beside its cut", StageConfig),
    ("A cut (of a stage, of `plan`, of `compare`'s methods, of `make_plan`)", Cut),
    ("Training (`distill` of a stage)", TrainSettings),
    ("A target, instead of stages", TargetConfig),
    ("How the result is served (`serve`), for warnings", ServeConfig),
    ("The command `plan`, beside its cut", PlanRequest),
)


def reference() -> str:
    """The section as Markdown, with its markers."""
    parts = [f"## {title}\n\n{field_table(kind)}" for title, kind in SECTIONS]
    return "\n\n".join([BEGIN, "# Fields", *parts, END])


def updated(page: str) -> str:
    """A page with the section in the place of an older one, or at its end."""
    if BEGIN not in page:
        return f"{page.rstrip()}\n\n{reference()}\n"
    before, _, rest = page.partition(BEGIN)
    return before + reference() + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
