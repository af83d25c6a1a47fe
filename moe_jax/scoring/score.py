"""Criteria: from statistics to one number per expert, neuron or group. Low means redundant."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_jax.statistics import Stats

Layer = dict[str, np.ndarray]
# Losses whose gradient can score neurons and groups; calibration must be asked for each.
IMPORTANCE_LOSSES = ("kd_topk", "kd_full", "lm")
AGGREGATIONS = ("batch_abs", "sequence_abs", "sequence_square")


def score(
    stats: Stats,
    method: str,
    *,
    of: str = "experts",
    seed: int = 0,
    **options: Any,
) -> dict[int, np.ndarray]:
    """Scores layers by one criterion.

    Args:
        stats: what ``calibrate`` returned.
        method: of experts, a name in ``EXPERT_CRITERIA`` (scores ``[E]``) or ``NEURON_CRITERIA``
            (scores ``[E, F]``); of attention, a name in ``GROUP_CRITERIA`` (scores ``[G]``).
        of: ``experts`` scores the layers that have some; ``attention`` scores the key/value
            groups of all layers.
        seed: of the random criteria.
        options: of the criterion: ``frequency`` for ``mone``; ``aggregation`` for the importance
            losses.

    Returns:
        By layer index, float64 scores. An expert that no token reached scores 0.

    Raises:
        ValueError: unknown criterion or option, statistics that lack what it needs, or importance
            that is zero everywhere (with the reason).
    """
    criterion = _criterion(method, of, options)
    generator = np.random.default_rng(seed)
    layers = stats.layers if of == "experts" else stats.attention
    if not layers:
        raise ValueError(f"these statistics cover no {of}; calibrate again")
    scores = {}
    for i, layer in sorted(layers.items()):
        values = np.asarray(criterion(layer, generator, **options), np.float64)
        if of == "experts":
            reached = layer["count"] > 0
            values = np.where(reached if values.ndim == 1 else reached[:, None], values, 0.0)
        if not np.isfinite(values).all():
            raise ValueError(f"{method} scores of layer {i} hold a NaN or infinity")
        scores[i] = values
    _refuse_zeros(scores, method)
    return scores


def _criterion(method: str, of: str, options: dict[str, Any]) -> Callable[..., np.ndarray]:
    if of not in ("experts", "attention"):
        raise ValueError(f"of must be 'experts' or 'attention', got {of!r}")
    criteria = GROUP_CRITERIA if of == "attention" else EXPERT_CRITERIA | NEURON_CRITERIA
    if method not in criteria:
        known = (
            f"{sorted(GROUP_CRITERIA)} (attention)"
            if of == "attention"
            else f"{sorted(EXPERT_CRITERIA)} (experts) or {sorted(NEURON_CRITERIA)} (neurons)"
        )
        raise ValueError(f"method must be one of {known}, got {method!r}")
    known_options = list(inspect.signature(criteria[method]).parameters)[2:]
    unknown = sorted(set(options) - set(known_options))
    if unknown:
        raise ValueError(f"options of {method} must be among {known_options}, got {unknown}")
    return criteria[method]


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


def _per_token(sums: np.ndarray, layer: Layer) -> np.ndarray:
    return sums / np.maximum(layer["count"], 1)


def output_deviation(layer: Layer) -> np.ndarray:
    """``sqrt(trace of the unbiased covariance)`` of each expert's output, [E]; 0 below 2 tokens."""
    count = layer["count"]
    total = layer["output_m2"].astype(np.float64).sum(-1)
    return np.where(count > 1, np.sqrt(total / np.maximum(count - 1, 1)), 0.0)


def _mone(layer: Layer, _, frequency: str = "routing_mass") -> np.ndarray:
    """Output deviation times access frequency (MoNE, arXiv 2507.00390).

    ``frequency="routing_mass"`` sums the routing weights (what the authors' code ranks by);
    ``"mean_weight"`` divides the sum by the number of selections (the formula as printed).
    """
    if frequency not in ("routing_mass", "mean_weight"):
        raise ValueError(f"frequency must be 'routing_mass' or 'mean_weight', got {frequency!r}")
    mass = layer["routing_mass"]
    used = mass if frequency == "routing_mass" else _per_token(mass, layer)
    return output_deviation(layer) * used


EXPERT_CRITERIA: dict[str, Callable[..., np.ndarray]] = {
    "random": lambda layer, rng: rng.random(layer["count"].shape[0]),
    # Selections per expert.
    "frequency": lambda layer, _: layer["count"],
    # Sum of routing weights (RS, "router score").
    "routing_mass": lambda layer, _: layer["routing_mass"],
    "mone": _mone,
    "output_deviation": lambda layer, _: output_deviation(layer),
    # Sum of output norms over an expert's tokens (EAN, arXiv 2504.05586's baselines).
    "ean": lambda layer, _: layer["output_norm"],
    # Mean of routing weight times output norm over an expert's tokens (REAP, arXiv 2510.13999).
    "reap": lambda layer, _: _per_token(layer["gated_norm"], layer),
}


def _importance(loss: str, default: str = "batch_abs") -> Callable[..., np.ndarray]:
    def criterion(layer: Layer, _, aggregation: str = default) -> np.ndarray:
        """Sum over batches of |sum|, over sequences of |.|, or over sequences of its square."""
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation must be one of {AGGREGATIONS}, got {aggregation!r}")
        key = f"{loss}.{aggregation}"
        if key not in layer:
            raise ValueError(
                f"these statistics hold no {loss!r} importance; "
                f"calibrate with importance=({loss!r},)"
            )
        return layer[key]

    return criterion


def activation_norm(layer: Layer) -> np.ndarray:
    """Root of the summed squared hidden activations of each neuron, [E, F]."""
    count = layer["count"][:, None]
    mean = layer["neuron_mean"].astype(np.float64)
    return np.sqrt(layer["neuron_m2"] + count * mean**2)


NEURON_CRITERIA: dict[str, Callable[..., np.ndarray]] = {
    "random_neurons": lambda layer, rng: rng.random(layer["weight_norm"].shape),
    "kd_topk": _importance("kd_topk"),
    "kd_full": _importance("kd_full"),
    "lm": _importance("lm"),
    # Diagonal of the empirical Fisher matrix in the mask: does not vanish at the teacher.
    "fisher": _importance("lm", "sequence_square"),
    "activation_norm": lambda layer, _: activation_norm(layer),
    "weight_norm": lambda layer, _: layer["weight_norm"],
}

# Of key/value groups. ``weight_norm`` is over the projections of a group's heads.
GROUP_CRITERIA: dict[str, Callable[..., np.ndarray]] = {
    "random_groups": lambda layer, rng: rng.random(layer["weight_norm"].shape),
    **{name: NEURON_CRITERIA[name] for name in ("kd_topk", "kd_full", "lm", "fisher")},
    "weight_norm": lambda layer, _: layer["weight_norm"],
}

# The loss that calibration must differentiate for a criterion of neurons or groups.
NEEDED_LOSS = {"kd_topk": "kd_topk", "kd_full": "kd_full", "lm": "lm", "fisher": "lm"}
