"""Dataclasses from configuration mappings: names and kinds of values are checked."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Kinds of value by annotation; sections and file names are checked apart.
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "Replacement": (str,),
    "bool": (bool,),
    "bool | None": (bool, type(None)),
    "int": (int,),
    "float": (float, int),
    "int | None": (int, type(None)),
    "float | None": (float, int, type(None)),
}


def mapping(raw: Any, where: str) -> Mapping[str, Any]:
    """``raw``, or an empty mapping for None; raises ValueError for anything else."""
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where} must be a dict, got {raw!r}")
    return raw


def section(kind: type, raw: Any, where: str) -> Any:
    """An instance of the dataclass ``kind`` from a mapping.

    Its field ``files``, if it has one, may be one text, and names in it several with commas
    between, as a command line gives them.

    Raises:
        ValueError: an unknown field, with the nearest known one, or a value of the wrong kind.
    """
    values = dict(mapping(raw, where))
    if "files" in values:
        values["files"] = _file_names(values["files"], kind, where)
    check_fields(kind, values, f"{where}.")
    return kind(**values)


def _file_names(files: Any, kind: type, where: str) -> Any:
    """Names as a tuple, or names with weights where the field takes them."""
    annotation = next(str(f.type) for f in dataclasses.fields(kind) if f.name == "files")
    if isinstance(files, Mapping) and "Mapping" in annotation:
        return dict(files)
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, Sequence) or not all(isinstance(name, str) for name in files):
        raise ValueError(f"{where}.files must be names of files, got {files!r}")
    parts = (part.strip() for name in files for part in name.split(","))
    return tuple(filter(None, parts))


def check_fields(kind: type, values: Mapping[str, Any], prefix: str) -> None:
    """Raises ValueError for a name or a kind of value that the dataclass ``kind`` does not have."""
    fields = {f.name: str(f.type) for f in dataclasses.fields(kind)}
    check_names(values, list(fields), prefix)
    for name, value in values.items():
        kinds = _KINDS.get(fields[name])
        if kinds and (type(value) not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{prefix}{name} must be {wanted}, got {value!r}")


def check_names(values: Mapping[str, Any], known: Sequence[str], prefix: str = "") -> None:
    """Raises ValueError, with the nearest known name, if ``values`` has another."""
    for name in values:
        if name not in known:
            raise ValueError(
                f"unknown configuration field {prefix}{name}{nearest(name, known)}; "
                f"known: {', '.join(known)}"
            )


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error's message, or nothing if no known name is similar."""
    match = difflib.get_close_matches(name, list(known), 1, 0.4)
    return f" (did you mean {match[0]!r}?)" if match else ""
