"""Task definitions of lm-evaluation-harness: its own, and a folder of others with local data."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.identity import digest, file_sha256

_DEFINITIONS = ("*.yaml", "*.py")


@dataclass(frozen=True)
class TaskSet:
    """Tasks to run.

    Attributes:
        names: of tasks, groups or tags.
        manager: the harness's ``TaskManager`` that knows them.
        sources: by name, a digest of the definition and local data; empty for the harness's own
            tasks, which its version stands for.
    """

    names: tuple[str, ...]
    manager: Any
    sources: dict[str, str]

    def only(self, name: str) -> TaskSet:
        """One of the names, with the manager that knows it."""
        return dataclasses.replace(self, names=(name,))


def find_tasks(names: Sequence[str], folder: str | Path = "", root: str | Path = "") -> TaskSet:
    """Looks tasks up, and finds the data files of those in ``folder``; loads no data yet.

    Args:
        names: tasks, groups or tags.
        folder: of further definitions (``*.yaml``), which go before the harness's own.
        root: where relative names in ``data_files`` of these definitions start; empty: at the
            definition itself. The definitions stay as they are, the names are completed in memory.

    Raises:
        ImportError: lm-evaluation-harness is not installed.
        FileNotFoundError: no such folder or data file.
        ValueError: no such task.
    """
    import moe_jax.evaluate.harness  # noqa: F401  one clear error if the harness is missing

    if not names:
        raise ValueError("tasks must name at least one task, got none")
    place = Path(folder).expanduser() if folder else None
    if place is not None and not place.is_dir():
        raise FileNotFoundError(f"no such folder of tasks: {place}")
    manager = _manager(names, place)
    known = manager.task_index
    for name in names:
        if name not in known:
            where = "lm-evaluation-harness" + (f" and {place}" if place else "")
            raise ValueError(f"no task, group or tag {name!r} in {where}")
    leaves = {name: list(_leaves(known, name, place)) for name in names}
    local = {leaf for parts in leaves.values() for leaf in parts}
    data = {leaf: [*map(file_sha256, _complete(known[leaf], root))] for leaf in sorted(local)}
    definitions = _content(place) if place and local else []
    sources = {
        name: digest(definitions, [data[leaf] for leaf in parts]) if parts else ""
        for name, parts in leaves.items()
    }
    return TaskSet(tuple(names), manager, sources)


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """Of the folder alone where that has all of ``names``: the harness's own are over 10,000."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        alone = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(alone.all_tasks):
            return alone
    return TaskManager(include_path=None if folder is None else str(folder))


def _leaves(known: dict[str, Any], name: str, folder: Path | None) -> Iterator[str]:
    """The tasks defined in ``folder`` that ``name`` stands for."""
    entry = known.get(name)
    if entry is None or folder is None:
        return
    if entry.kind.name == "TAG":
        members = sorted(entry.tags)
    elif entry.kind.name == "GROUP":
        listed = (entry.cfg or {}).get("task") or []
        members = [m if isinstance(m, str) else m.get("task", m.get("group")) for m in listed]
    else:
        members = []
        if folder in Path(entry.yaml_path).parents:
            yield name
    for member in members:
        if isinstance(member, str):
            yield from _leaves(known, member, folder)


def _complete(entry: Any, root: str | Path) -> list[Path]:
    """Makes relative data files of an entry absolute, in the index; all local data files of it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    options = (entry.cfg or {}).get("dataset_kwargs") or {}
    if "data_files" not in options:
        return []
    start = Path(root).expanduser() if root else Path(entry.yaml_path).parent
    files: list[Path] = []

    def complete(names: Any) -> Any:
        if isinstance(names, dict):
            return {split: complete(part) for split, part in names.items()}
        if isinstance(names, (list, tuple)):
            return [complete(part) for part in names]
        if "://" in names:
            return names
        path = (start / Path(names).expanduser()).absolute()
        matches = sorted(glob.glob(str(path)))
        if not matches:
            raise FileNotFoundError(f"task {entry.name!r}: no data file {path}; see tasks_root")
        files.extend(map(Path, matches))
        return str(path)

    data_files = complete(options["data_files"])
    # The index keeps functions as names; the harness resolves them when it reads the file, which
    # it does not do for an entry without one.
    entry.cfg = load_yaml(entry.yaml_path, resolve_func=True) | {
        "dataset_kwargs": {**options, "data_files": data_files}
    }
    entry.yaml_path = None
    return files


def _content(folder: Path) -> list[str]:
    """Definitions may include each other and call functions beside them: all of them count."""
    return [file_sha256(file) for pattern in _DEFINITIONS for file in sorted(folder.rglob(pattern))]
