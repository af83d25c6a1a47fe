"""Published ways to merge experts, as settings of one procedure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Grouping = Literal["nearest", "clusters", "salient_first"]
Similarity = Literal["router", "output", "output_and_router", "weights"]
MergeWeights = Literal["frequency", "score", "uniform"]
MergeRouter = Literal["mean", "kept"]


@dataclass(frozen=True)
class MergeRecipe:
    """How experts are grouped and merged.

    Attributes:
        criterion: ranks experts, a name in ``scoring.EXPERT_CRITERIA``: the highest stay, or the
            highest of each cluster.
        grouping: ``nearest`` and ``salient_first`` choose first who stays and then who joins whom;
            ``clusters`` is hierarchical. See ``plan.groups``.
        similarity: what stands for an expert: its column of ``router`` logits over all tokens; its
            mean ``output`` over its own tokens; its ``weights``; or, as ``output_and_router``, the
            mean of two cosines, of summed outputs times routing weights and of router logits.
            Compared by cosine, in ``clusters`` by Euclidean distance.
        weights: of the mean: ``frequency`` (selections), ``score`` or ``uniform``.
        align: permute neurons to those of the expert that stays, see ``prune.merge``.
        router: the merged expert's row: ``mean`` by the same weights, or ``kept``.
        cap: experts in a group at most, the one that stays among them; None: no bound.
    """

    criterion: str
    grouping: Grouping = "nearest"
    similarity: Similarity = "router"
    weights: MergeWeights = "frequency"
    align: bool = True
    router: MergeRouter = "mean"
    cap: int | None = None

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("grouping", self.grouping, get_args(Grouping)),
            ("similarity", self.similarity, get_args(Similarity)),
            ("weights", self.weights, get_args(MergeWeights)),
            ("router", self.router, get_args(MergeRouter)),
        ):
            if value not in choices:
                raise ValueError(f"merge_{name} must be one of {choices}, got {value!r}")
        if self.cap is not None and self.cap < 2:
            raise ValueError(f"merge_cap must be at least 2, got {self.cap}")
        if self.grouping == "clusters" and self.similarity == "output_and_router":
            raise ValueError(
                "merge_similarity of clusters must be 'router', 'output' or 'weights' (distances "
                "in different spaces do not add up), got 'output_and_router'"
            )
        if self.grouping == "clusters" and self.cap is not None:
            raise ValueError(f"clusters have no merge_cap, got {self.cap}")


# M-SMoE (arXiv 2310.01334): the most frequently chosen experts stay, every other one
# joins the one with the most similar router logits, neurons are aligned by their weights, and the
# mean is weighted by frequency. Here similarities run over all calibration tokens, frequencies are
# plain counts, and what is merged are the router's rows too, as a stock checkpoint wants it.
M_SMOE = MergeRecipe("frequency")

# HC-SMoE (arXiv 2410.08589): hierarchical clusters, average linkage, Euclidean distance of mean
# outputs (its tables compare router logits and weights); the mean is weighted by frequency, without
# alignment. The most frequent expert of a cluster, "dominant" there, lends place and order of
# neurons. In the paper all router rows stay, and those of a cluster point to one merged expert. A
# stock checkpoint cannot say that without storing a copy for every row, so rows are merged too.
HC_SMOE = MergeRecipe("frequency", grouping="clusters", similarity="output", align=False)

# REAM (arXiv 2604.04356 and its authors' code): experts with the highest REAP score stay with their
# router rows, take groups of at most 16 in turn, and are merged with weights in proportion to it,
# after alignment. Choices of ours, as the statistics are sums over each expert's own tokens: mean
# outputs weighted by routing are over these rather than over all tokens; alignment goes by
# weights alone, where the authors add activations; an expert with score 0 gets no weight, where
# they give it the least. They also measure each layer after those before it are merged, which
# several stages come close to.
REAM = MergeRecipe(
    "reap",
    grouping="salient_first",
    similarity="output_and_router",
    weights="score",
    router="kept",
    cap=16,
)

MERGE_RECIPES = {"m_smoe": M_SMOE, "hc_smoe": HC_SMOE, "ream": REAM}
