"""What to remove, and what it leaves, before a weight is read; or a look at a plan file.

    python -m moe_jax.plan --config=configs/plan.py --config.keep_ratio=0.75
    python -m moe_jax.plan --config=configs/plan.py --config.model=DIR \\
        --config.statistics=outputs/statistics/mine --config.method=mone \\
        --config.total_bytes=8_000_000_000 --config.output=plan.json
    python -m moe_jax.plan --config=configs/plan.py --config.model=DIR --config.plan=plan.json

Reads the model's config.json and saved statistics, scores, plans, and prints a table: of each
layer, what becomes of its experts, widths and key/value groups, parameters, active parameters and
bytes. The plan file is JSON to be read and edited by hand; ``compress`` applies it with
``stages = ({"plan": "plan.json"},)``, and refuses one that does not fit the model.

Fields of the configuration:
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moe_jax import cli
from moe_jax.config import ModelConfig
from moe_jax.files import replacing_file
from moe_jax.hf.config_import import model_config
from moe_jax.hf.folder import find_config, read_json
from moe_jax.plan.budget import item_bytes
from moe_jax.plan.curve import curve_table, removal_curve
from moe_jax.plan.cut import Cut
from moe_jax.plan.make import plan_cut
from moe_jax.plan.mesh_cost import mesh_cost
from moe_jax.plan.schema import Plan, read_plan
from moe_jax.plan.score_file import SavedScores, check_name
from moe_jax.plan.table import plan_table
from moe_jax.plan.validate import planned_config
from moe_jax.run.serving import ServeConfig, serving_warnings
from moe_jax.scoring import MODEL_CRITERIA, MODEL_GROUP_CRITERIA
from moe_jax.settings import field_help, section, setting
from moe_jax.statistics import Stats


@dataclass(frozen=True)
class PlanRequest:
    """Files of the command; in its configuration the fields of a cut stand beside.

    Attributes:
        serve: how the result will be served, for warnings about sizes.
        cut: what to plan; None if a plan is given.
    """

    model: str = setting("", "Checkpoint folder, config.json or hub id.")
    statistics: str = setting("", "What to plan from, saved by python -m moe_jax.calibrate.")
    plan: str = setting(
        "", "A plan file to check and print instead; only model, dtype and output go with it."
    )
    output: str = setting("", "Plan file to write; empty only prints.")
    scores: str = setting("", "File to write the scores to, .npz or .json.")
    dtype: str = setting("", "Dtype that bytes are counted for; empty: as config.json says.")
    seed: int = setting(0, "Seed of random criteria.", bounds=">= 0")
    curve: bool = setting(
        False, "Also print what cuts of other sizes would lose, from the same statistics."
    )
    serve: ServeConfig = field(default_factory=ServeConfig)
    cut: Cut | None = setting(None, "", beside=True)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> PlanRequest:
        """Builds and checks a request.

        Raises:
            ValueError: an unknown field (with the nearest known one), a value of the wrong kind,
                or fields that do not go together.
        """
        own = {field.name for field in dataclasses.fields(cls)} - {"cut"}
        request = section(cls, {name: raw[name] for name in own & set(raw)})
        of_cut = {name: value for name, value in raw.items() if name not in own}
        if not request.model:
            raise ValueError("model must be given")
        if request.dtype:
            item_bytes(request.dtype)
        if request.scores:
            check_name(request.scores)
        if not request.statistics and not request.plan:
            raise ValueError("statistics or plan must be given")
        if request.plan:
            given = [name for name, value in of_cut.items() if value != getattr(Cut, name, None)]
            given = [
                name for name in given if of_cut[name] not in (None, "", {}) and name != "method"
            ]
            if extra := sorted(given + ["scores"] * bool(request.scores)):
                raise ValueError(f"{extra[0]} does not go with plan, which is made already")
            return request
        cut = Cut.from_dict(of_cut)
        weights = [name for name, wanted, known in (
            (cut.criterion, cut.scored and cut.ranks != "layers", MODEL_CRITERIA),
            (cut.kv_criterion, cut.kv_groups is not None, MODEL_GROUP_CRITERIA),
            ("merge_similarity 'weights'", True,
             () if cut.recipe is None or cut.recipe.similarity != "weights"
             else ("merge_similarity 'weights'",)),
        ) if wanted and name in known]  # fmt: skip
        if weights:
            raise ValueError(
                f"{weights[0]} needs the weights, which this command does not read: use compress"
            )
        return dataclasses.replace(request, cut=cut)


__doc__ += "\n" + field_help(PlanRequest) + "\n\nFields of the cut:\n" + field_help(Cut) + "\n"


def main(settings: ConfigDict, _: Sequence[str]) -> None:
    """The command line."""
    request = PlanRequest.from_dict(settings.to_dict())
    _check_free(request)
    config, stored = _read_model(request.model)
    dtype = request.dtype or stored
    scores, cost = None, ""
    if request.cut is None:
        plan = read_plan(request.plan)
    else:
        stats = Stats.load(request.statistics)
        stats.check_model(config)
        plan, scores, cost = plan_from_statistics(request, config, stats, dtype)
        if request.curve:
            points = removal_curve(request.cut, stats, config, seed=request.seed)
            print(f"{curve_table(points)}\n")
    table = plan_table(config, plan, dtype)
    given = ", ".join(f"{name} {value}" for name, value in plan.settings.items() if value)
    print(f"{plan.method}: {given}\n\n{table}" if given else f"{plan.method}\n\n{table}")
    if cost:
        print(f"\n{cost}")
    for text in serving_warnings(planned_config(config, plan), request.serve):
        print(f"warning: {text}")
    if request.scores and scores is not None:
        scores.save(request.scores)
        print(f"\nscores written to {request.scores}")
    if request.output:
        with replacing_file(Path(request.output).expanduser()) as temporary:
            temporary.write_text(readable(plan), encoding="utf-8")
        print(f"\nplan written to {request.output}")


def plan_from_statistics(
    request: PlanRequest, config: ModelConfig, stats: Stats, dtype: str
) -> tuple[Plan, SavedScores, str]:
    """The plan that a request asks for, what ranked it, and what its mesh cost, if it names one.

    ``dtype`` is of bytes.
    """
    cut = request.cut
    if cut is None:
        raise ValueError(f"a request that applies a plan, here {request.plan}, asks for no other")
    if cut.total_bytes is not None and not cut.dtype:
        cut = dataclasses.replace(cut, dtype=dtype)
    planned = plan_cut(cut, stats, config, seed=request.seed)
    about = {
        "method": cut.criterion if planned.scores or planned.shared_scores else None,
        "options": cut.score_options,
        "group_importance": cut.kv_criterion if planned.kv_scores else None,
        "group_options": cut.kv_score_options,
        "seed": request.seed,
        "statistics": request.statistics,
        "digest": stats.facts.get("digest"),
    }
    found = SavedScores(planned.scores, planned.kv_scores, planned.shared_scores, about)
    return planned.plan, found, mesh_cost(cut, planned, stats, config)


def _read_model(target: str) -> tuple[ModelConfig, str]:
    """The architecture, and the dtype that config.json names."""
    hf = read_json(find_config(target))
    return model_config(hf), hf.get("dtype") or hf.get("torch_dtype") or "float32"


def _check_free(request: PlanRequest) -> None:
    """Raises FileExistsError if a file to write is taken by something of another kind."""
    for path, load in ((request.output, read_plan), (request.scores, SavedScores.load)):
        if path and Path(path).expanduser().exists():
            try:
                load(path)
            except (OSError, ValueError) as error:
                raise FileExistsError(
                    f"{path} is taken by something else; name another one ({error})"
                ) from error


def readable(plan: Plan) -> str:
    """The plan as JSON with a field per line; ids stay on the line of their field."""
    text = json.dumps(json.loads(plan.to_json()), indent=1)
    # A JSON string holds no line break, so that only lists of numbers match.
    lists = re.compile(r"\[\n[\s\d,.eE+-]*\]")
    return lists.sub(lambda match: "[" + " ".join(match[0][1:-1].split()) + "]", text) + "\n"


if __name__ == "__main__":
    cli.run_with_config(main, "What to plan, such as configs/plan.py.")
