"""A text model inside another: its facts under ``text_config``, its tensors under a prefix.

What else such a checkpoint holds, a vision tower above all, is no part of the model; exports carry
it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_jax.hf.checks import object_at

# By model_type: how the names of the text model's tensors begin.
_PREFIXES = {"kimi_k25": "language_model."}
_TEXT = "text_config"
_DTYPES = ("dtype", "torch_dtype")
_SCHEME = "quantization_config"


def text_prefix(hf: Mapping[str, Any]) -> str:
    """What stands before the tensors of the text model; empty where it is the whole."""
    return _PREFIXES.get(str(hf.get("model_type")), "")


def text_part(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` would be of the text model alone; of others it is the file's own."""
    if not text_prefix(hf):
        return dict(hf)
    shared = {name: hf[name] for name in (*_DTYPES, _SCHEME) if name in hf}
    return {**shared, **object_at(hf, _TEXT)}


def with_text_part(hf: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """``hf`` with another text part, and its dtype and packing."""
    before, shared = object_at(hf, _TEXT), (*_DTYPES, _SCHEME)
    outer = {name: value for name, value in hf.items() if name != _SCHEME or name in text}
    outer |= {name: text[name] for name in shared if name in hf and name in text}
    own = {n: v for n, v in text.items() if n in before or n not in shared}
    return {**outer, _TEXT: own}
