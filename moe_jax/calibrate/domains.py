"""Calibration file by file: routing of every domain, and runs that can be interrupted."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_jax.calibrate.measurement import Batches, Measurement, merged_domains, warn_unreached
from moe_jax.calibrate.memory import moment_copies
from moe_jax.calibrate.shares import share_out
from moe_jax.calibrate.whole_model import measure_text
from moe_jax.config import ModelConfig
from moe_jax.data import calibration_batches
from moe_jax.data.documents import domain_names
from moe_jax.processes import barrier, is_writer
from moe_jax.settings import CalibrationConfig
from moe_jax.statistics import Stats

# All that is always measured.
DEFAULT = Measurement()
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

    Files that get no sequence, since there are more files than sequences, are named in a warning.

    Raises:
        FileNotFoundError, ValueError: see ``data.calibration_batches``.
    """
    names = domain_names(files)
    total = settings.num_sequences
    shares = [total // len(files) + (i < total % len(files)) for i in range(len(files))]
    if unread := [name for name, share in zip(names, shares, strict=True) if not share]:
        _logger.warning(
            "num_sequences = %d is less than one for each of %d files; nothing is read of %s",
            total,
            len(files),
            ", ".join(unread),
        )
    return {
        name: calibration_batches(
            replace(settings, files=(file,), num_sequences=share),
            tokenizer,
            seed=seed,
            vocab_size=vocab_size,
        )
        for name, file, share in zip(names, files, shares, strict=True)
        if share
    }


def calibrate_domains(
    params: dict[str, Any],
    config: ModelConfig,
    domains: Mapping[str, Batches],
    measurement: Measurement = DEFAULT,
    *,
    save_as: str | Path | None = None,
    digest: str = "",
) -> Stats:
    """Calibrates on each domain in turn and merges, see ``merged_domains``.

    Args:
        params, config: the model to measure.
        domains: batches by name, from ``domain_batches``.
        measurement: what is measured. Host memory holds second moments twice while those of two
            domains are merged. The slices are those of ``share_out``.
        save_as: save the result under this path, without suffix, unless it is there already. Each
            domain is saved beside it as soon as it is done, so that an interrupted call, made
            again, goes on with the next one and gives the same bytes.
        digest: stands for all that the statistics depend on, the slices among it. Saved
            statistics are taken only if they have the same one.

    Raises:
        OSError: the statistics cannot be written.
        ValueError: no domain, or see ``calibrate``.
    """
    if save_as is not None:
        if not digest:
            raise ValueError("save_as needs a digest, by which to know the statistics again")
        if (done := Stats.load_if_same(save_as, digest)) is not None:
            _logger.info("statistics taken from %s", save_as)
            return done
    measurement.check(params, config)
    moments = measurement.moment_plan(config, moment_copies(domains))
    places = share_out([len(batches) for batches in domains.values()], measurement.slices)
    finished: list[str] = []

    def measured() -> Iterator[tuple[str, Stats]]:
        for i, ((name, batches), place) in enumerate(zip(domains.items(), places, strict=True)):
            part = "" if save_as is None else f"{save_as}.partial-{i}-{name.replace('/', '_')}"
            if part and (stats := Stats.load_if_same(part, digest)) is not None:
                _logger.info("statistics of %s taken from %s", name, part)
            else:
                own = replace(measurement, second_moments=moments, slices=place.shares)
                stats = measure_text(params, config, batches, own, f"calibrate on {name}")
                if part and is_writer():
                    replace(stats, facts={"digest": digest}).save(part)
            finished.append(part)
            yield name, replace(stats, slices=place.keys(stats.slices))

    merged = merged_domains(measured())
    result = replace(merged, facts={"digest": digest, **merged.facts})
    if save_as is not None:
        if is_writer():
            result.save(save_as)
        barrier("calibrate_domains")  # others may still be reading the parts
        for part in finished if is_writer() else ():
            Stats.remove(part)
    warn_unreached(result)
    return result
