"""Files and folders that appear whole or not at all, and that one process at a time writes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Written into every folder of ours; a folder without it is never overwritten.
MARKER = "moe_jax.json"

LOCK = ".lock"
_SET_ASIDE = "-old"  # ends the name of a folder that was moved aside for a new one
_VOLUME_FOLDER = "lost+found"  # what an empty ext4 volume holds
_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing_file(path: str | Path, beside: str | Path | None = None) -> Iterator[Path]:
    """A new file to write, which takes the place of ``path`` when the block ends.

    A process killed at any moment leaves ``path`` as it was, and perhaps a hidden file, which the
    next call removes.

    Args:
        beside: another path, whose hidden sibling is written if that is the same file system, for
            a folder in which readers may look at any time; None: ``path`` itself.

    Raises:
        OSError: writing failed, on a full disk say; the message names ``path``.
    """
    path = Path(path)
    beside = path if beside is None else Path(beside)
    for parent in (path.parent, beside.parent):
        parent.mkdir(parents=True, exist_ok=True)
    if path.parent.stat().st_dev != beside.parent.stat().st_dev:
        beside = path  # a rename does not reach another file system
    temporary = temporary_sibling(beside)
    try:
        remove_stale(beside)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise named(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` to ``path``, whole or not at all."""
    with replacing_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing_folder(path: str | Path, nbytes: int = 0) -> Iterator[Path]:
    """A new folder to fill, which takes the place of ``path`` when the block ends.

    A process killed at any moment leaves ``path`` as it was, or, between the two renames, absent
    until the next call puts it back. A folder that cannot be renamed, such as a volume of a
    container, is filled in place: its configuration goes first and comes last, so that it never
    looks finished while it is not.

    Args:
        nbytes: that will be written at least.

    Raises:
        FileExistsError: see ``check_output_folder``.
        OSError: too little space for ``nbytes``, or writing failed; the message names ``path``.
    """
    path = check_output_folder(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path)
        check_space(path, nbytes)
        in_place = not _can_be_renamed(path)
        inside = path / path.name
        if in_place:
            remove_stale(inside)
        temporary = temporary_sibling(inside if in_place else path)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                _sync(file)
            _sync(temporary)
            check_output_folder(path)
            (_fill if in_place else _replace)(temporary, path)
            _sync(path if in_place else path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise named(error, path, nbytes) from error


def check_output_folder(path: str | Path) -> Path:
    """The path, if something may be written there: absent, empty, or an earlier export of ours.

    Raises:
        FileExistsError: a file, or a folder with other content.
    """
    path = Path(path).expanduser().absolute()
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise FileExistsError(f"output must be a folder, got the file or link {path}")
    names = {file.name for file in path.iterdir()} if path.exists() else set()
    own = (_VOLUME_FOLDER, LOCK)
    foreign = any(name not in own and not name.startswith(_writing(path)) for name in names)
    if foreign and MARKER not in names:
        raise FileExistsError(
            f"output must be empty or an earlier export ({MARKER} inside), got {path}"
        )
    return path


def check_apart(source: str | Path, target: str | Path) -> None:
    """Raises ValueError if writing ``target`` would change ``source``.

    They are the same, or one lies in the other, by whatever links or spelling: what counts is which
    folders the file system says they are. Neither needs to exist.
    """
    first, second = (Path(path).expanduser().resolve() for path in (source, target))
    for inner, outer in ((first, second), (second, first)):
        if any(_is_same(folder, outer) for folder in (inner, *inner.parents)):
            raise ValueError(
                f"output must lie apart from what is read, or that would change: got {target} and "
                f"{source}"
            )


def check_space(path: str | Path, nbytes: int) -> None:
    """Raises OSError if fewer than ``nbytes`` are free where ``path`` is, or is to be."""
    if (free := free_bytes(Path(path))) < nbytes:
        message = f"{nbytes:,} bytes are needed, {free:,} are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {message}", str(path))


def free_bytes(path: Path) -> int:
    """Bytes that are free where ``path`` is, or is to be."""
    place = path.expanduser().absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


@contextlib.contextmanager
def locked(file: str | Path, what: str | Path) -> Iterator[None]:
    """Keeps other processes from ``what`` while the block runs, by a lock on ``file``.

    The operating system holds the lock, so that it ends with the process, however that ends.
    Folders that are made for ``file`` go again if nothing else was put there.

    Raises:
        BlockingIOError: another process holds it; the message says which, and since when.
    """
    file = Path(file).expanduser()
    made = [folder for folder in file.parents if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = _lock(file, what)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def named(error: OSError, path: str | Path, nbytes: int = 0) -> OSError:
    """The same error with a file name, which a failed write does not carry by itself."""
    if error.filename is not None or error.errno is None:
        return error
    message = f"cannot write: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        needed = f"{nbytes:,} bytes are needed, " if nbytes else ""
        message += f" ({needed}{free_bytes(Path(path)):,} are free)"
    return OSError(error.errno, message, str(path))


def temporary_sibling(path: Path) -> Path:
    """Where this process writes what is to take the place of ``path``."""
    return path.with_name(f"{_writing(path)}{socket.gethostname()}-{os.getpid()}")


def remove_stale(path: Path) -> None:
    """Removes what killed processes of this host left of writing ``path``, a file or a folder.

    A folder that had been moved aside for a new one goes back if ``path`` is absent.
    """
    prefix = f"{_writing(path)}{socket.gethostname()}-"
    for sibling in list(path.parent.iterdir()):
        rest = sibling.name.removeprefix(prefix)
        process = rest.removesuffix(_SET_ASIDE)
        if rest == sibling.name or not process.isdecimal() or _is_another(int(process)):
            continue
        if process != rest and not path.exists():
            with contextlib.suppress(OSError):  # another process was faster
                sibling.rename(path)
        else:
            _remove(sibling)


def _writing(path: Path) -> str:
    return f".{path.name}.writing-"


def _is_another(process: int) -> bool:
    """Whether it runs and is not this one, which in a container may have its predecessor's id."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return process != os.getpid()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _can_be_renamed(path: Path) -> bool:
    """Tried out: nothing else tells a bind mount, or a folder of an image's lower layer."""
    if not path.exists():
        return True
    aside = _aside(path)
    try:
        path.rename(aside)
    except OSError:
        return False
    aside.rename(path)
    return True


def _aside(path: Path) -> Path:
    sibling = temporary_sibling(path)
    return sibling.with_name(sibling.name + _SET_ASIDE)


def _replace(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    old = _aside(path)
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    _remove(old)


def _fill(new: Path, path: Path) -> None:
    """Moves the content of ``new``, which lies in ``path``, there, in the place of what was."""
    for file in sorted(path.iterdir(), key=lambda file: not _is_config(file)):
        if file != new and file.name not in (MARKER, LOCK, _VOLUME_FOLDER):
            _remove(file)
    # The marker comes first: the folder of a process killed from here on is still known as ours.
    for file in sorted(new.iterdir(), key=lambda file: (file.name != MARKER, _is_config(file))):
        file.replace(path / file.name)


def _is_config(file: Path) -> bool:
    return file.name.endswith("config.json")


def _is_same(first: Path, second: Path) -> bool:
    try:
        return first == second or first.samefile(second)
    except OSError:  # one is absent
        return False


def _lock(file: Path, what: str | Path) -> int:
    """An open descriptor that holds the lock on ``file``, which says whose it is."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip()
            os.close(descriptor)
            raise BlockingIOError(
                f"{what} is in use by another run ({holder or 'just started'}); wait for it, stop "
                "it, or name another output"
            ) from None
        except OSError as error:  # some network file systems know no locks
            _logger.warning("%s: cannot be locked: %s", file, error.strerror)
        # The one who held it may have removed the name meanwhile: then the lock is worth nothing.
        if _names(file, descriptor):
            since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            os.ftruncate(descriptor, 0)
            text = f"process {os.getpid()} on {socket.gethostname()}, since {since}\n"
            os.write(descriptor, text.encode())
            return descriptor
        os.close(descriptor)


def _names(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
