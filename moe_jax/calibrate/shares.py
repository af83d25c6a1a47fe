"""Disjoint shares of calibration text that are alike, for what chance does to scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moe_jax.statistics import SliceKey, Stats


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
