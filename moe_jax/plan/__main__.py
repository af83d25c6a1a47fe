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
    model       checkpoint folder, config.json or hub id
    statistics  what to plan from, saved by ``python -m moe_jax.calibrate``
    plan        a plan file to check and print instead; only model, dtype and output go with it
    output      plan file to write; empty only prints
    scores      file to write the scores to, .npz or .json (see ``moe_jax.plan.score_file``)
    dtype       that bytes are counted for; empty: as config.json says
    seed        of random criteria (default 0)
    method      what ranks experts, any of ``moe_jax.scoring.EXPERT_CRITERIA`` (default mone);
                what ranks neurons, any of NEURON_CRITERIA (those of MODEL_CRITERIA
                need weights: use ``compress``); or a way to merge experts, any of
                ``moe_jax.plan.MERGE_RECIPES``
    options     of the method, by name: frequency, aggregation and whatever else it takes (more
                names: in the configuration's file); empty ones have their defaults

Exactly one size, or kv_groups alone:
    keep_experts    experts that each layer keeps, or
    keep_ratio      the share of them, or
    expert_width    neurons that each expert keeps, or
    width_ratio     the share of them, or
    total_params, active_params, total_bytes    the most that the model may have: the largest
                    number of experts, or width, that fits is found
    drop_layers     consecutive layers to drop, those that turn the residual stream least
    kv_groups       beside another size or alone: key/value heads that each layer keeps, by
    group_importance    any of GROUP_CRITERIA (default: the method if it is one, else kd_topk), with
    group_options       its options

Experts:
    replacement     of removed ones: novice (default), weighted_novice, zero or delete
    scope           rank within each layer (default), over all (global), or within num_groups equal
                    groups of consecutive ids that keep equally many (group)
    num_groups, min_per_group       of scope group
    min_experts, max_experts        that each layer keeps (default: K, and all)
    align_experts   kept experts are multiples of it, such as of expert-parallel devices

Neurons:
    neuron_scope    rank within each expert (default), or across a layer (experts are padded, or
                    stored as wide as they are with own_widths), or across the model (own_widths)
    own_widths      store experts as wide as they are, at most max_buckets (default 4) widths a
                    layer (or model); the shipped modelling file reads them
    active_share    with own_widths: 0 (default) counts a neuron's bytes, 1 its work per token, by
                    how often its expert is chosen; between them, a mix
    constants       whether experts gain a constant beside their neurons
    repair          whether those that stay make up for those that go when the plan is applied
    round_to        widths are multiples of it (default 1)
    min_width, max_width            that each expert keeps
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from moe_jax import cli
from moe_jax.config import ModelConfig
from moe_jax.files import replacing_file
from moe_jax.hf.config_import import model_config
from moe_jax.hf.folder import CONFIG, file_inside, find_folder, read_json
from moe_jax.plan.request import PlanRequest, plan_from_statistics
from moe_jax.plan.schema import Plan, read_plan
from moe_jax.plan.score_file import SavedScores
from moe_jax.plan.table import plan_table
from moe_jax.statistics import Stats


def main(settings: ConfigDict, _: Sequence[str]) -> None:
    """The command line."""
    request = PlanRequest.from_dict(settings.to_dict())
    _check_free(request)
    config, stored = _read_model(request.model)
    dtype = request.dtype or stored
    scores = None
    if request.plan:
        plan = read_plan(request.plan)
    else:
        stats = Stats.load(request.statistics)
        stats.check_model(config)
        plan, scores = plan_from_statistics(request, config, stats, dtype)
    table = plan_table(config, plan, dtype)
    given = ", ".join(f"{name} {value}" for name, value in plan.settings.items() if value)
    print(f"{plan.method}: {given}\n\n{table}" if given else f"{plan.method}\n\n{table}")
    if request.scores and scores is not None:
        scores.save(request.scores)
        print(f"\nscores written to {request.scores}")
    if request.output:
        with replacing_file(Path(request.output).expanduser()) as temporary:
            temporary.write_text(readable(plan), encoding="utf-8")
        print(f"\nplan written to {request.output}")


def _read_model(target: str) -> tuple[ModelConfig, str]:
    """The architecture, and the dtype that config.json names."""
    is_file = Path(target).expanduser().is_file()
    hf = read_json(
        Path(target).expanduser() if is_file else file_inside(find_folder(target), CONFIG)
    )
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
