"""Statistics of any weighting of the slices of calibration text, and the scores they give.

Statistics keep the sums of disjoint slices of their text (``Stats.slices``). Any weighting of them
gives the statistics of another text of the same kind, so that no further pass over text is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.scoring import EXPERT_CRITERIA, score
from moe_jax.statistics import Stats, expert_sums

# Criteria that no text can change.
_WITHOUT_TEXT = ("random", "router_norm")
# They need the deviation of every single feature.
_BY_FEATURE = ("mone_l1", "mone_cv")

Layer = dict[str, np.ndarray]
Keep = float | Mapping[int, int]
Ids = Mapping[int, Sequence[int]] | None


def converges(method: str) -> bool:
    """Whether ``convergence`` and ``score_intervals`` know the criterion: experts, by text."""
    return method in EXPERT_CRITERIA and method not in _WITHOUT_TEXT


class Slices:
    """Sums of all slices side by side, [S, ...], and what scores they give together."""

    def __init__(self, stats: Stats, method: str, options: Mapping[str, Any] | None) -> None:
        if not converges(method):
            known = sorted(name for name in EXPERT_CRITERIA if converges(name))
            raise ValueError(f"method must rank experts by text, one of {known}, got {method!r}")
        self.criterion, self.options = EXPERT_CRITERIA[method], dict(options or {})
        score(stats, method, **self.options)  # refuses what the criterion does not take
        slices = stats.slices or {(0, 0): stats}
        self.strata = [stratum for stratum, _ in slices]
        self.layers = {
            i: _compact(_stacked([part.layers[i] for part in slices.values()], method), method)
            for i in sorted(stats.layers)
        }

    def most_shares(self) -> int:
        return max(self.strata.count(stratum) for stratum in self.strata)

    def places(self) -> Iterator[np.ndarray]:
        """Indices of the slices of each stratum."""
        for stratum in dict.fromkeys(self.strata):
            yield np.flatnonzero(np.equal(self.strata, stratum))

    def choose(self, share: float, rng: np.random.Generator) -> np.ndarray:
        """Weights [S]: 1 for ``share`` of every stratum, at least one slice of it."""
        weights = np.zeros(len(self.strata))
        for places in self.places():
            weights[rng.permutation(places)[: max(1, round(share * len(places)))]] = 1
        return weights

    def resample(self, resamples: int, rng: np.random.Generator) -> np.ndarray:
        """Weights [resamples, S] of the bootstrap."""
        weights = np.ones((resamples, len(self.strata)))
        for places in self.places():
            n = len(places)
            if n > 1:
                weights[:, places] = rng.multinomial(n - 1, [1 / n] * n, resamples) * n / (n - 1)
        return weights

    def scores(self, weights: np.ndarray) -> dict[int, np.ndarray]:
        """By layer, [E], of the text in which slices come so often; as ``scoring.score`` does.

        That refuses a layer of zeros, which a small share of the text may well give.
        """
        scores = {}
        for i, layer in self.layers.items():
            joined = _joined(layer, weights)
            values = np.asarray(self.criterion(joined, None, **self.options), np.float64)
            scores[i] = np.where(joined["count"] > 0, values, min(0.0, values.min()))
        return scores


def _stacked(layers: Sequence[Layer], method: str) -> Layer:
    """[S, ...] in float64, without the pairs of experts that only one criterion needs."""
    names = [n for n in expert_sums(layers[0]) if n != "output_gram" or method == "reconstruction"]
    return {name: np.stack([np.asarray(x[name], np.float64) for x in layers]) for name in names}


def _compact(layer: Layer, method: str) -> Layer:
    """Moments of outputs in S coordinates instead of D: the same distances and total variance.

    The means of S slices span no more than S directions. All but the total of the squared
    deviations within slices is lost, which is all that most criteria ask for.
    """
    if "output_mean" not in layer or method in _BY_FEATURE:
        return layer
    mean, squares = layer["output_mean"], layer["output_m2"].sum(-1)
    if mean.shape[-1] <= mean.shape[0]:
        return layer
    deviations = np.moveaxis(mean - mean.mean(0), 0, -1)  # [E, D, S]
    mean = np.moveaxis(np.asarray(np.linalg.qr(deviations, "r")), -1, 0)
    m2 = np.zeros_like(mean)
    m2[..., 0] = squares
    return layer | {"output_mean": mean, "output_m2": m2}


def _joined(layer: Layer, weights: np.ndarray) -> Layer:
    """Sums of the slices, each so many times; moments by Chan's formula for many parts."""
    joined = {name: np.tensordot(weights, sums, 1) for name, sums in layer.items()}
    if "output_mean" in layer:
        counts = (weights[:, None] * layer["count"])[..., None]
        mean = (counts * layer["output_mean"]).sum(0) / np.maximum(counts.sum(0), 1e-30)
        joined["output_mean"] = mean
        joined["output_m2"] += (counts * (layer["output_mean"] - mean) ** 2).sum(0)
    return joined


def competing(stats: Stats, keep: Keep, among: Ids) -> tuple[dict[int, np.ndarray], dict[int, int]]:
    """By layer, the ids that compete and how many of them stay."""
    ids, kept = {}, {}
    for i, layer in sorted(stats.layers.items()):
        total = len(layer["count"])
        ids[i] = np.arange(total) if among is None else np.array(among[i], int)
        kept[i] = keep[i] if isinstance(keep, Mapping) else round(keep * total)
        if not 0 < kept[i] <= len(ids[i]):
            raise ValueError(
                f"layer {i}: keep must leave between 1 and {len(ids[i])} experts, got {keep}"
            )
    return ids, kept
