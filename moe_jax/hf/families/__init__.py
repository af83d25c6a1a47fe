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

# Asked for, and not read yet: what is missing.
_MISSING = {
    "qwen3_next": "linear attention (Gated DeltaNet)",
    "qwen3_5_moe": "linear attention (Gated DeltaNet) and a nested text_config",
    "gemma4": "a dense branch beside the experts",
    "nemotron_h": "state-space layers and ungated experts",
    "deepseek_v4": "sparse attention and its own router function",
    "llama4": "a router applied to the input of the experts",
    "lfm2_moe": "convolution layers",
    "glm_moe_dsa": "sparse attention",
    "deepseek_v32": "sparse attention",
    "kimi_linear": "linear attention",
    "qwen3_vl_moe": "a text_config inside its own kind of vision model",
}
_ALIASES = {alias: name for name, family in FAMILIES.items() for alias in family.aliases}


def find_family(model_type: Any) -> Family:
    """The family of ``model_type`` (with or without the suffix ``_compressed``).

    Raises:
        ValueError: there is none; the message lists those that exist, and says what is missing for
            some that do not.
    """
    base = str(model_type).removesuffix(COMPRESSED_SUFFIX)
    base = _ALIASES.get(base, base)
    if missing := _MISSING.get(base.removesuffix("_text")):
        raise ValueError(
            f"model_type {base!r} is not read yet: it needs {missing}; those that are read: "
            f"{sorted(FAMILIES)}"
        )
    if base not in FAMILIES:
        raise ValueError(f"model_type must be one of {sorted(FAMILIES)}, got {model_type!r}")
    return FAMILIES[base]
