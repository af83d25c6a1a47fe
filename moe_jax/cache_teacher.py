"""Runs the teacher over the training stream once; trainings then read what it predicted.

    python -m moe_jax.cache_teacher --config=configs/cache_teacher.py
    python -m moe_jax.cache_teacher --config=configs/cache_teacher.py --config.model=DIR \\
        --config.training.files=more.txt,code.jsonl --config.output=outputs/teacher_cache/mine

Writes, for every position of the stream, the most likely next tokens and their log-probabilities,
then prints how much of the teacher's probability they keep. ``training.teacher_cache`` of
``moe_jax.compress`` names the folder; model, seed and training must be the same there, and the
losses kd_topk, kd_topk_renormalized and kd_topk_both need no more than this. An interrupted run
goes on with the first file that it had not finished; a finished cache is left as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from moe_jax import cli
from moe_jax.config import ModelConfig
from moe_jax.data import load_tokenizer, training_dataset
from moe_jax.data.teacher_cache import (
    CacheFacts,
    TeacherCache,
    TeacherCacheWriter,
    check_cache_folder,
    text_facts,
)
from moe_jax.files import LOCK, check_apart, check_space, locked
from moe_jax.hf import load_hf
from moe_jax.hf.folder import find_folder
from moe_jax.hf.reader import read_config, stored_dtype
from moe_jax.identity import checkpoint_digest
from moe_jax.losses import TeacherTopK, teacher_top_k
from moe_jax.metrics import progress_bar
from moe_jax.model import head_logits, head_params, hidden_states
from moe_jax.processes import one_ahead
from moe_jax.settings import DTYPES, TrainingConfig, check_seq_len, field_help, section, setting

# Positions whose logits are alive at a time, and tokens per file where no number is given: what a
# killed run has to compute again at most.
_CHUNK_TOKENS = 1024
_TOKENS_PER_FILE = 2**21
_logger = logging.getLogger("moe_jax.cache_teacher")  # also when run as a program


@dataclass(frozen=True)
class CacheTeacherConfig:
    """What to cache."""

    model: str = setting("", "The teacher: checkpoint folder or hub id.")
    output: str = setting("", "Folder: absent, empty, or a cache of the same settings.")
    dtype: str = setting("", "Of computation; empty keeps the checkpoint's.", choices=DTYPES)
    seed: int = setting(0, "Of the stream.", bounds=">= 0")
    top_k: int = setting(8, "Predictions per position.", bounds=">= 1")
    steps: int = setting(
        0, "Batches to run over: the steps of all trainings that will read them.", bounds=">= 1"
    )
    start: int = setting(0, "Batches of the stream to leave out at the beginning.", bounds=">= 0")
    log_prob_dtype: str = setting(
        "bfloat16", "bfloat16 (an error of up to 0.4% of a log-probability) or float32."
    )
    rows_per_file: int = setting(
        0, "A multiple of training.batch_size; 0: some two million tokens.", bounds=">= 0"
    )
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> CacheTeacherConfig:
        """Raises ValueError for an unknown field, or a value of the wrong kind or out of bounds."""
        config = section(cls, raw)
        for name in ("model", "output"):
            if not getattr(config, name):
                raise ValueError(f"{name} must be given")
        if not config.training.files:
            raise ValueError("training.files must name text, got none")
        if config.training.teacher_cache:
            raise ValueError(
                "training.teacher_cache is for trainings that read a cache; what is made here is "
                "named by output"
            )
        return config


__doc__ += f"\nFields of the configuration:\n{field_help(CacheTeacherConfig)}\n"


def cache_teacher(config: CacheTeacherConfig) -> TeacherCache:
    """Writes the cache, or what is left of it.

    Everything that can be known to be wrong before weights are read is refused first.

    Raises:
        BlockingIOError: another process is writing it.
        FileNotFoundError, FileExistsError, ValueError: bad input.
        OSError: too little space, or a file cannot be written; whole files stay.
        FloatingPointError: the teacher's predictions are not numbers.
    """
    if jax.process_count() > 1:
        raise ValueError(f"a cache is written by one process, got {jax.process_count()}")
    source = find_folder(config.model)
    folder = check_cache_folder(config.output)
    check_apart(source, folder)
    with locked(folder / LOCK, f"output {folder}"):
        return _cache_teacher(config, source)


def _cache_teacher(config: CacheTeacherConfig, source: Path) -> TeacherCache:
    training = config.training
    model = read_config(source)
    compute_dtype = config.dtype or stored_dtype(source) or "mixed"
    if config.top_k > model.vocab_size:
        raise ValueError(
            f"top_k must be at most the model's vocab_size = {model.vocab_size}, got {config.top_k}"
        )
    check_seq_len(training.seq_len, model.max_positions)
    tokenizer = load_tokenizer(source)
    rows_per_batch = training.seq_len * training.batch_size
    facts = CacheFacts(
        k=config.top_k,
        vocab_size=model.vocab_size,
        log_prob_dtype=config.log_prob_dtype,
        teacher=checkpoint_digest(source),
        compute_dtype=compute_dtype,
        start=config.start,
        num_rows=config.steps * training.batch_size,
        rows_per_file=config.rows_per_file
        or training.batch_size * max(1, _TOKENS_PER_FILE // rows_per_batch),
        **text_facts(
            training.files,
            tokenizer,
            seq_len=training.seq_len,
            batch_size=training.batch_size,
            seed=config.seed,
        ),
    )
    writer = TeacherCacheWriter(config.output, facts)
    if not writer.missing:
        return writer.write((), iter)
    needed, rows = writer.bytes_left, sum(part.num_rows for part in writer.missing)
    size = f"{rows:,} rows, {needed:,} bytes before compression, which about halves them"
    _logger.info("%s: %s", writer.folder, size)
    check_space(writer.folder, needed)
    stream = training_dataset(
        training,
        tokenizer,
        seed=config.seed,
        start=config.start + writer.first_batch,
        vocab_size=model.vocab_size,
    )
    model, params = load_hf(source, config.dtype or None)
    with progress_bar(
        config.steps * rows_per_batch, "teacher", "tok", writer.first_batch * rows_per_batch
    ) as bar:
        return writer.write(stream, _predictor(params, model, config.top_k, bar))


def teacher_predictions(
    params: dict[str, Any],
    config: ModelConfig,
    tokens: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    k: int,
    chunk_tokens: int = _CHUNK_TOKENS,
) -> TeacherTopK:
    """The k most likely next tokens of every position, ``[B, S, K]``.

    Logits of about ``chunk_tokens`` positions are alive at a time: the same columns of all rows,
    so that rows may lie on several devices.
    """
    x, _ = hidden_states(params, config, tokens, segment_ids)
    head = head_params(params, config)
    columns = jax.lax.map(
        lambda states: teacher_top_k(head_logits(head, config, states), k),
        jnp.moveaxis(x, 1, 0),
        batch_size=max(1, chunk_tokens // len(tokens)),
    )
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), columns)


def _predictor(
    params: dict[str, Any], config: ModelConfig, k: int, bar: Any
) -> Callable[[Iterator[Any]], Iterable[Any]]:
    """``predict`` of ``TeacherCacheWriter.write``: one batch is computed as another is written."""

    @jax.jit
    def step(params, tokens, segment_ids):
        return teacher_predictions(params, config, tokens, segment_ids, k)

    def started(batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            top = step(params, batch["tokens"], batch["segment_ids"])
            bar.update(batch["tokens"].size)
            yield {**batch, "teacher_ids": top.ids, "teacher_log_probs": top.log_probs}

    return lambda batches: one_ahead(started(batches))


def main(settings: ConfigDict, _: Sequence[str]) -> None:
    """The command line."""
    cache = cache_teacher(CacheTeacherConfig.from_dict(settings.to_dict()))
    facts = cache.facts
    size = sum((cache.folder / part.name).stat().st_size for part in facts.parts)
    print(f"{facts.num_rows:,} rows of {facts.seq_len} tokens: {size:,} bytes")
    print(f"the {facts.k} most likely tokens keep {cache.kept_mass:.2%} of the probability")
    print(f"written to {cache.folder}")


if __name__ == "__main__":
    cli.run_with_config(main, "What to cache, such as configs/cache_teacher.py.")
