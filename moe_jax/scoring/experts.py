"""Criteria of experts: each a function of one layer's statistics, [E]."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moe_jax.scoring.neurons import importance
from moe_jax.scoring.reconstruction import reconstruction_scores

Layer = dict[str, np.ndarray]
Criterion = Callable[..., np.ndarray]


def _per_token(sums: np.ndarray, layer: Layer) -> np.ndarray:
    return sums / np.maximum(layer["count"], 1)


def _deviations(layer: Layer) -> np.ndarray:
    """Unbiased standard deviation of each output feature, [E, D]; 0 below two tokens."""
    count = layer["count"][:, None]
    return np.sqrt(layer["output_m2"].astype(np.float64) / np.maximum(count - 1, 1)) * (count > 1)


def output_deviation(layer: Layer) -> np.ndarray:
    """``sqrt(trace of the unbiased covariance)`` of each expert's output, [E]; 0 below 2 tokens."""
    return np.linalg.norm(_deviations(layer), axis=-1)


def _access_frequency(layer: Layer, frequency: str) -> np.ndarray:
    if frequency not in ("routing_mass", "mean_weight"):
        raise ValueError(f"frequency must be 'routing_mass' or 'mean_weight', got {frequency!r}")
    mass = layer["routing_mass"].astype(np.float64)
    return mass if frequency == "routing_mass" else _per_token(mass, layer)


def _mone(layer: Layer, _, frequency: str = "routing_mass") -> np.ndarray:
    """Output deviation times access frequency (MoNE, arXiv 2507.00390).

    ``frequency="routing_mass"`` sums the routing weights (what the authors' code ranks by);
    ``"mean_weight"`` divides the sum by the number of selections (the formula as printed).
    """
    return output_deviation(layer) * _access_frequency(layer, frequency)


def _mone_l1(layer: Layer, _, frequency: str = "routing_mass") -> np.ndarray:
    """MoNE with the sum of the features' deviations instead of their Euclidean norm."""
    return _deviations(layer).sum(-1) * _access_frequency(layer, frequency)


def _mone_cv(layer: Layer, _, frequency: str = "routing_mass") -> np.ndarray:
    """MoNE with each feature's variance relative to the magnitude of its mean.

    The 1e-6 under the fraction is that of the MoNE authors' ablation.
    """
    relative = _deviations(layer) ** 2 / (np.abs(layer["output_mean"].astype(np.float64)) + 1e-6)
    return np.linalg.norm(relative, axis=-1) * _access_frequency(layer, frequency)


def _mone_sum(layer: Layer, _, frequency: str = "routing_mass", share: float = 0.5) -> np.ndarray:
    """``share`` of the deviation and the rest of the frequency, each scaled to [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    deviation = _scaled(output_deviation(layer))
    return share * deviation + (1 - share) * _scaled(_access_frequency(layer, frequency))


def _scaled(values: np.ndarray) -> np.ndarray:
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else np.zeros_like(values)


def _mone_log_sum(layer: Layer, _, frequency: str = "routing_mass") -> np.ndarray:
    """Sum of the logarithms of ``1 + deviation`` and ``1 + frequency``.

    Without the ones this would rank as the product does.
    """
    deviation = output_deviation(layer)
    return np.log1p(deviation) + np.log1p(_access_frequency(layer, frequency))


def _reap_l2(layer: Layer, _) -> np.ndarray:
    """Root of the mean square of routing weight times output norm (REAP's quadratic form)."""
    return np.sqrt(_per_token(layer["gated_square"].astype(np.float64), layer))


def _taylor(loss: str, default: str = "batch_abs") -> Criterion:
    """First-order change of a loss if the whole expert's output is masked."""

    def criterion(layer: Layer, _, aggregation: str = default) -> np.ndarray:
        return importance(layer, loss, aggregation, "expert_")

    return criterion


EXPERT_CRITERIA: dict[str, Criterion] = {
    "random": lambda layer, rng: rng.random(layer["count"].shape[0]),
    # Selections per expert.
    "frequency": lambda layer, _: layer["count"],
    # Sum of routing weights (RS, "router score").
    "routing_mass": lambda layer, _: layer["routing_mass"],
    # Sum of the router's softmax over all tokens, chosen or not (SEER-MoE, arXiv 2404.05089).
    "soft_count": lambda layer, _: layer["soft_count"],
    "mean_weight": lambda layer, _: _access_frequency(layer, "mean_weight"),
    "mone": _mone,
    "mone_l1": _mone_l1,
    "mone_cv": _mone_cv,
    "mone_sum": _mone_sum,
    "mone_log_sum": _mone_log_sum,
    "output_deviation": lambda layer, _: output_deviation(layer),
    # Sum and mean of output norms over an expert's tokens (EAN, arXiv 2504.05586's baselines).
    "ean": lambda layer, _: layer["output_norm"],
    "ean_mean": lambda layer, _: _per_token(layer["output_norm"].astype(np.float64), layer),
    # Mean of routing weight times output norm over an expert's tokens (REAP, arXiv 2510.13999).
    "reap": lambda layer, _: _per_token(layer["gated_norm"], layer),
    "reap_l2": _reap_l2,
    "reconstruction": reconstruction_scores,
    "taylor_kd_topk": _taylor("kd_topk"),
    "taylor_kd_full": _taylor("kd_full"),
    "taylor_lm": _taylor("lm"),
    "taylor_fisher": _taylor("lm", "sequence_square"),
    # Norm of the router's row: needs no text.
    "router_norm": lambda layer, _: layer["router_norm"],
}
