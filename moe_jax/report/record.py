"""Reports on disk: checked, as strict JSON, page and model card, each written whole or not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.files import replacing_file
from moe_jax.report.elements import or_warning
from moe_jax.report.facts import Report, check_report
from moe_jax.report.html import report_html
from moe_jax.report.markdown import model_card

REPORT_JSON = "report.json"


def write_report(
    report: Mapping[str, Any], folder: str | Path, card_folder: str | Path | None = None
) -> dict[str, Path]:
    """Writes ``report.json``, ``report.html`` and the model card ``README.md``.

    Args:
        report: a ``Report``; numpy and JAX values are converted.
        folder: made if missing.
        card_folder: where the card goes, if not to ``folder``: the checkpoint's own.

    Returns:
        ``json``, ``html`` and ``card``: the paths of what could be made.

    Raises:
        ValueError: an unknown key, or a value that JSON cannot hold; nothing is written then.
    """
    checked = plain(report)
    check_report(checked)
    lost: list[str] = []  # told in the log
    texts = {
        "json": (folder, REPORT_JSON, json.dumps(checked, indent=1, allow_nan=False) + "\n"),
        "html": (folder, "report.html", or_warning(lambda: report_html(checked), "page", lost)),
        "card": (
            card_folder or folder,
            "README.md",
            or_warning(lambda: model_card(checked), "model card", lost),
        ),
    }
    paths = {}
    for kind, (place, name, text) in texts.items():
        if text is not None:
            paths[kind] = Path(place) / name
            # The card's folder is a finished checkpoint, where no half-written file may be met.
            with replacing_file(paths[kind], beside=Path(folder) / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return paths


def read_report(path: str | Path) -> Report:
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
        # NumPy knows no bfloat16: such arrays have the kind of raw bytes.
        return plain((array.astype(np.float64) if array.dtype.kind == "V" else array).tolist())
    raise ValueError(f"a report holds plain values only, got {type(value).__name__}: {value!r}")
