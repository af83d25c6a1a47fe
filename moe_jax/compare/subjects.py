"""The models of a grid, with their text: checked, short of reading weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.compare.grid import Calibration, Cell, Grid
from moe_jax.config import ModelConfig
from moe_jax.data import load_tokenizer
from moe_jax.data.documents import domain_names, expand_files, text_digest
from moe_jax.data.evaluation import EvaluationWindows, evaluation_windows
from moe_jax.evaluate import TaskSet, find_tasks
from moe_jax.evaluate.tasks import harness_version
from moe_jax.hf.folder import find_folder
from moe_jax.hf.reader import read_config, stored_dtype
from moe_jax.identity import checkpoint_digest, digest
from moe_jax.params import ITEM_BYTES
from moe_jax.plan import Cut
from moe_jax.run.config import RunConfig
from moe_jax.run.stage import StageConfig


@dataclass(frozen=True)
class Subject:
    """A model of the grid.

    Attributes:
        name: as the grid has it; ``label`` is a short one.
        folder, config, tokenizer: of its checkpoint.
        item_bytes: of a stored weight.
        windows: held-out text by domain.
        tasks: of lm-evaluation-harness; None for none.
        key: digest of all that every measurement of it depends on: checkpoint, dtype, text, tasks.
        cells: those of this model, with their stages.
        texts: by calibration, the digest of its tokens.
    """

    name: str
    label: str
    folder: Path
    config: ModelConfig
    tokenizer: Any
    item_bytes: int
    windows: EvaluationWindows
    tasks: TaskSet | None
    key: str
    cells: Mapping[Cell, Cut]
    texts: Mapping[Calibration, str]

    def losses(self, calibration: Calibration) -> tuple[str, ...]:
        """Losses that some method which uses this sample needs the gradients of."""
        return tuple(sorted({loss for stage in self._stages(calibration) for loss in stage.losses}))

    def second_moments(self, calibration: Calibration) -> bool:
        """Whether some method which uses this sample needs those of the hidden activations."""
        return any(stage.needs_second_moments for stage in self._stages(calibration))

    def attention_moments(self, calibration: Calibration) -> bool:
        """Whether some method which uses this sample needs those of attention's mixed heads."""
        return any(stage.needs_attention_moments for stage in self._stages(calibration))

    def _stages(self, calibration: Calibration) -> list[Cut]:
        return [stage for cell, stage in self.cells.items() if cell.calibration == calibration]

    def statistics_key(self, calibration: Calibration) -> str:
        """Digest of all that the statistics depend on."""
        asked = (self.losses(calibration), self.second_moments(calibration))
        more = ("attention",) if self.attention_moments(calibration) else ()
        return digest("statistics", self.key, self.texts[calibration], asked, *more)

    def cell_key(self, cell: Cell) -> str:
        """Digest of all that a cell depends on; names of methods and sources do not count."""
        settings = self.cells[cell].given()
        text = self.texts[cell.calibration]
        return digest("cell", self.key, settings, text, cell.calibration.seed)


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
    checked = [(model, *_checked(grid, model)) for model in grid.models]
    return [
        _subject(grid, label, tasks, *facts) for label, facts in zip(labels, checked, strict=True)
    ]


def _checked(grid: Grid, model: str) -> tuple[Path, ModelConfig, dict[Cell, Cut]]:
    """A model's folder and its cells with their stages, of which all fit it."""
    folder = find_folder(model)
    config = read_config(folder)
    cells = {
        cell: grid.stage(cell, config.num_layers)
        for cell in grid.cells()
        if cell.calibration.model == model
    }
    seen = set()
    for cell, stage in cells.items():
        if (cell.method, cell.ratio) in seen:
            continue
        seen.add((cell.method, cell.ratio))
        run = RunConfig(
            model=model,
            output=grid.output,
            dtype=grid.dtype,
            calibration=grid.calibration_of(cell.calibration),
            evaluation=grid.evaluation,
            stages=(StageConfig(stage),),
        )
        try:
            run.check()
            run.check_against(config)
        except ValueError as error:
            text = str(error).removeprefix("stages[0]: ")
            raise ValueError(
                f"method {cell.method!r} at ratio {cell.ratio:g} on {model}: {text}"
            ) from error
    return folder, config, cells


def _subject(
    grid: Grid,
    label: str,
    tasks: TaskSet | None,
    model: str,
    folder: Path,
    config: ModelConfig,
    cells: dict[Cell, Cut],
) -> Subject:
    tokenizer = load_tokenizer(folder)
    evaluation = grid.evaluation
    files = expand_files(evaluation.files)
    windows = evaluation_windows(evaluation, tokenizer, vocab_size=config.vocab_size)
    text = text_digest(files, tokenizer, evaluation)
    asked = (tasks.names, tasks.sources, grid.limit, harness_version()) if tasks else ()
    texts = {}
    for calibration in dict.fromkeys(cell.calibration for cell in cells):
        settings = grid.calibration_of(calibration)
        texts[calibration] = text_digest(
            expand_files(settings.files), tokenizer, settings, seed=calibration.seed
        )
    return Subject(
        name=model,
        label=label,
        folder=folder,
        config=config,
        tokenizer=tokenizer,
        item_bytes=ITEM_BYTES[stored_dtype(folder) or "float32"],
        windows=windows,
        tasks=tasks,
        key=digest(checkpoint_digest(folder), grid.dtype, text, asked),
        cells=cells,
        texts=texts,
    )
