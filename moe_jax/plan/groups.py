"""Groups of experts of which each becomes one; in all of them the one that stays comes first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform


def check_capacity(kept: int, experts: int, cap: int | None) -> None:
    """Raises ValueError if ``kept`` groups of at most ``cap`` cannot hold all experts."""
    if cap is not None and kept * cap < experts:
        raise ValueError(
            f"{kept} groups of at most merge_cap = {cap} experts cannot hold {experts}; "
            "raise merge_cap or keep more"
        )


def check_clusters(scope: str) -> None:
    """Raises ValueError for a ``scope`` of ``make_plan`` that clusters would not keep to."""
    if scope == "group":
        raise ValueError(
            "clusters decide by similarity which experts stay, and know no groups of ids: take "
            "scope 'layer' or 'global', got 'group'"
        )


def join_nearest(
    kept: Sequence[int], similarity: Float[np.ndarray, "E E"], cap: int
) -> list[list[int]]:
    """Every other expert joins the most similar of ``kept`` (M-SMoE, arXiv 2310.01334).

    A group takes at most ``cap`` experts, the one that stays among them; where several want the
    last place, the most similar one gets it, and the others go to their next best.
    """
    groups = {k: [k] for k in kept}
    free = set(range(len(similarity))) - set(kept)
    for _, k, e in sorted((-similarity[k, e], k, e) for k in kept for e in free):
        if e in free and len(groups[k]) < cap:
            groups[k].append(e)
            free.remove(e)
    return list(groups.values())


def join_salient_first(
    kept: Sequence[int],
    similarity: Float[np.ndarray, "E E"],
    scores: Float[np.ndarray, " E"],
    cap: int,
) -> list[list[int]]:
    """The highest score first, each of ``kept`` takes the most similar experts that are left.

    It takes them until its group holds ``cap``, so that most of ``kept`` stay as they are and a
    few are merged with many (REAM's "pseudo-pruning", arXiv 2604.04356).
    """
    groups = {k: [k] for k in kept}
    free = set(range(len(similarity))) - set(kept)
    for k in sorted(kept, key=lambda e: (-scores[e], e)):
        groups[k] += sorted(free, key=lambda e: (-similarity[k, e], e))[: cap - 1]
        free -= set(groups[k])
    return list(groups.values())


def clusters(
    distance: Float[np.ndarray, "E E"], count: int, scores: Float[np.ndarray, " E"]
) -> list[list[int]]:
    """Agglomerative clustering, average linkage, until ``count`` groups are left.

    Of each, the expert with the highest score comes first (HC-SMoE, arXiv 2410.08589).
    """
    experts = len(distance)
    members = {e: [e] for e in range(experts)}
    if count < experts:
        # Exactly so many, which a threshold does not give where distances are equal.
        joined = linkage(squareform(distance, checks=False), "average")[: experts - count, :2]
        for step, (a, b) in enumerate(joined.astype(int).tolist()):
            members[experts + step] = members.pop(a) + members.pop(b)
    return [sorted(group, key=lambda e: (-scores[e], e)) for group in members.values()]
