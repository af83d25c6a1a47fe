"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """A new sibling file to write, which takes the place of ``path`` when the block ends.

    A process killed at any moment leaves ``path`` as it was, and perhaps a hidden sibling, which
    the next call removes.

    Raises:
        OSError: writing failed, on a full disk say; the message names ``path``.
    """
    path = Path(path)
    prefix = f".{path.name}.writing-{socket.gethostname()}-"
    temporary = path.with_name(f"{prefix}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent, prefix)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise named(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def named(error: OSError, path: str | Path) -> OSError:
    """The same error with a file name: a failed write does not carry one by itself."""
    if error.filename is not None or error.errno is None:
        return error
    return OSError(error.errno, f"cannot write: {error.strerror}", str(path))


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` to ``path``, whole or not at all."""
    with replacing_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _remove_stale(folder: Path, prefix: str) -> None:
    for file in folder.iterdir():
        process = file.name.removeprefix(prefix)
        if process != file.name and process.isdecimal() and not _is_running(int(process)):
            file.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
