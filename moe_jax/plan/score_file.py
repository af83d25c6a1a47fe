"""Scores on disk, for other tools: a NumPy archive or JSON."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.files import replacing_file, write_json

SUFFIXES = (".npz", ".json")
_FORMAT = "moe_jax.scores"
_ABOUT = "about"
_PARTS = ("experts", "groups", "shared")
_DAMAGE = (AttributeError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile)


@dataclass(frozen=True)
class SavedScores:
    """What ranked a model's parts.

    Attributes:
        experts: by layer index, scores of experts ``[E]`` or of their neurons ``[E, F]``.
        groups: by layer index, scores of key/value groups ``[G]``.
        shared: by layer index, scores of shared experts' neurons ``[U]``.
        about: criteria, options, seed, and where the statistics came from.
    """

    experts: Mapping[int, np.ndarray] = field(default_factory=dict)
    groups: Mapping[int, np.ndarray] = field(default_factory=dict)
    shared: Mapping[int, np.ndarray] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Writes ``path``, whole or not at all.

        An archive holds an array for each layer, such as ``experts/3``, and ``about``, JSON in
        bytes. JSON holds the same under the names of the fields, layers as text.

        Raises:
            ValueError: a name that ends neither in ``.npz`` nor in ``.json``.
            OSError: the file cannot be written.
        """
        path = check_name(path)
        about = {**self.about, "format": _FORMAT}
        if path.suffix == ".json":
            lists = {
                part: {str(i): values.tolist() for i, values in getattr(self, part).items()}
                for part in _PARTS
            }
            write_json(path, {_ABOUT: about, **lists})
            return
        arrays = {
            f"{part}/{i}": values for part in _PARTS for i, values in getattr(self, part).items()
        }
        arrays[_ABOUT] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        with replacing_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> SavedScores:
        """Reads what ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no scores.
        """
        path = check_name(path)
        try:
            about, parts = _read_json(path) if path.suffix == ".json" else _read_archive(path)
            if about.pop("format") != _FORMAT:
                raise ValueError(f"format must be {_FORMAT!r}")
        except _DAMAGE as error:
            raise ValueError(f"{path} holds no scores: {error}") from error
        return cls(**parts, about=about)


def check_name(path: str | Path) -> Path:
    """``path``; raises ValueError if its suffix says neither of the two formats."""
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise ValueError(f"scores must be a file that ends in one of {SUFFIXES}, got {path}")
    return path


def _read_json(path: Path) -> tuple[dict[str, Any], dict[str, dict[int, np.ndarray]]]:
    raw = json.loads(path.read_text(encoding="utf-8"))
    parts = {
        part: {int(i): np.array(values, np.float64) for i, values in raw.get(part, {}).items()}
        for part in _PARTS
    }
    return dict(raw[_ABOUT]), parts


def _read_archive(path: Path) -> tuple[dict[str, Any], dict[str, dict[int, np.ndarray]]]:
    parts: dict[str, dict[int, np.ndarray]] = {part: {} for part in _PARTS}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            if key != _ABOUT:
                part, layer = key.split("/")
                parts[part][int(layer)] = arrays[key]
        return json.loads(arrays[_ABOUT].tobytes()), parts
