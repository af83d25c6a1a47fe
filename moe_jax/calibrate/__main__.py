"""One pass over calibration text: the statistics that every criterion is computed from.

    python -m moe_jax.calibrate --config=configs/calibrate.py
    python -m moe_jax.calibrate --config=configs/calibrate.py --config.model=DIR \\
        --config.calibration.files=more.txt,code.jsonl --config.output=outputs/statistics/mine
    python -m moe_jax.calibrate --config=configs/calibrate.py --config.method=mone \\
        --config.keep_ratio=0.75

Writes ``OUTPUT.npz`` and ``OUTPUT.json`` (see ``statistics.Stats``) and prints what was covered;
the third, too, what parts of the text would have kept, and whether to calibrate on more of it.
Nothing is measured if they hold the statistics of the same checkpoint, text and settings already;
an interrupted run goes on with the first file of text that it had not finished.

Fields of the configuration:
    model        checkpoint folder or hub id
    output       path of the statistics, without suffix
    dtype        of computation: float32, bfloat16 or float16; empty keeps the checkpoint's
    seed         of the documents' order and windows, and of sampled routing (default 0)
    importance   losses whose gradients score neurons and key/value groups, among kd_topk, kd_full,
                 lm (default none)
    method       criterion of experts, among moe_jax.scoring.EXPERT_CRITERIA, whose ranking to judge
                 (default none); changes no statistics
    keep_ratio   share of experts that it is to keep
    calibration.files          text (.txt, .jsonl, .parquet), globs or hf:NAME; each is a domain
    calibration.num_sequences  over all files, in equal shares (default 128)
    calibration.seq_len        tokens per sequence (default 512)
    calibration.batch_size     sequences per step (default 8)
    calibration.pack           join documents instead of one per sequence (default False)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from moe_jax import cli
from moe_jax.calibrate.domains import calibrate_domains, domain_batches
from moe_jax.confidence import (
    converges,
    coverage_sentence,
    describe_confidence,
    unsure_sentence,
)
from moe_jax.data import read_tokenizer
from moe_jax.data.documents import expand_files, text_digest
from moe_jax.files import LOCK, check_apart, locked
from moe_jax.hf import load_hf
from moe_jax.hf.folder import find_folder, read_json
from moe_jax.hf.reader import read_config
from moe_jax.identity import checkpoint_digest, digest
from moe_jax.plan import kept_count
from moe_jax.scoring import EXPERT_CRITERIA, IMPORTANCE_LOSSES, NEEDED_LOSS
from moe_jax.settings import (
    CalibrationConfig,
    check_choice,
    check_dtype,
    check_names,
    check_seed,
    check_seq_len,
    nearest,
    section,
)
from moe_jax.statistics import Stats, statistics_file
from moe_jax.text import aligned

_FIELDS = (
    "model", "output", "dtype", "seed", "importance", "method", "keep_ratio", "calibration",
)  # fmt: skip


def main(settings: ConfigDict, _: Sequence[str]) -> None:
    """The command line."""
    values = settings.to_dict()
    check_names(values, _FIELDS)
    for field in ("model", "output"):
        if not values.get(field):
            raise ValueError(f"{field} must be given")
    calibration = section(CalibrationConfig, values.get("calibration"), "calibration")
    dtype, seed = values.get("dtype") or "", values.get("seed", 0)
    importance = _losses(values.get("importance", ()))
    method, keep_ratio = values.get("method") or "", values.get("keep_ratio")
    check_dtype(dtype)
    check_seed(seed)
    _check_ranking(method, keep_ratio, importance)
    _check_output(values["output"])
    source = find_folder(values["model"])
    config = read_config(source)
    output = statistics_file(values["output"], ".npz")
    check_apart(source, output)
    check_seq_len(calibration.seq_len, config.max_positions)
    ranked = config.moe_layers if method else ()
    kept = {i: kept_count(config.moe(i), i, None, keep_ratio) for i in ranked}
    files = expand_files(calibration.files)
    tokenizer = read_tokenizer(source)
    domains = domain_batches(files, tokenizer, calibration, seed=seed, vocab_size=config.vocab_size)
    text = text_digest(files, tokenizer, calibration, seed=seed)
    config, params = load_hf(source, dtype or None)
    with locked(output.with_name(f".{output.name}{LOCK}"), f"output {values['output']}"):
        stats = calibrate_domains(
            params,
            config,
            domains,
            seed=seed,
            importance=importance,
            save_as=values["output"],
            digest=digest(checkpoint_digest(source), dtype, seed, text, importance),
        )
    print(f"{stats.tokens:,} tokens of {stats.sequences} sequences")
    for i, layer in stats.layers.items():
        count = layer["count"]
        print(f"layer {i}: {count.min():,} to {count.max():,} tokens per expert")
    among = {i: config.moe(i).expert_ids for i in config.moe_layers}
    _print_confidence(describe_confidence(stats, method, kept, among=among, seed=seed), method)
    print(f"written to {values['output']}.npz and .json")


def _losses(names: str | Sequence[str]) -> tuple[str, ...]:
    """Importance losses as a tuple; raises ValueError for an unknown one."""
    losses = (names,) if isinstance(names, str) else tuple(names)
    for name in losses:
        check_choice("importance", name, IMPORTANCE_LOSSES)
    return losses


def _check_ranking(method: str, keep_ratio: float | None, importance: Sequence[str]) -> None:
    """Raises ValueError if there is no such ranking to judge, or calibration lacks its loss."""
    if bool(method) != (keep_ratio is not None):
        raise ValueError(f"method and keep_ratio go together, got {method!r} and {keep_ratio}")
    if method and not converges(method):
        known = sorted(filter(converges, EXPERT_CRITERIA))
        raise ValueError(f"method must be one of {known}, got {method!r}{nearest(method, known)}")
    if (loss := NEEDED_LOSS.get(method)) and loss not in importance:
        raise ValueError(f"method {method!r} needs {loss!r} among importance, got {importance}")


def _print_confidence(told: Mapping[str, Any], method: str) -> None:
    if "coverage" in told:
        print(coverage_sentence(told["coverage"]))
    if not method or "convergence" not in told:
        return
    found = told["convergence"]
    rows = [["text", "kept set the same", "lowest layer", "rank correlation"]]
    for share, common, ranks in zip(
        found["shares"], found["common"], found["rank_correlation"], strict=True
    ):
        mean = np.average(common, weights=found["kept"])
        row = [f"{share:.1%}", f"{mean:.1%}", f"{min(common):.1%}", f"{np.mean(ranks):.4f}"]
        rows.append(row)
    print(aligned(rows))
    if "unsure" in told:
        print(unsure_sentence(told["unsure"]))
    print(told["verdict"])


def _check_output(output: str) -> None:
    """Raises FileExistsError if ``output`` is taken by anything but statistics."""
    about, arrays = (statistics_file(output, suffix) for suffix in (".json", ".npz"))
    try:
        if arrays.exists():
            Stats.load(output)
        elif about.exists():
            read_json(about)["facts"]
    except (KeyError, ValueError) as error:
        raise FileExistsError(
            f"output {output} is taken by something else or by damaged statistics; "
            f"name another one or delete it ({error})"
        ) from error


if __name__ == "__main__":
    cli.run_with_config(main, "What to calibrate, such as configs/calibrate.py.")
