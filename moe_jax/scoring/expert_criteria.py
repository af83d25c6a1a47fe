"""Criteria of experts: each a function of one layer's statistics, [E]."""

from __future__ import annotations

import numpy as np

from moe_jax.scoring.criterion import Criterion, Layer, Option, importance
from moe_jax.scoring.reconstruction import reconstruction_scores
from moe_jax.scoring.rerouting import REROUTED


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
    mass = layer["routing_mass"].astype(np.float64)
    return mass if frequency == "routing_mass" else _per_token(mass, layer)


def _mone(layer: Layer, _, frequency: str) -> np.ndarray:
    """Output deviation times access frequency (MoNE, arXiv 2507.00390).

    ``frequency="routing_mass"`` sums the routing weights (what the authors' code ranks by);
    ``"mean_weight"`` divides the sum by the number of selections (the formula as printed).
    """
    return output_deviation(layer) * _access_frequency(layer, frequency)


def _mone_l1(layer: Layer, _, frequency: str) -> np.ndarray:
    """MoNE with the sum of the features' deviations instead of their Euclidean norm."""
    return _deviations(layer).sum(-1) * _access_frequency(layer, frequency)


def _mone_cv(layer: Layer, _, frequency: str) -> np.ndarray:
    """MoNE with each feature's variance relative to the magnitude of its mean.

    The 1e-6 under the fraction is that of the MoNE authors' ablation.
    """
    relative = _deviations(layer) ** 2 / (np.abs(layer["output_mean"].astype(np.float64)) + 1e-6)
    return np.linalg.norm(relative, axis=-1) * _access_frequency(layer, frequency)


def _mone_sum(layer: Layer, _, frequency: str, share: float) -> np.ndarray:
    """``share`` of the deviation and the rest of the frequency, each scaled to [0, 1]."""
    deviation = _scaled(output_deviation(layer))
    return share * deviation + (1 - share) * _scaled(_access_frequency(layer, frequency))


def _scaled(values: np.ndarray) -> np.ndarray:
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else np.zeros_like(values)


def _mone_log_sum(layer: Layer, _, frequency: str) -> np.ndarray:
    """Sum of the logarithms of ``1 + deviation`` and ``1 + frequency``.

    Without the ones this would rank as the product does.
    """
    deviation = output_deviation(layer)
    return np.log1p(deviation) + np.log1p(_access_frequency(layer, frequency))


def _output_square(layer: Layer, _) -> np.ndarray:
    """Mean squared norm of an expert's output, without its routing weight."""
    mean = layer["output_mean"].astype(np.float64)
    deviations = layer["output_m2"].astype(np.float64).sum(-1)
    return _per_token(deviations, layer) + np.square(mean).sum(-1) * (layer["count"] > 0)


def _aimer(layer: Layer, _) -> np.ndarray:
    """``sum |w| / sqrt(N sum w^2)`` of an expert's N weights, up to a factor of the model's width.

    It is large where weights are alike in size. That high means needed is read off a third party's
    account, not off the paper.
    """
    norm = layer["weight_norm"].astype(np.float64)
    neurons = np.maximum((norm > 0).sum(-1), 1)
    squares = np.square(norm).sum(-1)
    total = layer["weight_sum"].astype(np.float64).sum(-1)
    return total / np.sqrt(np.maximum(neurons * squares, 1e-300))


def _mean_of(name: str, power: float = 1) -> Criterion:
    """A sum over an expert's tokens as their mean, to a power."""

    def function(layer: Layer, _) -> np.ndarray:
        return _per_token(layer[name].astype(np.float64), layer) ** power

    return Criterion(function, ("count", name))


def _sum_of(name: str) -> Criterion:
    return Criterion(lambda layer, _: layer[name], (name,))


_FREQUENCY = {"frequency": Option("routing_mass", ("routing_mass", "mean_weight"))}
_DEVIATION = ("count", "output_m2")
_MONE = (*_DEVIATION, "routing_mass")

EXPERTS: dict[str, Criterion] = {
    "random": Criterion(
        lambda layer, beside: beside.rng.random(layer["count"].shape[0]), ("count",), random=True
    ),
    # Selections per expert.
    "frequency": _sum_of("count"),
    # Sum of routing weights (RS, "router score").
    "routing_mass": _sum_of("routing_mass"),
    # Sum of the router's softmax over all tokens, chosen or not (SEER-MoE, arXiv 2404.05089).
    "soft_count": _sum_of("soft_count"),
    "mean_weight": _mean_of("routing_mass"),
    "mone": Criterion(_mone, _MONE, _FREQUENCY),
    "mone_l1": Criterion(_mone_l1, _MONE, _FREQUENCY, by_feature=True),
    "mone_cv": Criterion(_mone_cv, (*_MONE, "output_mean"), _FREQUENCY, by_feature=True),
    "mone_sum": Criterion(_mone_sum, _MONE, {**_FREQUENCY, "share": Option(0.5, bounds="[0, 1]")}),
    "mone_log_sum": Criterion(_mone_log_sum, _MONE, _FREQUENCY),
    "output_deviation": Criterion(lambda layer, _: output_deviation(layer), _DEVIATION),
    # Sum and mean of output norms over an expert's tokens (EAN, arXiv 2504.05586's baselines).
    "ean": _sum_of("output_norm"),
    "ean_mean": _mean_of("output_norm"),
    # Means over an expert's tokens of the norm and of its square, without routing weights
    # (MAN and MSAN, arXiv 2606.15716; MAN is ``ean_mean`` under its own name).
    "man": _mean_of("output_norm"),
    "msan": Criterion(_output_square, ("count", "output_mean", "output_m2"), by_feature=True),
    # Mean of routing weight times output norm over an expert's tokens (REAP, arXiv 2510.13999).
    "reap": _mean_of("gated_norm"),
    # Root of the mean of its square (REAP's quadratic form).
    "reap_l2": _mean_of("gated_square", 0.5),
    "reconstruction": Criterion(
        reconstruction_scores, ("output_gram",), {"keep": Option(None, kind=int, bounds=">= 0")}
    ),
    "taylor_kd_topk": importance("kd_topk", "expert_"),
    "taylor_kd_full": importance("kd_full", "expert_"),
    "taylor_lm": importance("lm", "expert_"),
    "taylor_fisher": importance("lm", "expert_", "sequence_square"),
    # Token by token; what other experts do in its place is not counted (see "rerouted").
    "taylor_token_fisher": importance("lm", "expert_", "token_square"),
    # Removal one after the other, with what the tokens' next experts do in their place.
    "rerouted": REROUTED,
    # From the weights alone (AIMER, arXiv 2603.18492).
    "aimer": Criterion(_aimer, ("weight_norm", "weight_sum")),
    # Norm of the router's row: needs no text.
    "router_norm": _sum_of("router_norm"),
}
