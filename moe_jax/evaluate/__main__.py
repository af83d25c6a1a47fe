"""Held-out loss of models per domain, distance to a reference, and lm-evaluation-harness tasks.

    python -m moe_jax.evaluate --config=configs/evaluate.py --config.models=A,B,C
    python -m moe_jax.evaluate --config=configs/evaluate.py --config.models=A,B --config.reference=A
    python -m moe_jax.evaluate --config=configs/evaluate.py --config.models=A,B \\
        --config.tasks=piqa,arc_easy --config.files=

Prints a table, one column per model, and with ``--config.output=FILE.json`` writes all numbers.

Fields of the configuration:
    models      checkpoint folders or hub ids, separated by commas
    reference   one more of these: KL divergence from it and agreement with it are measured too;
                it must share the tokenizer of all models
    files       text files or globs, separated by commas; each file is a domain; empty: tasks only
    tokenizer   folder or tokenizer.json for all models; empty: each has its own
    dtype       float32, bfloat16 or float16; empty keeps the dtype of each checkpoint
    seq_len     tokens of context; longer documents are cut into several windows
    batch_size  windows per step
    max_bytes   use at most so many bytes of each file; 0 uses all
    tasks       tasks, groups or tags of lm-evaluation-harness, separated by commas
    tasks_folder  folder with further task definitions (*.yaml)
    tasks_root  where relative data files of these start; empty: at the definition itself
    limit       use at most so many items of each task; 0 uses all
    num_fewshot  examples before each item; -1: as the task says
    max_length  tokens of context of tasks; 0: as many as the model was made for
    cache_dir   folder in which tasks' results are kept and found again; empty keeps none
    log_samples  write every item's result to the output, too
    output      JSON file to write; empty writes none
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moe_jax.cli import run_with_config
from moe_jax.evaluate.checkpoints import comparison_table, evaluate_checkpoints, tasks_table
from moe_jax.evaluate.results import Evaluation
from moe_jax.files import write_json


def main(settings: ConfigDict, _: Sequence[str]) -> None:
    """The command line."""
    result = evaluate_checkpoints(settings)
    print("\n\n".join(tables(result["models"])))
    if settings.get("output"):
        write_json(Path(settings.output).expanduser(), result)
        print(f"written to {settings.output}")


def tables(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of the text and of the tasks, as far as there are any."""
    made = []
    for part, table in (("evaluation", _text_table), ("tasks", tasks_table)):
        found = {name: result[part] for name, result in models.items() if part in result}
        if found:
            made.append(table(found))
    return made


def _text_table(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    return comparison_table({n: Evaluation.from_dict(e) for n, e in evaluations.items()})


if __name__ == "__main__":
    run_with_config(main, "What to evaluate, such as configs/evaluate.py.")
