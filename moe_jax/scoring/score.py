"""``score``: one criterion over all layers, and the table of all criteria."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.processes import gather
from moe_jax.scoring.criterion import Beside, Criterion, Option
from moe_jax.scoring.expert_criteria import EXPERTS
from moe_jax.scoring.neuron_criteria import KV_GROUPS, NEURONS
from moe_jax.scoring.second_order import KV_GROUPS_WITH_WEIGHTS, NEURONS_WITH_WEIGHTS
from moe_jax.settings import check_choice
from moe_jax.statistics import Stats
from moe_jax.statistics_table import of_shared

# By what they rank.
CRITERIA: dict[str, dict[str, Criterion]] = {
    "experts": EXPERTS,
    "neurons": NEURONS | NEURONS_WITH_WEIGHTS,
    "kv_groups": KV_GROUPS | KV_GROUPS_WITH_WEIGHTS,
}


def score(
    stats: Stats,
    method: str,
    *,
    of: str = "experts",
    seed: int = 0,
    model: tuple[dict[str, Any] | None, ModelConfig] | None = None,
    **options: Any,
) -> dict[int, np.ndarray]:
    """Scores layers by one criterion.

    Args:
        stats: what ``calibrate`` returned.
        method: a name in ``CRITERIA``: of ``experts`` (scores ``[E]``), of ``neurons``
            (``[E, F]``), or with ``of="attention"`` of ``kv_groups`` (``[G]``).
        of: ``experts`` scores the layers that have some, or their neurons; ``shared`` the neurons
            ``[U]`` of each layer's shared expert; ``attention`` the key/value groups of all layers.
        seed: of the random criteria.
        model: ``(params, config)`` of the model that was measured, for criteria that need it;
            some need the configuration alone.
        options: of the criterion, see its row.

    Returns:
        By layer index, float64 scores. An expert that no token reached scores 0, or with the
        lowest of its layer where scores may be negative.

    Raises:
        ValueError: unknown criterion or option, statistics that lack what it needs, or importance
            that is zero everywhere (with the reason).
    """
    known = _known(of)
    check_choice("method", method, sorted(known))
    criterion = known[method]
    options = criterion.filled(method, options)
    if criterion.weights and (model is None or model[0] is None):
        raise ValueError(f"{method!r} needs the weights: pass model=(params, config)")
    layers = stats.attention if of == "attention" else stats.layers
    if of == "shared":
        layers = {i: own for i, layer in layers.items() if (own := of_shared(layer))}
    if not layers:
        raise ValueError(f"these statistics cover no {of}; calibrate again")
    rng = np.random.default_rng(seed)
    params, config = model or (None, None)
    scores = {}
    for i, layer in sorted(layers.items()):
        beside = Beside(rng, i, params, config, of == "shared")
        criterion.check(method, layer, beside, options)
        values = gather(criterion.function(layer, beside, **options)).astype(np.float64)
        if of != "attention":
            values = with_lowest(values, layer["count"])
        if not np.isfinite(values).all():
            raise ValueError(f"{method} scores of layer {i} hold a NaN or infinity")
        scores[i] = values[0] if of == "shared" else values
    _refuse_zeros(scores, method)
    return scores


def criterion_options(method: str, of: str = "experts") -> Mapping[str, Option]:
    """Options that ``score`` takes for a method, by name; none where it is no criterion."""
    criterion = _known(of).get(method)
    return {} if criterion is None else criterion.options


def _known(of: str) -> dict[str, Criterion]:
    check_choice("of", of, ("experts", "shared", "attention"))
    if of == "experts":
        return EXPERTS | CRITERIA["neurons"]
    return CRITERIA["kv_groups" if of == "attention" else "neurons"]


def with_lowest(values: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Scores where experts without a token come last: nothing is known of them, so they go first.

    Args:
        values: ``[E]`` or ``[E, F]``.
        count: tokens of each expert.
    """
    reached = (count > 0).reshape(-1, *[1] * (values.ndim - 1))
    return np.where(reached, values, min(0.0, values.min()))


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
