"""Expert removal that counts where the removed experts' tokens go.

Without the experts R a token is routed to the best of the others. To first order this changes its
loss by ``delta_t(R) = sum_{e in S'} g'_e s_e - sum_{e in S} g_e s_e``, where S and g are the chosen
experts and their weights, S' and g' those without R, and ``s_e = f_e(x) . dL/dy`` says what expert
e's output f_e does to the loss. Experts go one after the other, each time the one that leaves
``cost(R) = sum_t delta_t(R)^2`` least: two that stand in for each other do not both go.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from moe_jax.kinds import RouterConfig, SigmoidRouter, SoftmaxRouter, SparseMixerRouter
from moe_jax.processes import gather
from moe_jax.scoring.criterion import Beside, Criterion, Layer

# What the scores of the chosen experts are divided by to give their weights: their sum, the sum
# over all experts that are left (a softmax that is not renormalised), or nothing (a sigmoid).
Divisor = Literal["chosen", "left", "nothing"]


def removal_costs(
    odds: Float[np.ndarray, "T E"],
    pulls: Float[np.ndarray, "T E"],
    experts_per_token: int,
    divisor: Divisor,
    correction: Float[np.ndarray, " E"] | Float[np.ndarray, ""] | float = 0.0,
    removable: Bool[np.ndarray, " E"] | None = None,
) -> Float[np.ndarray, " E"]:
    """The cost of all that went before and of each expert, in the order in which they go.

    Args:
        odds: the router's scores, of a softmax up to a factor of each token.
        pulls: ``s``, of every expert that a token may be routed to.
        experts_per_token: K.
        divisor: of the chosen experts' scores.
        correction: added to scores where experts are chosen.
        removable: which experts may go, True for all by default.

    Returns:
        The running maximum of the cost as each goes; more for the K that are left, the more each
        one would cost by itself.
    """
    experts = odds.shape[1]
    odds, pulls = odds.astype(np.float64), pulls.astype(np.float64)
    left = np.ones(experts, bool)
    may_go = np.ones(experts, bool) if removable is None else np.asarray(removable, bool)
    rank = np.argsort(-(odds + correction), axis=1, kind="stable")
    base = _added(odds, pulls, rank[:, :experts_per_token], divisor)
    costs, highest = np.zeros(experts), 0.0
    while left.sum() > experts_per_token and (left & may_go).any():
        each = _costs_of_next(odds, pulls, rank, left, base, experts_per_token, divisor)
        each[~(left & may_go)] = np.inf
        gone = int(each.argmin())
        highest = max(highest, each[gone])
        costs[gone], left[gone] = highest, False
    alone = np.square(odds / odds.sum(1, keepdims=True) * pulls).sum(0)
    span = max(highest, 1e-30)
    costs[left] = span * (2 + alone[left] / max(alone.max(), 1e-30))
    return costs


def _added(odds, pulls, chosen, divisor: Divisor) -> np.ndarray:
    """``sum_{e in S} g_e s_e`` of each token."""
    own = np.take_along_axis(odds, chosen, 1)
    sums = {"chosen": own.sum(1), "left": odds.sum(1), "nothing": np.ones(len(odds))}
    return (own * np.take_along_axis(pulls, chosen, 1)).sum(1) / np.maximum(sums[divisor], 1e-300)


def _costs_of_next(odds, pulls, rank, left, base, k: int, divisor: Divisor) -> np.ndarray:
    """The cost of what is gone with each expert that is left, [E]."""
    experts = odds.shape[1]
    # Of each token the k + 1 best that are left, in order.
    order = np.argsort(~left[rank], axis=1, kind="stable")[:, : k + 1]
    best = np.take_along_axis(rank, order, 1)
    own, pull = np.take_along_axis(odds, best, 1), np.take_along_axis(pulls, best, 1)
    added, chosen = (own * pull)[:, :k].sum(1), own[:, :k].sum(1)
    whole = odds[:, left].sum(1)
    without = added[:, None] - (own * pull)[:, :k] + (own * pull)[:, k:]
    if divisor == "chosen":
        rest = chosen[:, None] - own[:, :k] + own[:, k:]
    elif divisor == "left":
        rest = whole[:, None] - own[:, :k]
    else:
        rest = np.ones_like(own[:, :k])
    change = without / np.maximum(rest, 1e-300) - base[:, None]
    if divisor != "left":
        now = (added / np.maximum(chosen, 1e-300) if divisor == "chosen" else added) - base
        others = np.full(experts, np.square(now).sum())
        unless = np.square(now)[:, None]
    else:  # what is left shares out what a token did not even choose
        rest_of = whole[:, None] - np.where(left, odds, 0)
        shared = added[:, None] / np.maximum(rest_of, 1e-300) - base[:, None]
        others = np.square(shared).sum(0)
        unless = np.take_along_axis(np.square(shared), best[:, :k], 1)
    gain = np.square(change) - unless
    return others + np.bincount(best[:, :k].ravel(), gain.ravel(), experts)


def check_router(router: RouterConfig) -> SoftmaxRouter | SigmoidRouter:
    """The router, if removal with re-routing knows what it does without some experts.

    Raises:
        ValueError: SparseMixer, a choice within groups, a softmax with a correction.
    """
    if isinstance(router, SparseMixerRouter) or router.groups > 1:
        raise ValueError(
            "'rerouted' needs a router that takes the largest scores of all experts, not of "
            f"groups, got {router}"
        )
    if router.correction and isinstance(router, SoftmaxRouter):
        # What is left of a softmax grows against its correction.
        raise ValueError(f"'rerouted' does not know a corrected softmax, got {router}")
    return router


def _rerouted(layer: Layer, beside: Beside) -> np.ndarray:
    """``removal_costs`` of a layer; a novice has no neurons to remove and scores 0."""
    config = beside.config
    if config is None:
        raise ValueError("'rerouted' needs the model: pass model=(params, config)")
    moe, router = config.moe(beside.layer), check_router(config.router)
    sigmoid = isinstance(router, SigmoidRouter)
    logits = layer["rerouting.logits"].astype(np.float64)
    divisor: Divisor
    if sigmoid:
        odds, divisor = 1 / (1 + np.exp(-logits)), "nothing"
    else:
        odds, divisor = np.exp(logits - logits.max(1, keepdims=True)), "left"
    correction: Any = 0.0
    if router.correction:
        if beside.params is None:
            raise ValueError("'rerouted' needs the weights of a router with a correction")
        correction = beside.params["layers"][beside.layer]["moe"]["router"]["correction"]
    costs = removal_costs(
        odds,
        layer["rerouting.pulls"],
        moe.experts_per_token,
        "chosen" if router.renormalize else divisor,
        gather(correction).astype(np.float64),
        np.isin(np.arange(moe.num_experts), moe.expert_ids),
    )
    return router.scale**2 * costs


REROUTED = Criterion(_rerouted, ("rerouting.logits", "rerouting.pulls"))
