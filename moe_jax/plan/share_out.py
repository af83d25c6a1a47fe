"""A budget of neurons shared out to what is worth most for it: no model, no plan, just numbers."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int


def totals(worth: Float[np.ndarray, "E N"]) -> Float[np.ndarray, "E N1"]:
    """What the first n neurons of each expert are worth together, for n from 0 to N."""
    return np.concatenate([np.zeros((len(worth), 1)), np.cumsum(worth, 1, dtype=np.float64)], 1)


def share_out(
    total: Float[np.ndarray, "E N1"],
    choices: Int[np.ndarray, "E L"],
    price: Float[np.ndarray, " E"],
    budget: float,
) -> Int[np.ndarray, " E"]:
    """Neurons of each expert, all among its ``choices``, worth most for at most ``budget``.

    Steps from one number to the next are taken by their worth for the money until the next one
    exceeds the budget. An expert's neurons are worth less and less, so that its steps come in
    order, and what is taken is the best there is for its cost.

    Args:
        total: what each expert's first n neurons, the dearest first, are worth; see ``totals``.
        choices: numbers of neurons that each expert may have, ascending along the second axis; -1
            in place of those that it may not. Every expert has the first.
        price: what each neuron of an expert costs.
        budget: for all neurons together.
    """
    edges = np.maximum.accumulate(choices, axis=1)
    steps = np.diff(edges, axis=1)
    gain = np.diff(np.take_along_axis(total, edges, axis=1), axis=1).reshape(-1)
    cost = (steps * price[:, None]).reshape(-1)
    real = np.flatnonzero(cost)
    order = real[np.argsort(-(gain[real] / cost[real]), kind="stable")]
    spent = np.cumsum(cost[order]) + edges[:, 0] @ price
    taken = np.zeros(steps.size, bool)
    # Costs are sums of products: equality with the budget must survive their rounding.
    taken[order[: np.searchsorted(spent, budget * (1 + 1e-9), side="right")]] = True
    return edges[:, 0] + (steps * taken.reshape(steps.shape)).sum(1)


def few_widths(
    total: Float[np.ndarray, "E N1"],
    choices: Int[np.ndarray, "E L"],
    price: Float[np.ndarray, " E"],
    budget: float,
    most: int,
    limited: Bool[np.ndarray, " E"] | None = None,
) -> Int[np.ndarray, " E"]:
    """What ``share_out`` gives, with at most ``most`` different numbers above zero.

    The number without which least is lost is given up, one after the other; the first is not.

    Args:
        total, choices, price, budget: see ``share_out``.
        limited: experts that this is asked of, which have their choices in common; None: all.
    """
    experts = np.arange(len(total))
    limited = np.ones(len(total), bool) if limited is None else limited

    def value(widths: np.ndarray) -> float:
        return total[experts, widths].sum()

    widths = share_out(total, choices, price, budget)
    used = (choices == widths[:, None])[limited].any(0) | (np.arange(choices.shape[1]) == 0)
    choices = np.where(used | ~limited[:, None], choices, -1)
    choices = choices[:, (choices >= 0).any(0)]

    def without(n: int) -> Int[np.ndarray, "E L"]:
        fewer = choices.copy()
        fewer[limited, n] = -1
        return fewer

    while len({*widths[limited].tolist()} - {0}) > most:
        others = [without(n) for n in range(1, choices.shape[1]) if choices[limited, n].max() >= 0]
        if not others:
            break
        found = [share_out(total, fewer, price, budget) for fewer in others]
        best = max(range(len(found)), key=lambda n: value(found[n]))
        choices, widths = others[best], found[best]
    return widths
