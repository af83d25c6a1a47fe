"""Calibration file by file: routing of every domain, and runs that can be interrupted."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.calibrate.measure import calibrate, warn_unreached
from moe_jax.config import ModelConfig
from moe_jax.data import calibration_batches
from moe_jax.data.documents import domain_names
from moe_jax.run.config import CalibrationConfig
from moe_jax.statistics import Stats

Batches = list[dict[str, np.ndarray]]
_logger = logging.getLogger(__name__)


def domain_batches(
    files: Sequence[str],
    tokenizer: Any,
    settings: CalibrationConfig,
    *,
    seed: int = 0,
    vocab_size: int | None = None,
) -> dict[str, Batches]:
    """Calibration batches of each file, by domain name, in equal shares of ``num_sequences``.

    Raises:
        FileNotFoundError, ValueError: see ``data.calibration_batches``.
    """
    names = domain_names(files)
    total = settings.num_sequences
    shares = [total // len(files) + (i < total % len(files)) for i in range(len(files))]
    return {
        name: calibration_batches(
            [file],
            tokenizer,
            num_sequences=share,
            seq_len=settings.seq_len,
            batch_size=settings.batch_size,
            seed=seed,
            pack=settings.pack,
            vocab_size=vocab_size,
        )
        for name, file, share in zip(names, files, shares, strict=True)
        if share
    }


def calibrate_domains(
    params: dict[str, Any],
    config: ModelConfig,
    domains: Mapping[str, Batches],
    *,
    seed: int = 0,
    importance: Sequence[str] = (),
    teacher: tuple[dict[str, Any], ModelConfig] | None = None,
    second_moments: bool | Sequence[int] = False,
    save_as: str | Path | None = None,
    digest: str = "",
) -> Stats:
    """Calibrates on each domain in turn and merges.

    Merging is exact, and so the routing of every domain comes for nothing:
    ``facts["domains"][name]`` holds its ``tokens``, ``sequences`` and, by layer, ``count`` [E].

    Args:
        params, config: the model to measure.
        domains: batches by name, from ``domain_batches``.
        seed, importance, teacher, second_moments: see ``calibrate``.
        save_as: save the result under this path, without suffix, unless it is there already. Each
            domain is saved beside it as soon as it is done, so that an interrupted call, made
            again, goes on with the next one and gives the same bytes.
        digest: stands for all that the statistics depend on. Saved statistics are taken only if
            they have the same one.

    Raises:
        OSError: the statistics cannot be written.
        ValueError: no domain, or see ``calibrate``.
    """
    if not domains:
        raise ValueError("calibration needs at least one domain, got none")
    if save_as is not None:
        if not digest:
            raise ValueError("save_as needs a digest, by which to know the statistics again")
        if (done := Stats.load_if_same(save_as, digest)) is not None:
            _logger.info("statistics taken from %s", save_as)
            return done
    merged = Stats({}, 0, 0, 0)
    facts, parts = {}, []
    for i, (name, batches) in enumerate(domains.items()):
        part = None if save_as is None else f"{save_as}.partial-{i}-{name.replace('/', '_')}"
        stats = None if part is None else Stats.load_if_same(part, digest)
        if stats is None:
            stats = calibrate(
                params,
                config,
                batches,
                importance=importance,
                teacher=teacher,
                second_moments=second_moments,
                seed=seed,
                facts={"digest": digest},
                description=f"calibrate on {name}",
                warn=False,
            )
            if part is not None:
                stats.save(part)
        else:
            _logger.info("statistics of %s taken from %s", name, part)
        parts += [part] if part else []
        facts[name] = _coverage(stats)
        merged = merged.merge(stats) if merged.layers else stats
    result = dataclasses.replace(merged, facts={"digest": digest, "domains": facts})
    if save_as is not None:
        result.save(save_as)
        for part in parts:
            Stats.remove(part)
    warn_unreached(result)
    return result


def _coverage(stats: Stats) -> dict[str, Any]:
    return {
        "tokens": stats.tokens,
        "sequences": stats.sequences,
        "count": {str(i): layer["count"].tolist() for i, layer in stats.layers.items()},
    }


def calibrate_by_domain(
    params: dict[str, Any],
    config: ModelConfig,
    files: Sequence[str],
    tokenizer: Any,
    settings: CalibrationConfig,
    *,
    seed: int = 0,
    importance: Sequence[str] = (),
    teacher: tuple[dict[str, Any], ModelConfig] | None = None,
) -> Stats:
    """``calibrate_domains`` on files; each is a domain."""
    domains = domain_batches(files, tokenizer, settings, seed=seed, vocab_size=config.vocab_size)
    return calibrate_domains(
        params, config, domains, seed=seed, importance=importance, teacher=teacher
    )
