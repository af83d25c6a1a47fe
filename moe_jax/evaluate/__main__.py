"""Held-out loss of models per domain, distance to a reference, and lm-evaluation-harness tasks.

    python -m moe_jax.evaluate --config=configs/evaluate.py --config.models=A,B,C
    python -m moe_jax.evaluate --config=configs/evaluate.py --config.models=A,B --config.reference=A
    python -m moe_jax.evaluate --config=configs/evaluate.py --config.models=A,B \\
        --config.tasks=piqa,arc_easy --config.files=

Prints a table, one column per model, and with ``--config.output=FILE.json`` writes all numbers.
Every model reads the text by its own tokenizer: bits per byte compare between tokenizers.

Fields of the configuration:
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moe_jax import cli
from moe_jax.evaluate.checkpoints import (
    EvaluateConfig,
    comparison_table,
    evaluate_checkpoints,
    tasks_table,
)
from moe_jax.evaluate.results import Evaluation
from moe_jax.files import write_json
from moe_jax.settings import field_help, section

__doc__ = f"{__doc__}{field_help(EvaluateConfig)}\n"


def main(settings: ConfigDict, _: Sequence[str]) -> None:
    """The command line."""
    asked = section(EvaluateConfig, settings.to_dict())
    result = evaluate_checkpoints(asked)
    if asked.output:
        write_json(Path(asked.output).expanduser(), result)
    print("\n\n".join(tables(result["models"])))
    if asked.output:
        print(f"written to {asked.output}")


def tables(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of the text and of the tasks, as far as there are any."""
    texts = {n: result["evaluation"] for n, result in models.items() if "evaluation" in result}
    tasks = {n: result["tasks"] for n, result in models.items() if "tasks" in result}
    made = []
    if texts:
        made.append(comparison_table({n: Evaluation.from_dict(e) for n, e in texts.items()}))
    if tasks:
        made.append(tasks_table(tasks))
    return made


if __name__ == "__main__":
    cli.run_with_config(main, "What to evaluate, such as configs/evaluate.py.")
