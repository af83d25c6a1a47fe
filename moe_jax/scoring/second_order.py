"""Criteria that need second moments and the projection that reads what they are of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax.params import expert_leaves, stack_experts
from moe_jax.processes import gather
from moe_jax.repair import RIDGE, group_removal_costs, neuron_energy, over_experts, removal_costs
from moe_jax.scoring.criterion import Beside, Criterion, Layer, Option

_RIDGE = Option(RIDGE, bounds=">= 0")


def _of_experts(cost: Callable[..., Array], layer: Layer, beside: Beside, **options) -> np.ndarray:
    """Scores of one layer, ``[E, F]``; an expert without neurons (a novice) scores zeros.

    So does an expert that no token reached: ranked across a layer its neurons go first, all but
    the least that each expert keeps (one, or with own widths none: it becomes a novice); ranked
    within it, those of the lowest index stay. Repair leaves their weights as they were. A shared
    expert is one expert of one.

    Args:
        cost: of one expert's second moments ``[F + 1, F + 1]`` (with those of the constant 1 last),
            its down-projection ``[F, D]`` and the options.
        layer, beside, options: of a criterion.
    """
    params, config = beside.model
    moe = config.moe(beside.layer)
    weights = params["layers"][beside.layer]["moe"]
    if beside.shared:
        ids, down = [0], weights["shared"]["down"][None]
    else:
        leaves = expert_leaves(config, beside.layer)
        ids, down = list(moe.expert_ids), stack_experts(weights["experts"], leaves)["down"]
    if "constant" in options:
        # An expert's own takes over, whether a cut asks or not; shared experts have none.
        constant = (options["constant"] or moe.expert_bias) and not beside.shared
        options["constant"] = constant
    criterion = _with_options(cost, tuple(sorted(options.items())))
    grams = layer["hidden_gram"]
    scores = np.zeros((len(grams), grams.shape[1] - 1))
    scores[ids] = gather(over_experts(criterion, grams[ids], down.astype(jnp.float32)))
    return scores


@functools.cache
def _with_options(
    cost: Callable[..., Array], options: tuple[tuple[str, Any], ...]
) -> Callable[..., Array]:
    """One function for the same options, so that it is compiled once."""
    return functools.partial(cost, **dict(options))


def _obs(gram, down, ridge: float, constant: bool) -> Float[Array, " F"]:
    """``constant``: that of an expert which also has a constant, that takes over what it can."""
    return removal_costs(gram if constant else gram[:-1, :-1], down, ridge)


def _obs_groups(layer: Layer, beside: Beside, ridge: float) -> Float[Array, " G"]:
    """Costs of removing key/value groups, from second moments of the heads that they mix."""
    params, config = beside.model
    out = params["layers"][beside.layer]["attention"]["out"]
    heads, head_dim, width = out["kernel"].shape
    groups = config.layers[beside.layer].num_kv_heads
    used = heads * head_dim + ("bias" in out)
    weights = out["kernel"].astype(jnp.float32).reshape(groups, -1, width)
    return group_removal_costs(jnp.asarray(layer["mixed_gram"][:used, :used]), weights, ridge)


NEURONS_WITH_WEIGHTS: dict[str, Criterion] = {
    "energy": Criterion(
        functools.partial(_of_experts, neuron_energy), ("hidden_gram",), weights=True
    ),
    # Running maximum of the cost of removal (see ``repair.removal_costs``).
    "obs": Criterion(
        functools.partial(_of_experts, _obs),
        ("hidden_gram",),
        {"ridge": _RIDGE, "constant": Option(False, (False, True))},
        weights=True,
    ),
}

KV_GROUPS_WITH_WEIGHTS: dict[str, Criterion] = {
    "obs": Criterion(
        _obs_groups, ("mixed_gram",), {"ridge": _RIDGE}, part="attention", weights=True
    ),
}
