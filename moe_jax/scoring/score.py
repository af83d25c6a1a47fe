"""``score``: one criterion over all layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.scoring.experts import EXPERT_CRITERIA
from moe_jax.scoring.neurons import GROUP_CRITERIA, IMPORTANCE_LOSSES, NEURON_CRITERIA
from moe_jax.scoring.second_order import (
    MODEL_CRITERIA,
    MODEL_GROUP_CRITERIA,
    score_groups_with_weights,
    score_with_weights,
)
from moe_jax.statistics import Stats

# The loss that calibration must differentiate for a criterion of experts, neurons or groups.
NEEDED_LOSS = {
    **{name: name for name in IMPORTANCE_LOSSES},
    "fisher": "lm",
    **{f"taylor_{name}": name for name in IMPORTANCE_LOSSES},
    "taylor_fisher": "lm",
}


def score(
    stats: Stats,
    method: str,
    *,
    of: str = "experts",
    seed: int = 0,
    model: tuple[dict[str, Any], ModelConfig] | None = None,
    **options: Any,
) -> dict[int, np.ndarray]:
    """Scores layers by one criterion.

    Args:
        stats: what ``calibrate`` returned.
        method: of experts, a name in ``EXPERT_CRITERIA`` (scores ``[E]``) or ``NEURON_CRITERIA``
            (scores ``[E, F]``); of attention, a name in ``GROUP_CRITERIA`` or
            ``MODEL_GROUP_CRITERIA`` (scores ``[G]``).
        of: ``experts`` scores the layers that have some; ``attention`` scores the key/value
            groups of all layers.
        seed: of the random criteria.
        model: ``(params, config)`` of the model that was measured; a name in ``MODEL_CRITERIA``
            (of neurons, scores ``[E, F]``) or ``MODEL_GROUP_CRITERIA`` needs it.
        options: of the criterion: ``frequency`` for ``mone`` and its variants, ``share`` for
            ``mone_sum``, ``keep`` for ``reconstruction``, ``aggregation`` for the importance losses
            and the expert criteria named ``taylor_...``.

    Returns:
        By layer index, float64 scores. An expert that no token reached scores 0, or with the
        lowest of its layer where scores may be negative.

    Raises:
        ValueError: unknown criterion or option, statistics that lack what it needs, or importance
            that is zero everywhere (with the reason).
    """
    criterion = _criterion(method, of, options)
    generator = np.random.default_rng(seed)
    layers = stats.layers if of == "experts" else stats.attention
    if not layers:
        raise ValueError(f"these statistics cover no {of}; calibrate again")
    with_weights, by_weights = (
        (MODEL_CRITERIA, score_with_weights)
        if of == "experts"
        else (MODEL_GROUP_CRITERIA, score_groups_with_weights)
    )
    scores = {}
    for i, layer in sorted(layers.items()):
        if method in with_weights:
            values = by_weights(method, layer, i, *_needed(model, method), **options)
        else:
            values = np.asarray(criterion(layer, generator, **options), np.float64)
        if of == "experts":
            reached = layer["count"] > 0
            # Nothing is known of the others: they go first.
            lowest = min(0.0, values.min())
            values = np.where(reached if values.ndim == 1 else reached[:, None], values, lowest)
        if not np.isfinite(values).all():
            raise ValueError(f"{method} scores of layer {i} hold a NaN or infinity")
        scores[i] = values
    _refuse_zeros(scores, method)
    return scores


def _criterion(method: str, of: str, options: dict[str, Any]) -> Callable[..., Any]:
    if of not in ("experts", "attention"):
        raise ValueError(f"of must be 'experts' or 'attention', got {of!r}")
    criteria: dict[str, Callable[..., Any]] = (
        GROUP_CRITERIA | MODEL_GROUP_CRITERIA
        if of == "attention"
        else EXPERT_CRITERIA | NEURON_CRITERIA | MODEL_CRITERIA
    )
    if method not in criteria:
        known = (
            f"{sorted(GROUP_CRITERIA | MODEL_GROUP_CRITERIA)} (attention)"
            if of == "attention"
            else f"{sorted(EXPERT_CRITERIA)} (experts) or "
            f"{sorted(NEURON_CRITERIA | MODEL_CRITERIA)} (neurons)"
        )
        raise ValueError(f"method must be one of {known}, got {method!r}")
    known_options = list(inspect.signature(criteria[method]).parameters)[2:]
    unknown = sorted(set(options) - set(known_options))
    if unknown:
        raise ValueError(f"options of {method} must be among {known_options}, got {unknown}")
    return criteria[method]


def _needed(model, method: str):
    if model is None:
        raise ValueError(f"{method!r} needs the weights: pass model=(params, config)")
    return model


def _refuse_zeros(scores: dict[int, np.ndarray], method: str) -> None:
    dead = [i for i, values in scores.items() if not values.any()]
    if not dead:
        return
    reason = (
        "the model is its own teacher, so the gradient of this loss vanishes; use 'kd_topk' "
        "(whose targets do not sum to one), 'lm' or 'fisher', or a router with train-mode noise"
        if method == "kd_full"
        else "no ranking follows from it"
    )
    raise ValueError(f"{method} scores of layers {dead} are all zero: {reason}")
