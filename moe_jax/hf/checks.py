"""Values of parsed JSON, checked where they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def typed(name: str, value: Any, kind: type) -> Any:
    """``value`` as ``kind`` (int, float or bool); integers pass as floats, booleans do not.

    Raises:
        ValueError: another type, or a float that is not finite.
    """
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return kind(value)


def object_at(parent: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The object under ``name``, empty if absent or null; raises ValueError for anything else."""
    value = parent.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a JSON object, got {value!r}")
    return value or {}


def list_at(parent: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    """The list of ``kind`` under ``name``, empty if absent or null; raises ValueError as above."""
    value = parent.get(name)
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{name} must be a list, got {value!r}")
    return [typed(f"each of {name}", entry, kind) for entry in value or []]
