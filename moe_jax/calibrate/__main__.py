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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from moe_jax import cli
from moe_jax.calibrate import (
    Measurement,
    calibrate_domains,
    calibrate_layerwise,
    check_losses,
    domain_batches,
    layer_by_layer,
)
from moe_jax.confidence import (
    converges,
    coverage_sentence,
    describe_confidence,
    unsure_sentence,
)
from moe_jax.data import load_tokenizer
from moe_jax.data.documents import expand_files, text_digest
from moe_jax.files import LOCK, check_apart, locked
from moe_jax.hf import load_hf
from moe_jax.hf.folder import find_folder, read_json
from moe_jax.hf.reader import open_hf, prevalent_dtype, read_config
from moe_jax.identity import checkpoint_digest, digest
from moe_jax.params import ITEM_BYTES, count_params
from moe_jax.plan import kept_count
from moe_jax.scoring import EXPERT_CRITERIA, NEEDED_LOSS, PASSES
from moe_jax.settings import (
    DTYPES,
    CalibrationConfig,
    check_choice,
    check_seq_len,
    field_help,
    section,
    setting,
)
from moe_jax.statistics import Stats, statistics_file
from moe_jax.text import aligned


@dataclass(frozen=True)
class CalibrateConfig:
    """Fields of the configuration."""

    model: str = setting("", "Checkpoint folder or hub id.")
    output: str = setting("", "Path of the statistics, without suffix.")
    dtype: str = setting("", "Of computation; empty keeps the checkpoint's.", choices=DTYPES)
    seed: int = setting(
        0, "Of the documents' order and windows, and of sampled routing.", bounds=">= 0"
    )
    importance: tuple[str, ...] = setting(
        (), f"Losses whose gradients score neurons and key/value groups: {PASSES}."
    )
    method: str = setting(
        "",
        "Criterion of experts whose ranking to judge; changes no statistics.",
        choices=("", *filter(converges, EXPERT_CRITERIA)),
    )
    keep_ratio: float | None = setting(
        None, "Share of experts that it is to keep.", bounds="(0, 1]"
    )
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    def check(self) -> None:
        """Raises ValueError for fields that do not go together."""
        for name in ("model", "output"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be given")
        for name in self.importance:
            check_choice("importance", name, PASSES)
        if bool(self.method) != (self.keep_ratio is not None):
            raise ValueError(
                f"method and keep_ratio go together, got {self.method!r} and {self.keep_ratio}"
            )
        if (loss := NEEDED_LOSS.get(self.method)) and loss not in self.importance:
            raise ValueError(
                f"method {self.method!r} needs {loss!r} among importance, got {self.importance}"
            )


__doc__ = f"{__doc__}\nFields of the configuration:\n{field_help(CalibrateConfig)}"


def main(settings: ConfigDict, _: Sequence[str]) -> None:
    """The command line."""
    asked = section(CalibrateConfig, settings.to_dict())
    asked.check()
    _check_output(asked.output)
    source, seed, calibration = find_folder(asked.model), asked.seed, asked.calibration
    config = read_config(source)
    output = statistics_file(asked.output, ".npz")
    check_apart(source, output)
    check_seq_len(calibration.seq_len, config.max_positions)
    ranked = config.moe_layers if asked.method else ()
    kept = {i: kept_count(config.moe(i), i, None, asked.keep_ratio) for i in ranked}
    files = expand_files(calibration.files)
    tokenizer = load_tokenizer(source)
    domains = domain_batches(files, tokenizer, calibration, seed=seed, vocab_size=config.vocab_size)
    text = text_digest(files, tokenizer, calibration, seed=seed)
    dtype = asked.dtype or prevalent_dtype(source)
    nbytes = count_params(config).total * ITEM_BYTES[dtype]
    layerwise = layer_by_layer(calibration.mode, nbytes)
    read, measure = (open_hf, calibrate_layerwise) if layerwise else (load_hf, calibrate_domains)
    more = ["layerwise"] if layerwise else []
    if layerwise:
        check_losses(asked.importance, own_teacher=True)
    config, params = read(source, asked.dtype or None)
    with locked(output.with_name(f".{output.name}{LOCK}"), f"output {asked.output}"):
        stats = measure(
            params,
            config,
            domains,
            Measurement(asked.importance, seed=seed),
            save_as=asked.output,
            digest=digest(
                checkpoint_digest(source), asked.dtype, seed, text, asked.importance, *more
            ),
        )
    print(f"{stats.tokens:,} tokens of {stats.sequences} sequences")
    for i, layer in stats.layers.items():
        count = layer["count"]
        print(f"layer {i}: {count.min():,} to {count.max():,} tokens per expert")
    among = {i: config.moe(i).expert_ids for i in config.moe_layers}
    told = describe_confidence(stats, asked.method, kept, among=among, seed=seed)
    _print_confidence(told, asked.method)
    print(f"written to {asked.output}.npz and .json")


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
