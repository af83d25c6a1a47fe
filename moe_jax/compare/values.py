"""Values of a comparison's fields: names and numbers, as files and command lines give them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_jax.settings import nearest


def pairs(raw: Any, where: str) -> dict[str, Any]:
    """A dict, or pairs where the order matters (a ConfigDict sorts the names of a dict).

    Raises:
        ValueError: neither of them, or a name twice.
    """
    if isinstance(raw, Mapping):
        return dict(raw)
    found = list(raw) if isinstance(raw, Sequence) and not isinstance(raw, str) else [raw]
    for pair in found:
        if not (isinstance(pair, Sequence) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ValueError(f"{where} must be a dict or pairs (name, value), got {pair!r}")
    if len({name for name, _ in found}) < len(found):
        raise ValueError(f"{where} must have different names, got {[name for name, _ in found]}")
    return dict(found)


def one_or_more(raw: Any, where: str) -> tuple[str, ...]:
    """One name or several, which may have commas; raises ValueError for none."""
    values = (raw,) if isinstance(raw, str) else raw
    if not isinstance(values, Sequence) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{where} must be names, got {raw!r}")
    if not values:
        raise ValueError(f"{where} must name at least one, got none")
    return tuple(values)


def comma_separated(raw: Any, where: str) -> tuple[str, ...]:
    """Names, also with commas between them, as a command line gives them."""
    names = one_or_more(raw, where) if raw else ()
    return tuple(part.strip() for name in names for part in name.split(",") if part.strip())


def integers(raw: Any, where: str) -> tuple[int, ...]:
    """One integer or several; raises ValueError for anything else, and for none."""
    values = (raw,) if isinstance(raw, int) else raw
    if not isinstance(values, Sequence) or not all(type(value) is int for value in values):
        raise ValueError(f"{where} must be integers, got {raw!r}")
    if not values:
        raise ValueError(f"{where} must hold at least one number, got none")
    return tuple(values)


def ratios(raw: Any, where: str) -> tuple[float, ...]:
    """One number in (0, 1] or several; raises ValueError for anything else, and for none."""
    values = (raw,) if isinstance(raw, (int, float)) else raw
    kinds = (int, float)
    if not isinstance(values, Sequence) or not values:
        raise ValueError(f"{where} must be numbers in (0, 1], got {raw!r}")
    for value in values:
        if type(value) not in kinds or not (0 < value <= 1 and math.isfinite(value)):
            raise ValueError(f"{where} must be in (0, 1], got {value!r}")
    return tuple(float(value) for value in values)


def check_known(names: Iterable[str], known: Mapping[str, Any], where: str) -> None:
    """Raises ValueError, with the nearest known name, for the first that is none."""
    for name in names:
        if name not in known:
            hint = nearest(name, known)
            raise ValueError(f"{where} must be among {tuple(known)}, got {name!r}{hint}")
