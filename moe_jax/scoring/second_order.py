"""Criteria that need second moments and the projection that reads what they are of.

Of neurons, [E, F], each is a function of one expert: ``gram [F + 1, F + 1]``, second moments of its
activations and, last, of the constant 1; ``down [F, D]``; and options. Of key/value groups, [G],
each is one of a layer's attention: ``gram [G R, G R]``, those of its mixed heads, with one more row
and column if there is a bias; the output projection ``[G, R, D]``; and options.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax.config import ModelConfig
from moe_jax.params import expert_leaves, stack_experts
from moe_jax.repair import (
    RIDGE,
    group_removal_costs,
    neuron_energy,
    over_experts,
    removal_costs,
)

Layer = dict[str, np.ndarray]


def _obs(gram, down, ridge: float = RIDGE, constant: bool = False) -> Float[Array, " F"]:
    """Running maximum of the cost of removal (see ``repair.removal_costs``).

    ``constant``: that of an expert which also has a constant, that takes over what it can.
    """
    return removal_costs(gram if constant else gram[:-1, :-1], down, ridge)


MODEL_CRITERIA: dict[str, Callable[..., Array]] = {"energy": neuron_energy, "obs": _obs}


def _obs_groups(gram, out, ridge: float = RIDGE) -> Float[Array, " G"]:
    """Running maximum of the cost of removal (see ``repair.group_removal_costs``)."""
    return group_removal_costs(gram, out, ridge)


MODEL_GROUP_CRITERIA: dict[str, Callable[..., Array]] = {"obs": _obs_groups}


@functools.cache
def _with_options(method: str, options: tuple[tuple[str, Any], ...]) -> Callable[..., Array]:
    """One function for the same options, so that it is compiled once."""
    return functools.partial(MODEL_CRITERIA[method], **dict(options))


def score_with_weights(
    method: str, layer: Layer, index: int, params: dict[str, Any], config: ModelConfig, **options
) -> np.ndarray:
    """Scores of one layer, ``[E, F]``; an expert without neurons (a novice) scores zeros.

    So does an expert that no token reached: ranked across a layer its neurons go first, all but
    the least that each expert keeps (one, or with own widths none: it becomes a novice); ranked
    within it, those of the lowest index stay. Repair leaves their weights as they were.

    Raises:
        ValueError: statistics without second moments, or of another model.
    """
    if "hidden_gram" not in layer:
        raise ValueError(
            f"these statistics hold no second moments, which {method!r} needs; calibrate with "
            "second_moments=True"
        )
    moe = config.moe(index)
    expected = (moe.num_experts, moe.expert_width + 1, moe.expert_width + 1)
    grams = layer["hidden_gram"]
    if grams.shape != expected:
        raise ValueError(
            f"statistics of layer {index} must be of this model, with second moments {expected}, "
            f"got {grams.shape}"
        )
    ids = list(moe.expert_ids)
    leaves = expert_leaves(config, index)
    experts = stack_experts(params["layers"][index]["moe"]["experts"], leaves)
    criterion = _with_options(method, tuple(sorted(options.items())))
    found = over_experts(criterion, grams[ids], experts["down"].astype(jnp.float32))
    scores = np.zeros((moe.num_experts, moe.expert_width))
    scores[ids] = np.asarray(found, np.float64)
    return scores


def score_groups_with_weights(
    method: str, layer: Layer, index: int, params: dict[str, Any], config: ModelConfig, **options
) -> np.ndarray:
    """Scores of one layer's key/value groups, ``[G]``.

    Raises:
        ValueError: statistics without second moments of attention, or of another model.
    """
    if "mixed_gram" not in layer:
        raise ValueError(
            f"these statistics hold no second moments of attention, which {method!r} needs; "
            "calibrate with attention_moments=True"
        )
    out = params["layers"][index]["attention"]["out"]
    heads, head_dim, width = out["kernel"].shape
    rows, gram = heads * head_dim, layer["mixed_gram"]
    if gram.shape != (rows + 1, rows + 1):
        raise ValueError(
            f"statistics of layer {index} must be of this model, with second moments of attention "
            f"{(rows + 1, rows + 1)}, got {gram.shape}"
        )
    used = rows + ("bias" in out)
    groups = config.layers[index].num_kv_heads
    weights = out["kernel"].astype(jnp.float32).reshape(groups, -1, width)
    found = MODEL_GROUP_CRITERIA[method](jnp.asarray(gram[:used, :used]), weights, **options)
    return np.asarray(found, np.float64)
