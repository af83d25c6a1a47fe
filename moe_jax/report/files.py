"""Reports on disk: checked, as strict JSON, page and model card, each written whole or not."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.report.card import model_card
from moe_jax.report.page import report_html

REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
MODEL_CARD = "README.md"

_REPORT_KEYS = (
    "name",
    "source",
    "output",
    "command",
    "environment",
    "seed",
    "config",
    "data",
    "seconds",
    "peak_memory_mib",
    "before",
    "after",
    "stages",
    "routing_by_domain",
    "loader",
    "warnings",
)
_MODEL_KEYS = ("parameters", "bytes", "evaluation")
_STAGE_KEYS = (
    "method",
    "settings",
    "kept",
    "layers",
    "dropped_layers",
    "parameters",
    "confidence",
    "training",
    "evaluation",
)
_TRAINING_KEYS = ("settings", "steps", "tokens", "tokens_per_second", "metrics")
_CONFIDENCE_KEYS = ("verdict", "coverage", "convergence", "unsure")
_METRICS_KEYS = ("step", "loss", "distill", "lm", "hidden", "router", "balance", "learning_rate")
_STAGE_EVALUATION_KEYS = ("cut", "trained")
_LAYER_KEYS = (
    "layer",
    "num_experts",
    "count",
    "routing_mass",
    "variance",
    "score",
    "removed",
    "novices",
    "merged",
    "expert_width",
    "widths",
    "kv_groups",
    "unreached",
    "fewer_tokens_than_neurons",
    "importance",
)
_ROUTING_KEYS = ("layer", "frequency", "removed", "novices", "merged")
_BEFORE_AND_AFTER = ("expert_width", "kv_groups")
_PER_EXPERT = ("count", "routing_mass", "variance", "score", "widths")


def write_report(
    report: Mapping[str, Any], folder: str | Path, card_folder: str | Path | None = None
) -> dict[str, Path]:
    """Writes ``report.json``, ``report.html`` and the model card ``README.md``.

    Args:
        report: see ``moe_jax.report``; numpy and JAX values are converted.
        folder: made if missing.
        card_folder: where the card goes, if not to ``folder``: the checkpoint's own.

    Returns:
        ``json``, ``html`` and ``card``: the paths.

    Raises:
        ValueError: an unknown key, or a value that JSON cannot hold; nothing is written then.
    """
    checked = plain(report)
    check_report(checked)
    contents = {
        "json": (folder, REPORT_JSON, json.dumps(checked, indent=1, allow_nan=False) + "\n"),
        "html": (folder, REPORT_HTML, report_html(checked)),
        "card": (card_folder or folder, MODEL_CARD, model_card(checked)),
    }
    paths = {}
    for kind, (place, name, text) in contents.items():
        path = paths[kind] = Path(place) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    return paths


def read_report(path: str | Path) -> dict[str, Any]:
    """Reads a ``report.json``, or the one in a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: broken JSON or unknown keys.
    """
    file = Path(path)
    file = file / REPORT_JSON if file.is_dir() else file
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} must be JSON: {error}") from error
    check_report(report)
    return report


def check_report(report: Mapping[str, Any]) -> None:
    """Raises ValueError, naming place and nearest key, if ``report`` does not fit the schema."""
    _check_keys(report, _REPORT_KEYS, "report")
    for name in ("before", "after"):
        _check_keys(report.get(name) or {}, _MODEL_KEYS, name)
    for n, stage in enumerate(report.get("stages") or ()):
        _check_stage(stage, f"stages[{n}]")
    for i, layer in enumerate(report.get("routing_by_domain") or ()):
        place = f"routing_by_domain[{i}]"
        _check_keys(layer, _ROUTING_KEYS, place, required=("layer",))


def _check_stage(stage: Mapping[str, Any], place: str) -> None:
    _check_keys(stage, _STAGE_KEYS, place)
    for i, layer in enumerate(stage.get("layers") or ()):
        _check_layer(layer, f"{place}.layers[{i}]")
    _check_keys(stage.get("evaluation") or {}, _STAGE_EVALUATION_KEYS, f"{place}.evaluation")
    _check_keys(stage.get("confidence") or {}, _CONFIDENCE_KEYS, f"{place}.confidence")
    training = stage.get("training") or {}
    _check_keys(training, _TRAINING_KEYS, f"{place}.training")
    for i, record in enumerate(training.get("metrics") or ()):
        where = f"{place}.training.metrics[{i}]"
        _check_keys(record, _METRICS_KEYS, where, required=("step",))


def _check_layer(layer: Mapping[str, Any], place: str) -> None:
    _check_keys(layer, _LAYER_KEYS, place, required=("layer",))
    lengths = {key: len(layer[key]) for key in _PER_EXPERT if layer.get(key) is not None}
    if "num_experts" in layer:
        lengths["num_experts"] = layer["num_experts"]
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{place} must have one number of experts, got {lengths}")
    for key in _BEFORE_AND_AFTER:
        if layer.get(key) is not None and len(layer[key]) != 2:
            raise ValueError(f"{place}.{key} must be [before, after], got {layer[key]}")


def _check_keys(
    found: Any, known: tuple[str, ...], place: str, required: Iterable[str] = ()
) -> None:
    if not isinstance(found, Mapping):
        raise ValueError(f"{place} must be a dict, got {type(found).__name__}")
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0)[0]
            raise ValueError(f"{place} has an unknown key {key!r}; did you mean {near!r}?")
    for key in required:
        if key not in found:
            raise ValueError(f"{place} must have the key {key!r}, got {sorted(found)}")


def plain(value: Any) -> Any:
    """``value`` as what JSON holds: arrays to lists, paths to strings, NaN and infinity to None.

    Raises:
        ValueError: something without a plain form.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [plain(item) for item in items]
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        return plain(
            array.astype(np.float64).tolist() if array.dtype.kind == "V" else array.tolist()
        )
    raise ValueError(f"a report holds plain values only, got {type(value).__name__}: {value!r}")
