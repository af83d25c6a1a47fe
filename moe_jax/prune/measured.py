"""Arrays of statistics that pruning takes, checked against the model that is pruned."""

from __future__ import annotations

import numpy as np

from moe_jax.statistics import Layers


def measured(
    layers: Layers | None, layer: int, name: str, shape: tuple[int, ...], need: str
) -> np.ndarray:
    """The array ``name`` of a layer, of this ``shape``.

    Raises:
        ValueError: there is none, and what ``need`` says needs it; or it is of another model.
    """
    arrays = (layers or {}).get(layer, {})
    if name not in arrays:
        raise ValueError(f"plan layer {layer}: {need} (there is no {name})")
    if arrays[name].shape != shape:
        raise ValueError(
            f"statistics of layer {layer} must be of this model, with {name} {shape}, got "
            f"{arrays[name].shape}"
        )
    return arrays[name]
