"""The output folder of a run: what steps leave in it, and how they are found again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from moe_jax.data import fingerprint
from moe_jax.files import write_json
from moe_jax.hf.atomic import check_output_folder
from moe_jax.run.config import RunConfig

MARKER = "run.json"
MODEL = "model"
DONE = "done.json"  # in the folder of a finished training
_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class Steps:
    """Files that steps leave in ``folder``, and how long each step took in this run."""

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
            make: gives the JSON value to write.
            remake: write unusable files again rather than refuse them.

        Raises:
            OSError: the file cannot be written.
            ValueError: ``read`` refuses what is there.
        """
        file = self.folder / path
        if file.exists():
            try:
                value = read(file.read_text(encoding="utf-8"))
            except ValueError as error:
                if not remake:
                    hint = "correct it, or delete it to have it made again"
                    raise ValueError(f"{file} cannot be used: {error}; {hint}") from error
                _logger.warning("%s: made again, as %s is damaged: %s", name, file, error)
            else:
                _logger.info("%s: taken from %s", name, file)
                return value
        with self.timed(name):
            write_json(file, make())
        return read(file.read_text(encoding="utf-8"))


def check_output(run: RunConfig) -> Path:
    """The output folder, if a run may write there; nothing is written yet.

    Raises:
        FileExistsError: it is a file, or holds something that is not a run's.
    """
    folder = Path(run.output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output must be a folder, got the file {folder}")
    # A run that was killed while it made its folder leaves a half-written marker.
    foreign = folder.exists() and any(
        not file.name.startswith(f".{MARKER}.writing-") for file in folder.iterdir()
    )
    if foreign and not (folder / MARKER).exists():
        raise FileExistsError(
            f"output {folder} exists and is not a run's folder ({MARKER} is missing); "
            "name another one or empty it"
        )
    check_output_folder(folder / MODEL)
    return folder


def training_folder(output: Path, stage: int) -> Path:
    """Where a stage's training keeps its checkpoints, its numbers and its result."""
    return output / "training" / str(stage)


def checkpoint_digest(folder: Path) -> str:
    """Sha256 (16 hex digits) over the configuration and all weights of a checkpoint."""
    total = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with open(file, "rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()[:16]


def text_digest(files: Sequence[str], tokenizer: Any, section: Any, **more: Any) -> str:
    """Digest of all that decides which tokens a section's settings give."""
    settings = dataclasses.asdict(section) | more
    del settings["files"]
    settings.pop("second_moment_bytes", None)  # how it is measured, not what
    return fingerprint(files, tokenizer, **settings)


def text_hashes(files: Sequence[str]) -> dict[str, str]:
    """Sha256 of the content of each file."""
    return {file: fingerprint([file]) for file in files}


def digest(*parts: Any) -> str:
    """Sixteen hex digits that stand for these JSON values."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
