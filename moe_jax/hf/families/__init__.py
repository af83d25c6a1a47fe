"""The families that are read and written: each module here holds one, as ``FAMILY``.

A new family is a new module; nothing else names it.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from moe_jax.hf.family import COMPRESSED_SUFFIX, Family

FAMILIES: dict[str, Family] = {
    name: importlib.import_module(f"{__name__}.{name}").FAMILY
    for _, name, _ in pkgutil.iter_modules(__path__)
}

_ALIASES = {alias: name for name, family in FAMILIES.items() for alias in family.aliases}


def find_family(model_type: Any) -> Family:
    """The family of ``model_type`` (with or without the suffix ``_compressed``).

    Raises:
        ValueError: there is none; the message lists those that exist.
    """
    base = str(model_type).removesuffix(COMPRESSED_SUFFIX)
    base = _ALIASES.get(base, base)
    if base not in FAMILIES:
        raise ValueError(f"model_type must be one of {sorted(FAMILIES)}, got {model_type!r}")
    return FAMILIES[base]
