"""The models of a grid, with their text: checked, short of reading weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.calibrate import Batches, Measurement, domain_batches
from moe_jax.compare.grid import Calibration, Cell, Grid
from moe_jax.config import ModelConfig, check_own_teacher
from moe_jax.data import EvaluationWindows, evaluation_windows, load_tokenizer
from moe_jax.data.documents import domain_names, expand_files, text_digest
from moe_jax.evaluate import TaskSet, find_tasks
from moe_jax.evaluate.tasks import harness_version
from moe_jax.hf.folder import find_folder
from moe_jax.hf.reader import read_config, stored_dtype
from moe_jax.identity import checkpoint_digest, digest
from moe_jax.params import ITEM_BYTES
from moe_jax.plan import Cut, foreseen
from moe_jax.settings import CalibrationConfig, check_seq_len


@dataclass(frozen=True)
class Sample:
    """Calibration text of a model.

    Attributes:
        settings: files and sizes.
        seed: of the sample and of random criteria.
        text: digest of its tokens.
        cuts: all that use its statistics.
    """

    settings: CalibrationConfig
    seed: int
    text: str
    cuts: tuple[Cut, ...]

    @property
    def measurement(self) -> Measurement:
        """What the cuts need together."""
        return Measurement(
            tuple(sorted({loss for cut in self.cuts for loss in cut.losses})),
            second_moments=any(cut.needs_second_moments for cut in self.cuts),
            second_moment_bytes=self.settings.second_moment_bytes or None,
            attention_moments=any(cut.needs_attention_moments for cut in self.cuts),
            seed=self.seed,
        )


@dataclass(frozen=True)
class Subject:
    """A model of the grid.

    Attributes:
        output: the grid's.
        name: as the grid has it; ``label`` is a short one.
        folder, config, tokenizer: of its checkpoint.
        windows: held-out text by domain.
        tasks: of lm-evaluation-harness; None for none.
        key: digest of all that every measurement of it depends on: checkpoint, dtype, text, tasks.
        cells: those of this model, with their cuts.
        samples: by calibration.
    """

    output: Path
    name: str
    label: str
    folder: Path
    config: ModelConfig
    tokenizer: Any
    windows: EvaluationWindows
    tasks: TaskSet | None
    key: str
    cells: Mapping[Cell, Cut]
    samples: Mapping[Calibration, Sample]

    @property
    def item_bytes(self) -> int:
        """Of a stored weight."""
        return ITEM_BYTES[stored_dtype(self.folder) or "float32"]

    def batches(self, calibration: Calibration) -> dict[str, Batches]:
        """Of a sample, by domain."""
        return self._batches(calibration, None)

    def refit_batches(self, calibration: Calibration, cut: Cut) -> list[dict[str, Any]]:
        """What the refit of a cut reads."""
        domains = self._batches(calibration, cut.refit_sequences)
        return [batch for domain in domains.values() for batch in domain]

    def _batches(self, calibration: Calibration, sequences: int | None) -> dict[str, Batches]:
        sample = self.samples[calibration]
        settings = sample.settings
        if sequences is not None:
            settings = dataclasses.replace(settings, num_sequences=sequences)
        return domain_batches(
            expand_files(settings.files),
            self.tokenizer,
            settings,
            seed=sample.seed,
            vocab_size=self.config.vocab_size,
        )

    def statistics_key(self, calibration: Calibration) -> str:
        """Digest of all that the statistics depend on."""
        sample = self.samples[calibration]
        wanted = sample.measurement
        asked = (wanted.importance, wanted.second_moments)
        more = ("attention",) if wanted.attention_moments else ()
        return digest("statistics", self.key, sample.text, asked, *more)

    def statistics_path(self, calibration: Calibration) -> Path:
        """Where the statistics are, without suffix."""
        return self.output / "statistics" / self.statistics_key(calibration)

    def cell_file(self, cell: Cell) -> Path:
        """Where a cell's numbers are; names of methods and sources do not count."""
        sample = self.samples[cell.calibration]
        settings = self.cells[cell].given()
        key = digest("cell", self.key, settings, sample.text, sample.seed)
        return self.output / "cells" / f"{key}.json"

    @property
    def original_file(self) -> Path:
        """Where the numbers of the model itself are."""
        return self.output / "originals" / f"{self.label.replace('/', '_')}-{self.key}.json"


def prepare(grid: Grid) -> list[Subject]:
    """Refuses what can be refused without reading weights; writes nothing.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: bad input; the message names its place.
    """
    output = Path(grid.output).expanduser()
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output must be a folder, got the file {output}")
    for name, files in [*grid.sources.items(), ("evaluation", grid.evaluation.files)]:
        try:
            expand_files(files)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"text of {name!r}: {error}") from error
    labels = domain_names([str(Path(model)) for model in grid.models])
    tasks = find_tasks(grid.tasks, grid.tasks_folder, grid.tasks_root) if grid.tasks else None
    # Every model is checked before the text of any is read.
    cells = {model: _checked_cells(grid, model) for model in grid.models}
    return [
        _subject(grid, model, label, tasks, cells[model])
        for model, label in zip(grid.models, labels, strict=True)
    ]


def _checked_cells(grid: Grid, model: str) -> dict[Cell, Cut]:
    """A model's cells with their cuts, of which all fit it."""
    config = read_config(find_folder(model))
    if not config.moe_layers:
        raise ValueError(f"{model} has no layer with experts")
    for text in (grid.calibration, grid.evaluation):
        check_seq_len(text.seq_len, config.max_positions)
    cells = [cell for cell in grid.cells() if cell.calibration.model == model]
    cuts = {(cell.method, cell.ratio): grid.cut(cell, config.num_layers) for cell in cells}
    for (method, ratio), cut in cuts.items():
        try:
            if "kd_full" in cut.losses:
                check_own_teacher(config.router)
            foreseen(cut, config)
        except ValueError as error:
            raise ValueError(f"method {method!r} at ratio {ratio:g} on {model}: {error}") from error
    return {cell: cuts[cell.method, cell.ratio] for cell in cells}


def _subject(
    grid: Grid, model: str, label: str, tasks: TaskSet | None, cells: dict[Cell, Cut]
) -> Subject:
    folder = find_folder(model)
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    evaluation = grid.evaluation
    text = text_digest(expand_files(evaluation.files), tokenizer, evaluation)
    asked = (tasks.names, tasks.sources, grid.limit, harness_version()) if tasks else ()
    samples = {}
    for calibration in dict.fromkeys(cell.calibration for cell in cells):
        settings, seed = grid.calibration_of(calibration), calibration.seed
        tokens = text_digest(expand_files(settings.files), tokenizer, settings, seed=seed)
        users = tuple(cut for cell, cut in cells.items() if cell.calibration == calibration)
        samples[calibration] = Sample(settings, seed, tokens, users)
    return Subject(
        output=Path(grid.output).expanduser(),
        name=model,
        label=label,
        folder=folder,
        config=config,
        tokenizer=tokenizer,
        windows=evaluation_windows(evaluation, tokenizer, vocab_size=config.vocab_size),
        tasks=tasks,
        key=digest(checkpoint_digest(folder), grid.dtype, text, asked),
        cells=cells,
        samples=samples,
    )
