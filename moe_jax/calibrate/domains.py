"""Calibration file by file: routing of every domain, and runs that can be interrupted."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax.calibrate.measure import calibrate, warn_unreached
from moe_jax.calibrate.memory import log_second_moments, moment_copies, plan_second_moments
from moe_jax.config import ModelConfig
from moe_jax.data import calibration_batches
from moe_jax.data.documents import domain_names
from moe_jax.settings import CalibrationConfig
from moe_jax.statistics import SliceKey, Stats

Batches = list[dict[str, np.ndarray]]
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
    *,
    seed: int = 0,
    importance: Sequence[str] = (),
    teacher: tuple[dict[str, Any], ModelConfig] | None = None,
    second_moments: bool | Sequence[int] = False,
    second_moment_bytes: int | None = None,
    attention_moments: bool = False,
    slices: int = 8,
    save_as: str | Path | None = None,
    digest: str = "",
) -> Stats:
    """Calibrates on each domain in turn and merges.

    Merging is exact, and so the routing of every domain comes for nothing:
    ``facts["domains"][name]`` holds its ``tokens``, ``sequences`` and, by layer, ``count`` [E].

    Args:
        params, config: the model to measure.
        domains: batches by name, from ``domain_batches``.
        seed, importance, teacher, second_moments, second_moment_bytes, attention_moments: see
            ``calibrate``. Host memory holds second moments twice while those of two domains are
            merged.
        slices: disjoint shares of the text to keep apart, at most, see ``share_out``; 1 keeps
            none. Each adds the arrays of ``statistics.expert_sums`` to memory and file.
        save_as: save the result under this path, without suffix, unless it is there already. Each
            domain is saved beside it as soon as it is done, so that an interrupted call, made
            again, goes on with the next one and gives the same bytes.
        digest: stands for all that the statistics depend on, ``slices`` among it. Saved
            statistics are taken only if they have the same one.

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
    places = share_out([len(batches) for batches in domains.values()], slices)
    moments = plan_second_moments(
        config, second_moments, second_moment_bytes, moment_copies(domains), attention_moments
    )
    log_second_moments(moments)
    merged = Stats({}, 0, 0, 0)
    facts, parts = {}, []
    for i, ((name, batches), place) in enumerate(zip(domains.items(), places, strict=True)):
        part = None if save_as is None else f"{save_as}.partial-{i}-{name.replace('/', '_')}"
        stats = None if part is None else Stats.load_if_same(part, digest)
        if stats is None:
            stats = calibrate(
                params,
                config,
                batches,
                importance=importance,
                teacher=teacher,
                second_moments=moments,
                slices=place.shares,
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
        stats = dataclasses.replace(stats, slices=place.keys(stats.slices))
        merged = merged.merge(stats, consume=True) if merged.tokens else stats
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
