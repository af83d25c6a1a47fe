"""Files and folders that appear whole or not at all, stay apart, and have one writer at a time."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from moe_jax.files import (
    MARKER,
    check_apart,
    check_space,
    locked,
    replacing_file,
    replacing_folder,
    write_json,
)

HERE = Path(__file__).parent


def test_a_failed_write_keeps_the_old_file_and_names_it(tmp_path):
    file = tmp_path / "folder" / "value.json"
    write_json(file, [1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match="cannot write") as raised:
            write_json(file, list(range(2000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.filename == str(file)
    assert json.loads(file.read_text()) == [1]
    assert [f.name for f in file.parent.iterdir()] == ["value.json"]


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    with replacing_file(tmp_path / "a") as temporary:
        temporary.write_text("new")
        stale = Path(str(temporary).replace(str(os.getpid()), str(killed.pid)))
    stale.write_text("half")
    with replacing_file(tmp_path / "a") as temporary:
        temporary.write_text("newer")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_the_half_written_file_may_lie_elsewhere(tmp_path):
    with replacing_file(tmp_path / "read" / "card.md", beside=tmp_path / "card.md") as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("a card")
        assert list((tmp_path / "read").iterdir()) == []
    assert (tmp_path / "read" / "card.md").read_text() == "a card"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no second file system is known here")
def test_a_rename_stays_on_its_file_system(tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        with replacing_file(tmp_path / "card.md", beside=Path(other) / "card.md") as temporary:
            temporary.write_text("a card")
        assert (tmp_path / "card.md").read_text() == "a card"
        assert list(Path(other).iterdir()) == []


def export(folder: Path, text: str) -> None:
    with replacing_folder(folder) as temporary:
        (temporary / MARKER).write_text("{}")
        (temporary / "config.json").write_text(text)
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a.txt").write_text(text)


def content(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_text() for file in files}


def immovable(monkeypatch, folder: Path) -> None:
    """What the system says of a mount point, such as a container's volume."""
    rename = Path.rename

    def busy(self, target):
        if folder in (self, Path(target)):
            raise OSError(errno.EBUSY, "Device or resource busy", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)


@pytest.mark.parametrize("mounted", [False, True])
def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch, mounted):
    folder = tmp_path / "out"
    folder.mkdir()
    if mounted:
        (folder / "lost+found").mkdir()  # an empty ext4 volume
        immovable(monkeypatch, folder)
    inode = folder.stat().st_ino
    export(folder, "one")
    (folder / "old.txt").write_text("x")
    export_two = {MARKER: "{}", "config.json": "two", "sub/a.txt": "two"}
    with replacing_folder(folder) as temporary:
        for name, text in export_two.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(text)
        assert content(folder)["config.json"] == "one"
    assert content(folder) == export_two
    assert (folder.stat().st_ino == inode) == mounted
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ZeroDivisionError), replacing_folder(folder):
        raise ZeroDivisionError
    assert content(folder) == export_two


def test_a_volume_that_a_killed_process_left_half_filled_is_filled_again(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    (folder / f".out.writing-{os.uname().nodename}-{os.getpid()}").mkdir(parents=True)
    immovable(monkeypatch, folder)
    export(folder, "one")
    (folder / "config.json").unlink()
    export(folder, "two")
    assert content(folder) == {MARKER: "{}", "config.json": "two", "sub/a.txt": "two"}


def test_what_is_too_large_for_the_disk_is_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=999)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    line = "1,000 bytes are needed, 999 are free"
    with pytest.raises(OSError, match=line) as raised, replacing_folder(tmp_path / "out", 1000):
        raise AssertionError("entered")
    assert raised.value.filename == str(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    check_space(tmp_path / "no" / "such" / "folder", 999)


def test_a_disk_that_fills_up_is_named_with_what_is_free(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=2000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    line = "1,000 bytes are needed, 2,000 are free"
    with pytest.raises(OSError, match=line) as raised, replacing_folder(tmp_path / "out", 1000):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.filename == str(tmp_path / "out")


def test_source_and_target_are_compared_as_folders(tmp_path):
    source = tmp_path / "a" / "model"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "up").symlink_to(tmp_path / "a")
    touching = (
        "a/model",
        "a/../a/model/",
        "link",
        "up/model",
        "a",
        "up",
        "a/model/out/x",
        "link/x",
    )
    for target in touching:
        for pair in ((source, tmp_path / target), (tmp_path / target, source)):
            with pytest.raises(ValueError, match="must lie apart"):
                check_apart(*pair)
    for target in ("a/model2", "out", "a/out/x", "up/other"):
        check_apart(source, tmp_path / target)


def test_a_file_system_that_ignores_case_is_asked(tmp_path, monkeypatch):
    """A folder under another spelling is the same if the system says so."""
    (tmp_path / "Model").mkdir()
    stat = os.stat
    monkeypatch.setattr(
        os, "stat", lambda path, **more: stat(str(path).replace("model", "Model"), **more)
    )
    monkeypatch.setattr(Path, "stat", lambda path, **more: os.stat(path, **more))
    with pytest.raises(ValueError, match="must lie apart"):
        check_apart(tmp_path / "Model", tmp_path / "model")


HOLDER = """
import sys, time
from pathlib import Path
from moe_jax.files import locked
with locked(Path(sys.argv[1]), "output x"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    file = tmp_path / "made" / "out" / ".lock"
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-c", HOLDER, str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "held\n"
    for _ in range(2):
        held = rf"output x is in use by .*process {process.pid} on .*, since \d{{4}}-.* UTC"
        with pytest.raises(BlockingIOError, match=held), locked(file, "output x"):
            raise AssertionError("entered")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert file.exists()  # which hinders nobody
    own = pytest.raises(BlockingIOError, match=f"process {os.getpid()}")
    with locked(file, "output x"), own, locked(file, "x"):
        raise AssertionError("entered")
    assert not file.exists()
    with locked(file, "output x"):
        (file.parent / "result").touch()
    assert [f.name for f in file.parent.iterdir()] == ["result"]


def test_a_lock_leaves_no_folders_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a" / "b" / ".lock", "x"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
