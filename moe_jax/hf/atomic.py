"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from moe_jax.files import SET_ASIDE, remove_stale, temporary_sibling

# Written into every folder of ours; a folder without it is never overwritten.
MARKER = "moe_jax.json"

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_output_folder(path: str | Path) -> Path:
    """The path, if something may be written there: absent, empty, or an earlier export of ours.

    Raises:
        FileExistsError: a file, or a folder with other content.
    """
    path = Path(path).expanduser().absolute()
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise FileExistsError(f"output must be a folder, got the file or link {path}")
    if path.exists() and any(path.iterdir()) and not (path / MARKER).exists():
        raise FileExistsError(
            f"output must be empty or an earlier export ({MARKER} inside), got {path}"
        )
    return path


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A new sibling folder to fill, which takes the place of ``path`` when the block ends.

    A process killed at any moment leaves ``path`` as it was, and perhaps a hidden sibling, which
    the next call removes. Files are synced before the exchange, which is one system call on
    Linux; elsewhere two renames: a process killed between them leaves ``path`` absent until the
    next call puts it back.

    Raises:
        FileExistsError: see ``check_output_folder``.
    """
    path = check_output_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path)
    temporary = temporary_sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        check_output_folder(path)
        _replace(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(new: Path, path: Path) -> None:
    """Puts ``new`` in the place of ``path``; what was there, if anything, ends up at ``new``."""
    if not path.exists():
        new.rename(path)
        return
    if _exchange(new, path):
        return
    old = new.with_name(f"{new.name}{SET_ASIDE}")
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two folders in one system call; False where that does not exist."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    arguments = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return call(*arguments) == 0
