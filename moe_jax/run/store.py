"""The output folder of a run: what steps leave in it, and how they are found again."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from moe_jax.files import LOCK, check_apart, check_output_folder, locked, write_json
from moe_jax.processes import agree, is_writer
from moe_jax.run.config import RunConfig

MARKER = "run.json"
MODEL = "model"
DONE = "done.json"  # in the folder of a finished training
_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class Steps:
    """Files that steps leave in ``folder``, and how long each step took in this run.

    Of many processes, one reads and writes small files, and tells the others what is in them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Announces the step and adds up its wall time."""
        _logger.info("%s ...", name)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def write(self, file: Path, value: Any) -> None:
        """Writes JSON to a file of the folder, whole or not at all."""
        if is_writer():
            write_json(file, value)

    def cached_json(
        self,
        name: str,
        path: str,
        read: Callable[[str], _T],
        make: Callable[[], Any],
        remake: bool = False,
    ) -> _T:
        """``read`` of the text of ``path``, which is made first if it is not there.

        Args:
            name: of the step.
            path: inside the folder.
            read: raises ValueError for text that cannot be used.
            make: gives the JSON value to write; called on every process or on none.
            remake: write unusable files again rather than refuse them.

        Raises:
            OSError: the file cannot be written.
            ValueError: ``read`` refuses what is there.
        """
        file = self.folder / path
        text = None
        if is_writer() and file.exists():
            text = file.read_text(encoding="utf-8", errors="surrogateescape")
        if (text := agree(text)) is not None:
            try:
                value = read(text)
            except ValueError as error:
                if not remake:
                    hint = "correct it, or delete it to have it made again"
                    raise ValueError(f"{file} cannot be used: {error}; {hint}") from error
                _logger.warning("%s: made again, as %s is damaged: %s", name, file, error)
            else:
                _logger.info("%s: taken from %s", name, file)
                return value
        with self.timed(name):
            made = agree(make())
            self.write(file, made)
        return read(json.dumps(made))


def check_output(run: RunConfig) -> Path:
    """The output folder, if a run may write there; nothing is written yet.

    Raises:
        FileExistsError: it is a file, or holds something that is not a run's.
        ValueError: writing there would change a model that the run reads.
    """
    folder = Path(run.output).expanduser()
    for model in filter(None, (run.model, run.teacher)):
        if Path(model).expanduser().exists():  # else it comes from the hub's own cache
            check_apart(model, folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output must be a folder, got the file {folder}")
    # A run that was killed while it made its folder leaves its lock and a half-written marker.
    foreign = folder.exists() and any(
        file.name != LOCK and not file.name.startswith(f".{MARKER}.writing-")
        for file in folder.iterdir()
    )
    if foreign and not (folder / MARKER).exists():
        raise FileExistsError(
            f"output {folder} exists and is not a run's folder ({MARKER} is missing); "
            "name another one or empty it"
        )
    check_output_folder(folder / MODEL)
    return folder


def owned(run: RunConfig) -> AbstractContextManager[None]:
    """Keeps other runs from the output folder; see ``files.locked``."""
    folder = check_output(run)
    if not is_writer():
        return nullcontext()
    return locked(folder / LOCK, f"output {folder}")


def training_folder(output: Path, stage: int) -> Path:
    """Where a stage's training keeps its checkpoints, its numbers and its result."""
    return output / "training" / str(stage)
