"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Ends the name of a folder that was moved aside for a new one.
SET_ASIDE = "-old"


@contextlib.contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """A new sibling file to write, which takes the place of ``path`` when the block ends.

    A process killed at any moment leaves ``path`` as it was, and perhaps a hidden sibling, which
    the next call removes.

    Raises:
        OSError: writing failed, on a full disk say; the message names ``path``.
    """
    path = Path(path)
    temporary = temporary_sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path)
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


def temporary_sibling(path: Path) -> Path:
    """Where this process writes what is to take the place of ``path``."""
    return path.with_name(f"{_prefix(path)}{os.getpid()}")


def remove_stale(path: Path) -> None:
    """Removes what killed processes of this host left of writing ``path``, a file or a folder.

    What was at ``path`` and had been moved aside for the new, under a name that ends in
    ``SET_ASIDE``, goes back if ``path`` is absent.
    """
    for sibling in list(path.parent.iterdir()):
        rest = sibling.name.removeprefix(_prefix(path))
        process = rest.removesuffix(SET_ASIDE)
        if rest == sibling.name or not process.isdecimal() or _is_another(int(process)):
            continue
        if process != rest and not path.exists():
            with contextlib.suppress(OSError):  # another process was faster
                sibling.rename(path)
        elif sibling.is_dir():
            shutil.rmtree(sibling, ignore_errors=True)
        else:
            sibling.unlink(missing_ok=True)


def _prefix(path: Path) -> str:
    return f".{path.name}.writing-{socket.gethostname()}-"


def _is_another(process: int) -> bool:
    """Whether it runs and is not this one, which in a container may have its predecessor's id."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
