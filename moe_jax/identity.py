"""Digests: what names a result by all that it depends on."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

DIGITS = 16  # of names: enough to tell all that one folder will ever hold


def digest(*parts: Any) -> str:
    """Sixteen hex digits that stand for these JSON values."""
    return text_sha256(json.dumps(parts, sort_keys=True, default=str))[:DIGITS]


def checkpoint_digest(folder: Path) -> str:
    """Sha256 (16 hex digits) over the configuration and all weights of a checkpoint."""
    total = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        total.update(bytes.fromhex(file_sha256(file)))
    return total.hexdigest()[:DIGITS]


def text_sha256(text: str) -> str:
    """Sha256 (hex) of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(file: str | Path) -> str:
    """Sha256 (hex) of a file's content, which is read once as long as it does not change."""
    about = Path(file).stat()
    return _file_sha256(str(file), about.st_ino, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _file_sha256(file: str, *_: int) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
