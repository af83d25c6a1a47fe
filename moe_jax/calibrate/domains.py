"""Calibration file by file: routing of every domain, and runs that can be interrupted."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.calibrate.measurement import Batches, Measurement, merged_domains, warn_unreached
from moe_jax.calibrate.memory import moment_copies
from moe_jax.calibrate.whole_model import measure_text
from moe_jax.config import ModelConfig
from moe_jax.data import calibration_batches
from moe_jax.data.documents import domain_names
from moe_jax.processes import is_writer
from moe_jax.settings import CalibrationConfig
from moe_jax.statistics import SliceKey, Stats

# All that is always measured.
DEFAULT = Measurement()
_logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where the batches of a domain go: to ``shares`` shares of a stratum, from ``first`` on."""

    stratum: int
    first: int
    shares: int

    def keys(self, slices: Mapping[SliceKey, Stats]) -> dict[SliceKey, Stats]:
        """What ``calibrate`` kept of the domain, under the keys of the whole text."""
        return {
            (self.stratum, (self.first + n) % self.shares): part for (_, n), part in slices.items()
        }


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


def share_out(num_batches: Sequence[int], most: int) -> list[Place]:
    """Which slice each batch belongs to: at most ``most`` slices, of which many are alike.

    Batches are dealt out in turn to N shares, N a power of two, so that every share has the same
    mix of domains. Where domains have fewer batches than ``most``, N is what they have on average,
    and domains are spread over up to ``most / N`` strata, each with N shares: 8 domains of 2
    batches give 4 strata of 2 shares. With fewer than 2 batches per domain, shares cannot be alike:
    there is one stratum, and what differs between domains counts as chance.

    Args:
        num_batches: of each domain.
        most: at least 1.

    Raises:
        ValueError: ``most`` is out of bounds.
    """
    if most < 1:
        raise ValueError(f"slices must be at least 1, got {most}")
    average = sum(num_batches) // max(len(num_batches), 1)
    shares = _power_of_two(min(most, average if average > 1 else sum(num_batches)))
    strata = min(len(num_batches), most // shares) if average > 1 else 1
    for number in range(strata, 1, -1):
        places, dealt = _deal(num_batches, number, shares)
        if min(dealt) >= shares:  # else a stratum of small domains would lack shares
            return places
    return _deal(num_batches, 1, shares)[0]


def _deal(num_batches: Sequence[int], strata: int, shares: int) -> tuple[list[Place], list[int]]:
    """Places, and batches of each stratum: the largest domain first, to where the fewest are."""
    dealt, places = [0] * strata, {}
    for i in sorted(range(len(num_batches)), key=lambda i: -num_batches[i]):
        stratum = dealt.index(min(dealt))
        places[i] = Place(stratum, dealt[stratum] % shares, shares)
        dealt[stratum] += num_batches[i]
    return [places[i] for i in range(len(num_batches))], dealt


def _power_of_two(most: int) -> int:
    """The largest that is not above ``most``, or 1."""
    return 1 << (max(most, 1).bit_length() - 1)


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
    if save_as is not None and is_writer():
        result.save(save_as)
        for part in finished:
            Stats.remove(part)
    warn_unreached(result)
    return result
