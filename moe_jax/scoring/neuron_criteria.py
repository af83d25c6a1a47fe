"""Criteria of neurons, [E, F], and of key/value groups, [G], from statistics alone."""

from __future__ import annotations

import numpy as np

from moe_jax.scoring.criterion import Criterion, Layer, Option, importance


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


def _flap(layer: Layer, beside) -> np.ndarray:
    """Fluctuation standardised within each expert, so that experts' neurons compare.

    It may be negative: FLAP ranks by it, and its zero means nothing.
    """
    values = _fluctuation(layer, beside)
    spread = values.std(-1, keepdims=True)
    return (values - values.mean(-1, keepdims=True)) / np.where(spread > 0, spread, 1)


def _camera(layer: Layer, _, alpha: float) -> np.ndarray:
    """CAMERA-P (arXiv 2508.02322): ``||w_j||^2 ((1-a) sum (g h)^2 + a max (g h)^2)``.

    ``w_j`` is the neuron's down row, g the routing weight. The maximum keeps a neuron that few
    tokens use strongly. The authors rank all neurons of a layer together (``neuron_scope="layer"``)
    with a = 0.9; a = 0 is ``energy`` without its second moments.
    """
    energy, peak = (layer[name].astype(np.float64) for name in ("gated_energy", "gated_peak"))
    return layer["down_norm"].astype(np.float64) ** 2 * ((1 - alpha) * energy + alpha * peak**2)


def _heapr(layer: Layer, _, over: str) -> np.ndarray:
    """HEAPr (arXiv 2509.22299): ``mean(h_j^2) w_j' C w_j`` over an expert's own tokens.

    C is the mean of ``d d'``, with d the loss's gradient in the expert's output, so that
    ``w_j' C w_j`` is the mean square of the loss's gradient in ``h_j``: two sums a neuron and no
    [D, D] matrix. As published a rare expert's neurons weigh as much as a busy one's;
    ``over="tokens"`` multiplies by the expert's tokens, which the expansion of the loss asks for.
    The authors rank all layers together, or each by itself.
    """
    count = np.maximum(layer["count"], 1)[:, None].astype(np.float64)
    hidden = activation_norm(layer) ** 2 / count
    score = hidden * layer["lm.gradient_square"].astype(np.float64) / count
    return score * count if over == "tokens" else score


def _random(layer: Layer, beside) -> np.ndarray:
    return beside.rng.random(layer["weight_norm"].shape)


def _weight_norm(layer: Layer, _) -> np.ndarray:
    return layer["weight_norm"]


_MOMENTS = ("count", "neuron_mean", "neuron_m2")
_VARIANCE = ("count", "neuron_m2", "down_norm")

NEURONS: dict[str, Criterion] = {
    "random_neurons": Criterion(_random, ("weight_norm",), random=True),
    "kd_topk": importance("kd_topk"),
    "kd_full": importance("kd_full"),
    "lm": importance("lm"),
    # Diagonal of the empirical Fisher matrix in the mask: does not vanish at the teacher.
    "fisher": importance("lm", default="sequence_square"),
    # The same matrix token by token, (g h_j w_j . dL/dy)^2 summed: what a neuron's removal costs in
    # the loss, to second order. Ranked within an expert it is Fisher-MoE's criterion.
    "token_fisher": importance("lm", default="token_square"),
    "activation_norm": Criterion(lambda layer, _: activation_norm(layer), _MOMENTS),
    "wanda": Criterion(_wanda, (*_MOMENTS, "down_sum")),
    "fluctuation": Criterion(_fluctuation, _VARIANCE),
    "flap": Criterion(_flap, _VARIANCE),
    "camera": Criterion(
        _camera,
        ("gated_energy", "gated_peak", "down_norm"),
        {"alpha": Option(0.9, bounds="[0, 1]")},
    ),
    "heapr": Criterion(
        _heapr,
        (*_MOMENTS, "lm.gradient_square"),
        {"over": Option("mean", ("mean", "tokens"))},
    ),
    "weight_norm": Criterion(_weight_norm, ("weight_norm",)),
}

KV_GROUPS: dict[str, Criterion] = {
    "random_groups": Criterion(_random, ("weight_norm",), part="attention", random=True),
    "kd_topk": importance("kd_topk", part="attention"),
    "kd_full": importance("kd_full", part="attention"),
    "lm": importance("lm", part="attention"),
    "fisher": importance("lm", default="sequence_square", part="attention"),
    "token_fisher": importance("lm", default="token_square", part="attention"),
    # Over the projections of a group's heads.
    "weight_norm": Criterion(_weight_norm, ("weight_norm",), part="attention"),
}
