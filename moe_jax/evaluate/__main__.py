"""Held-out loss of models, per domain: perplexity, bits per byte, and distance to a reference.

    python -m moe_jax.evaluate --config=configs/evaluate.py --config.models=A,B,C
    python -m moe_jax.evaluate --config=configs/evaluate.py --config.models=A,B --config.reference=A

Prints a table, one column per model, and with ``--config.output=FILE.json`` writes all numbers.

Fields of the configuration:
    models      checkpoint folders or hub ids, separated by commas
    reference   one more of these: KL divergence from it and agreement with it are measured too
    files       text files or globs, separated by commas; each file is a domain
    tokenizer   folder or tokenizer.json; empty takes the first model's
    dtype       float32, bfloat16 or float16; empty keeps the dtype of each checkpoint
    seq_len     tokens of context; longer documents are cut into several windows
    batch_size  windows per step
    max_bytes   use at most so many bytes of each file; 0 uses all
    output      JSON file to write; empty writes none
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from moe_jax.cli import run_with_config
from moe_jax.evaluate.checkpoints import comparison_table, evaluate_checkpoints
from moe_jax.evaluate.results import Evaluation


def main(settings: ConfigDict, _: Sequence[str]) -> None:
    """The command line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    result = evaluate_checkpoints(settings)
    print(
        comparison_table(
            {n: Evaluation.from_dict(r["evaluation"]) for n, r in result["models"].items()}
        )
    )
    if settings.get("output"):
        path = Path(settings.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    run_with_config(main, "What to evaluate, such as configs/evaluate.py.")
