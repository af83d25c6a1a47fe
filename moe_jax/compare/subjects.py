"""The models of a grid, with their text: checked, short of reading weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.calibrate import Batches, Measurement, domain_batches
from moe_jax.compare.grid import Calibration, Cell, Grid
from moe_jax.config import ModelConfig
from moe_jax.data import EvaluationWindows, evaluation_windows, load_tokenizer
from moe_jax.data.documents import domain_names, expand_files, text_digest
from moe_jax.data.teacher_cache import text_facts
from moe_jax.evaluate import TaskSet, find_tasks
from moe_jax.evaluate.tasks import harness_version
from moe_jax.hf.folder import find_folder
from moe_jax.hf.reader import prevalent_dtype, read_config
from moe_jax.identity import checkpoint_digest, digest
from moe_jax.kinds import check_own_teacher
from moe_jax.params import ITEM_BYTES
from moe_jax.plan import Cut
from moe_jax.run.stage import StageConfig
from moe_jax.settings import CalibrationConfig, check_seq_len

Stages = tuple[StageConfig, ...]


@dataclass(frozen=True)
class Sample:
    """Calibration text of a model.

    Attributes:
        settings: files and sizes.
        seed: of the sample and of random criteria.
        text: digest of its tokens.
        cuts: all that use its statistics: those that a method begins with.
        training: digest of the training text in the order of this seed; empty if none trains.
    """

    settings: CalibrationConfig
    seed: int
    text: str
    cuts: tuple[Cut, ...]
    training: str

    @property
    def measurement(self) -> Measurement:
        """What the cuts need together."""
        return self.measurement_for(self.cuts)

    def measurement_for(self, cuts: Sequence[Cut], teacher: Any = None) -> Measurement:
        """What these cuts need; without a teacher, the model is its own."""
        return Measurement(
            tuple(sorted({loss for cut in cuts for loss in cut.losses})),
            teacher,
            second_moments=any(cut.needs_second_moments for cut in cuts),
            second_moment_bytes=self.settings.second_moment_bytes or None,
            attention_moments=any(cut.needs_attention_moments for cut in cuts),
            shared_moments=any(cut.needs_shared_moments and not cut.sequential for cut in cuts),
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
        cells: those of this model, with their stages.
        studies: by cell, the titles of the blocks that hold it.
        lengths: the grid's marks and cooldown, empty without marks.
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
    cells: Mapping[Cell, Stages]
    samples: Mapping[Calibration, Sample]
    studies: Mapping[Cell, tuple[str, ...]]
    lengths: tuple[Any, ...]

    @property
    def item_bytes(self) -> int:
        """Of a stored weight."""
        return ITEM_BYTES[prevalent_dtype(self.folder)]

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
        more = ("attention",) * wanted.attention_moments + ("shared",) * wanted.shared_moments
        return digest("statistics", self.key, sample.text, asked, *more)

    def statistics_path(self, calibration: Calibration) -> Path:
        """Where the statistics are, without suffix."""
        return self.output / "statistics" / self.statistics_key(calibration)

    def cell_file(self, cell: Cell) -> Path:
        """Where a cell's numbers are; names of methods and sources do not count."""
        sample, stages = self.samples[cell.calibration], self.cells[cell]
        asked = [stage.given() for stage in stages]
        trained = (sample.training, *self.lengths) if any(s.distill for s in stages) else ()
        settings = asked[0] if len(asked) == 1 else asked
        key = digest("cell", self.key, settings, sample.text, sample.seed, *trained)
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


def _checked_cells(grid: Grid, model: str) -> dict[Cell, Stages]:
    """A model's cells with their stages, of which all fit it."""
    config = read_config(find_folder(model))
    if not config.moe_layers:
        raise ValueError(f"{model} has no layer with experts")
    lengths = [grid.calibration.seq_len, grid.evaluation.seq_len]
    for seq_len in [*lengths, *([grid.training.seq_len] if grid.steps else [])]:
        check_seq_len(seq_len, config.max_positions)
    cells = [cell for cell in grid.cells() if cell.calibration.model == model]
    checked: dict[Any, Stages] = {}
    fit: set[tuple[str, float]] = set()
    for cell in cells:
        asked = cell.method, cell.ratio, cell.calibration.seed
        if asked in checked:
            continue
        try:
            checked[asked] = stages = grid.stages(*asked[:2], config.num_layers, asked[2])
            smaller = config
            for stage in () if asked[:2] in fit else stages:  # whatever the seed
                if smaller is config and "kd_full" in stage.losses:
                    check_own_teacher(config.router)
                smaller = stage.after_cut(smaller)
                if stage.distill:
                    stage.distill.check_models(smaller, config)
            fit.add(asked[:2])
        except ValueError as error:
            place = f"method {cell.method!r} at ratio {cell.ratio:g} on {model}"
            raise ValueError(f"{place}: {error}") from error
    return {c: checked[c.method, c.ratio, c.calibration.seed] for c in cells}


def _subject(
    grid: Grid,
    model: str,
    label: str,
    tasks: TaskSet | None,
    cells: dict[Cell, Stages],
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
        users = [stages for cell, stages in cells.items() if cell.calibration == calibration]
        first = tuple(stages[0].cut for stages in users if stages[0].cut)
        trains = any(stage.distill for stages in users for stage in stages)
        order = _training_text(grid, tokenizer, seed) if trains else ""
        samples[calibration] = Sample(settings, seed, tokens, first, order)
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
        studies={cell: titles for cell, titles in grid.cells().items() if cell in cells},
        lengths=(grid.marks, grid.cooldown) if grid.marks else (),
    )


def _training_text(grid: Grid, tokenizer: Any, seed: int) -> str:
    text = grid.training
    sizes = {"seq_len": text.seq_len, "batch_size": text.batch_size}
    return text_facts(text.files, tokenizer, **sizes, seed=seed)["text"]
