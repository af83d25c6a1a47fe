"""Removal of whole layers: a block that hardly turns the residual stream."""

from __future__ import annotations

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.plan.schema import Plan
from moe_jax.statistics import Stats


def angular_plan(stats: Stats, config: ModelConfig, drop_layers: int) -> Plan:
    """Drops the block of consecutive layers over which the residual stream turns least.

    ``d(l, l + n)`` is the mean over all tokens of ``arccos(cos(x_l, x_{l+n})) / pi``, where ``x_l``
    is the stream before layer l ("The Unreasonable Ineffectiveness of the Deeper Layers", arXiv
    2403.17887; the paper takes the last token of each sequence). The block begins at
    the l that minimises it, the lowest of equal ones; it may end with the last layer.

    Args:
        stats: with ``stream["angular_distance"]`` ``[L + 1, L + 1]``, sums over ``tokens``.
        config: the model's, of L layers.
        drop_layers: n.

    Raises:
        ValueError: n out of bounds, or statistics without distances of this model.
    """
    check_drop_layers(config, drop_layers)
    depth = config.num_layers
    distance = stats.stream.get("angular_distance")
    if distance is None or distance.shape != (depth + 1, depth + 1):
        found = "none" if distance is None else list(distance.shape)
        raise ValueError(
            f"statistics must hold the stream's angular_distance [{depth + 1}, {depth + 1}] of "
            f"this model, got {found}; calibrate again"
        )
    turned = np.diagonal(np.asarray(distance, np.float64), drop_layers) / stats.tokens
    first = int(turned.argmin())
    settings = {"drop_layers": drop_layers, "angular_distance": turned.tolist()}
    return Plan({}, "angular", settings, tuple(range(first, first + drop_layers)))


def check_drop_layers(config: ModelConfig, drop_layers: int) -> None:
    """Raises ValueError unless dropping so many layers leaves at least one."""
    if not 1 <= drop_layers < config.num_layers:
        raise ValueError(f"drop_layers must be in [1, {config.num_layers}), got {drop_layers}")
