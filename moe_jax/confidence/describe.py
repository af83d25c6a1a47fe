"""What there is to say of a ranking: as plain data for a report, and as sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.confidence.coverage import Coverage, coverage
from moe_jax.confidence.resampling import Intervals, convergence, score_intervals, verdict
from moe_jax.confidence.slices import Keep, Ranking, converges
from moe_jax.statistics import Stats
from moe_jax.text import counted

# Experts that would be on the other side with this probability are named.
UNSURE = 0.1
# Below so many degrees of freedom, such probabilities are noise themselves.
FEWEST_DEGREES = 3
_RESAMPLES, _LEVEL = 200, 0.9
_MOST_FEW, _MOST_UNSURE = 100, 20
# Experts that a sentence names.
_SHOWN = 12


def describe_confidence(
    stats: Stats,
    method: str,
    keep: Keep | None,
    *,
    among: Mapping[int, Sequence[int]] | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What there is to say of a ranking; of some, coverage alone.

    Args:
        stats: of calibration; empty is what comes of statistics in which no expert was reached.
        method: what ranked: a criterion, or the name of another way to cut.
        keep: see ``Ranking``; None if the kept set is not the top of a ranking of experts.
        among, seed, options: see ``Ranking``.
    """
    if not any(layer["count"].any() for layer in stats.layers.values()):
        return {}
    told: dict[str, Any] = {"coverage": _coverage(coverage(stats))}
    if keep is None or not converges(method):
        why = "is no ranking of experts by their text"
        return {"verdict": f"{method} {why}: coverage alone is told."} | told
    ranking = Ranking(method, keep, among, options or {}, seed)
    found = convergence(stats, ranking)
    told["convergence"] = {
        "shares": list(found.shares),
        "layers": list(found.layers),
        "kept": list(found.kept),
        "common": found.common.round(6).tolist(),
        "rank_correlation": found.rank_correlation.round(6).tolist(),
    }
    intervals = score_intervals(stats, ranking, _RESAMPLES, _LEVEL)
    if intervals.degrees >= FEWEST_DEGREES:
        told["unsure"] = _unsure(intervals)
    return {"verdict": verdict(found)} | told


def _coverage(found: Coverage) -> dict[str, Any]:
    return {
        **vars(found),
        "num_few": len(found.few),
        "few": [list(expert) for expert in found.few[:_MOST_FEW]],
        "edges": [float(f"{edge:.5g}") for edge in found.edges],
    }


def _unsure(intervals: Intervals) -> dict[str, Any]:
    experts = [
        (i, int(e), bool(intervals.kept[i][e]), round(float(values[e]), 3))
        for i, values in intervals.other_side.items()
        for e in np.flatnonzero(values >= UNSURE)
    ]
    likeliest = sorted(experts, key=lambda expert: (-expert[-1], expert))
    return {
        "probability": UNSURE,
        "resamples": _RESAMPLES,
        "degrees": intervals.degrees,
        "number": len(experts),
        "experts": [list(expert) for expert in likeliest[:_MOST_UNSURE]],
    }


def coverage_sentence(coverage: Mapping[str, Any]) -> str:
    """Such as ``3 of 256 experts were chosen by fewer than 100 tokens: layer 0: 5 (12 tokens)...``.

    ``coverage`` is that of ``describe_confidence``.
    """
    layer, expert, share = coverage["busiest"]
    most = (
        f"The busiest, expert {expert} of layer {layer}, was chosen by {share:.1%} of the tokens "
        f"({share / coverage['uniform']:.1f} times its even share)."
    )
    number, floor = coverage["num_few"], coverage["floor"]
    if not number:
        return f"Every expert was chosen by at least {floor} tokens. {most}"
    by_layer: dict[int, list[str]] = {}
    for i, e, tokens in coverage["few"][:_SHOWN]:
        by_layer.setdefault(i, []).append(f"{e} ({tokens})")
    named = "; ".join(f"layer {i}: {', '.join(names)}" for i, names in by_layer.items())
    more = number - min(len(coverage["few"]), _SHOWN)
    return (
        f"{number} of {coverage['experts']} experts were chosen by fewer than {floor} tokens: "
        f"{named}{f' and {more} more' if more else ''}. {most}"
    )


def unsure_sentence(unsure: Mapping[str, Any]) -> str:
    """Which experts other text of equal size might well have decided otherwise (bootstrap).

    ``unsure`` is that of ``describe_confidence``.
    """
    number, experts = unsure["number"], unsure["experts"][:_SHOWN]
    told = (
        f"With other text of this size, {counted(number, 'expert') if number else 'no experts'} "
        f"would be on the other side with a probability of at least {unsure['probability']:.0%}"
    )
    named = ", ".join(
        f"layer {i} expert {e} ({'kept' if kept else 'removed'}, {probability:.0%})"
        for i, e, kept, probability in experts
    )
    more = f" and {number - len(experts)} more" if number > len(experts) else ""
    return f"{told}: {named}{more}." if named else f"{told}."
