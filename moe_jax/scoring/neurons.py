"""Criteria of neurons, [E, F], and of key/value groups, [G]."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Layer = dict[str, np.ndarray]
Criterion = Callable[..., np.ndarray]
# Losses whose gradient can score experts, neurons and groups; calibration must be asked for each.
IMPORTANCE_LOSSES = ("kd_topk", "kd_full", "lm")
AGGREGATIONS = ("batch_abs", "sequence_abs", "sequence_square")


def importance(layer: Layer, loss: str, aggregation: str, prefix: str = "") -> np.ndarray:
    """Sum over batches of |sum|, over sequences of |.|, or over sequences of its square.

    Raises:
        ValueError: no such aggregation, or statistics without this loss.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {AGGREGATIONS}, got {aggregation!r}")
    key = f"{loss}.{prefix}{aggregation}"
    if key not in layer:
        raise ValueError(
            f"these statistics hold no {loss!r} importance; calibrate with importance=({loss!r},)"
        )
    return layer[key]


def _importance(loss: str, default: str = "batch_abs") -> Criterion:
    def criterion(layer: Layer, _, aggregation: str = default) -> np.ndarray:
        return importance(layer, loss, aggregation)

    return criterion


def activation_norm(layer: Layer) -> np.ndarray:
    """Root of the summed squared hidden activations of each neuron, [E, F]."""
    count = layer["count"][:, None]
    mean = layer["neuron_mean"].astype(np.float64)
    return np.sqrt(layer["neuron_m2"] + count * mean**2)


def _wanda(layer: Layer, _) -> np.ndarray:
    """Wanda's ``|weight| * ||activation||`` (arXiv 2306.11695), summed over a neuron's down row."""
    return activation_norm(layer) * layer["down_sum"]


def _fluctuation(layer: Layer, _) -> np.ndarray:
    """Variance of a neuron's activation times its squared down row (FLAP's WIFV, 2312.11983)."""
    count = layer["count"][:, None]
    variance = layer["neuron_m2"].astype(np.float64) / np.maximum(count - 1, 1)
    return variance * layer["down_norm"].astype(np.float64) ** 2


def _flap(layer: Layer, rng) -> np.ndarray:
    """Fluctuation standardised within each expert, so that experts' neurons compare."""
    values = _fluctuation(layer, rng)
    spread = values.std(-1, keepdims=True)
    return (values - values.mean(-1, keepdims=True)) / np.where(spread > 0, spread, 1)


NEURON_CRITERIA: dict[str, Criterion] = {
    "random_neurons": lambda layer, rng: rng.random(layer["weight_norm"].shape),
    "kd_topk": _importance("kd_topk"),
    "kd_full": _importance("kd_full"),
    "lm": _importance("lm"),
    # Diagonal of the empirical Fisher matrix in the mask: does not vanish at the teacher.
    "fisher": _importance("lm", "sequence_square"),
    "activation_norm": lambda layer, _: activation_norm(layer),
    "wanda": _wanda,
    "fluctuation": _fluctuation,
    "flap": _flap,
    "weight_norm": lambda layer, _: layer["weight_norm"],
}

# Of key/value groups. ``weight_norm`` is over the projections of a group's heads.
GROUP_CRITERIA: dict[str, Criterion] = {
    "random_groups": lambda layer, rng: rng.random(layer["weight_norm"].shape),
    **{name: NEURON_CRITERIA[name] for name in ("kd_topk", "kd_full", "lm", "fisher")},
    "weight_norm": lambda layer, _: layer["weight_norm"],
}
