"""Which subset of experts keeps a layer's output closest to what it was.

The error of removing the set R is ``sum_t ||sum_{e in R} w_te y_te||^2``: a quadratic form of the
experts' weighted outputs, ``sum_{e, f in R} C_ef`` with the matrix ``C`` of their inner products
(``output_gram``). So the search over subsets needs no further pass over text. The criterion is that
of NAEE (arXiv 2402.14800), with the routing left as it is: there, the router chooses again among
the experts that stay.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from moe_jax.scoring.criterion import Layer

# Subsets that an exhaustive search looks at, at most: NAEE's C(8, 4) many times over.
MOST_SUBSETS = 200_000


def reconstruction_loss(gram: np.ndarray, removed) -> float:
    """Summed squared error of a layer's output without the experts ``removed``."""
    index = list(removed)
    return float(gram[np.ix_(index, index)].astype(np.float64).sum())


def best_subset(gram: np.ndarray, keep: int) -> tuple[int, ...]:
    """The ``keep`` experts whose layer output is closest to the whole, ascending.

    Every subset is tried where there are at most ``MOST_SUBSETS``; otherwise experts are removed
    one by one, each time the one that raises the error least.

    Args:
        gram: inner products of weighted outputs, [E, E].
        keep: in [0, E].

    Raises:
        ValueError: ``keep`` out of bounds.
    """
    experts = gram.shape[0]
    if not 0 <= keep <= experts:
        raise ValueError(f"keep must be in [0, {experts}], got {keep}")
    if keep == experts:
        return tuple(range(experts))
    if math.comb(experts, keep) > MOST_SUBSETS:
        return tuple(sorted(removal_order(gram)[0][experts - keep :]))
    removed = np.array(list(itertools.combinations(range(experts), experts - keep)))
    gram = gram.astype(np.float64)
    losses = np.zeros(len(removed))
    for i, j in itertools.product(range(experts - keep), repeat=2):
        losses += gram[removed[:, i], removed[:, j]]
    return tuple(np.setdiff1d(np.arange(experts), removed[losses.argmin()]).tolist())


def removal_order(gram: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Experts in the order of greedy removal, and the error after each step."""
    gram = gram.astype(np.float64)
    left = np.ones(gram.shape[0], bool)
    own, cross, loss = np.diag(gram).copy(), np.zeros(gram.shape[0]), 0.0
    order, losses = [], np.zeros(gram.shape[0])
    for step in range(gram.shape[0]):
        rise = np.where(left, own + 2 * cross, np.inf)
        expert = int(rise.argmin())
        loss += rise[expert]
        left[expert] = False
        cross += gram[expert]
        order.append(expert)
        losses[step] = loss
    return order, losses


def reconstruction_scores(layer: Layer, _, keep: int | None) -> np.ndarray:
    """Scores whose highest ``keep`` are ``best_subset``; without it, those of greedy removal.

    An expert's score is the highest error that had been reached when greedy removal came to it;
    the experts of the best subset, if one is asked for, are lifted above all others.
    """
    gram = layer["output_gram"]
    order, losses = removal_order(gram)
    scores = np.zeros(len(order))
    # Equal errors must not undo the order of removal.
    scores[order] = np.maximum.accumulate(losses) * (1 + 1e-9 * np.arange(len(order)))
    if keep is not None:
        scores[list(best_subset(gram, keep))] += scores.max()
    return scores
