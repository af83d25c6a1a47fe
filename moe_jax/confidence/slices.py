"""Statistics of any weighting of the slices of a text, and the scores that they give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_jax.scoring import EXPERT_CRITERIA, Beside, score, with_lowest
from moe_jax.statistics import Stats
from moe_jax.statistics_table import per_token, sliced, statistic

Layer = dict[str, np.ndarray]
Keep = float | Mapping[int, int]
# No criterion that text decides draws from it.
_NO_CHANCE = np.random.default_rng(0)


@dataclass(frozen=True)
class Ranking:
    """A ranking of experts, of which is told how much the text decides it.

    Attributes:
        method: a name in ``EXPERT_CRITERIA`` whose scores text decides.
        keep: experts that each layer keeps, or one share of them, in (0, 1].
        among: ids of the experts that compete, by layer; None: all of them.
        options: of the criterion, see ``scoring.score``.
        seed: of the choices of slices.
    """

    method: str
    keep: Keep = 1.0
    among: Mapping[int, Sequence[int]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def competing(self, stats: Stats) -> tuple[dict[int, np.ndarray], dict[int, int]]:
        """By layer, the ids that compete and how many of them stay."""
        ids, kept = {}, {}
        for i, layer in sorted(stats.layers.items()):
            total = len(layer["count"])
            ids[i] = np.arange(total) if self.among is None else np.array(self.among[i], int)
            kept[i] = self.keep[i] if isinstance(self.keep, Mapping) else round(self.keep * total)
            if not 0 < kept[i] <= len(ids[i]):
                raise ValueError(
                    f"layer {i}: keep must leave between 1 and {len(ids[i])} experts, got "
                    f"{self.keep}"
                )
        return ids, kept


def converges(method: str) -> bool:
    """Whether ``convergence`` and ``score_intervals`` know it: it ranks experts by sums of text."""
    criterion = EXPERT_CRITERIA.get(method)
    return criterion is not None and criterion.by_text and not any(map(per_token, criterion.sums))


class Slices:
    """Sums of all slices side by side, [S, ...], and what scores they give together."""

    def __init__(self, stats: Stats, ranking: Ranking) -> None:
        method = ranking.method
        if not converges(method):
            known = sorted(filter(converges, EXPERT_CRITERIA))
            raise ValueError(f"method must rank experts by text, one of {known}, got {method!r}")
        self.criterion = EXPERT_CRITERIA[method]
        self.options = self.criterion.filled(method, ranking.options)
        score(stats, method, **ranking.options)  # refuses statistics that lack its sums
        slices = stats.slices or {(0, 0): stats}
        self.strata = [stratum for stratum, _ in slices]
        self.layers = {
            i: self._stacked([part.layers[i] for part in slices.values()])
            for i in sorted(stats.layers)
        }

    def _stacked(self, layers: Sequence[Layer]) -> Layer:
        """[S, ...] in float64 of what the criterion reads, and of what joins it."""
        reads = {"count", *self.criterion.reads(self.options)}
        if "output_m2" in reads:
            reads.add("output_mean")
        names = [name for name in sliced(layers[0]) if name in reads]
        layer = {
            name: np.stack([np.asarray(x[name], np.float64) for x in layers]) for name in names
        }
        return layer if self.criterion.by_feature else _compact(layer)

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
        """By layer, [E], of the text in which slices come so often.

        Layers of zeros, which ``scoring.score`` refuses, may come of a small share of the text.
        """
        scores = {}
        for i, layer in self.layers.items():
            joined = _joined(layer, weights)
            values = self.criterion.function(joined, Beside(_NO_CHANCE), **self.options)
            scores[i] = with_lowest(np.asarray(values, np.float64), joined["count"])
        return scores


def _compact(layer: Layer) -> Layer:
    """Moments of outputs in S coordinates instead of D: the same distances and total variance.

    The means of S slices span no more than S directions. All but the total of the squared
    deviations within slices is lost, which is all that most criteria ask for.
    """
    if "output_mean" not in layer:
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
    joined = {}
    for name, sums in layer.items():
        rule = statistic(name).merge
        if rule == "maximum":
            joined[name] = sums[weights > 0].max(0)
        elif rule != "mean":
            joined[name] = np.tensordot(weights, sums, 1)
    for name in layer.keys() - joined.keys():
        counts = (weights[:, None] * layer["count"])[..., None]
        mean = (counts * layer[name]).sum(0) / np.maximum(counts.sum(0), 1e-30)
        joined[name] = mean
        joined[name.removesuffix("mean") + "m2"] += (counts * (layer[name] - mean) ** 2).sum(0)
    return joined
