"""What is compared: models, methods, sizes and calibrations, and which of their combinations."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_jax.plan import Cut
from moe_jax.run.stage import DISTILL, StageConfig
from moe_jax.settings import (
    DTYPES,
    CalibrationConfig,
    EvaluationConfig,
    TrainingConfig,
    check_bounds,
    check_names,
    check_seed,
    convert,
    mapping,
    nearest,
    section,
    setting,
)

# What a ratio can be of, with a size that any method which takes the field accepts.
_SIZES: dict[str, float] = {"keep_ratio": 0.5, "width_ratio": 0.5, "drop_layers": 1}


@dataclass(frozen=True)
class Calibration:
    """One sample of text that one model is measured on."""

    model: str
    source: str
    count: int
    seed: int


@dataclass(frozen=True)
class Cell:
    """One compressed model.

    Attributes:
        method: a name among the grid's.
        ratio: share of experts, neurons or layers that stays.
        calibration: what it was measured on; its seed is also that of random criteria, of the
            training text's order and of sampled routing.
    """

    method: str
    ratio: float
    calibration: Calibration


@dataclass(frozen=True)
class Block:
    """A product of settings; one with a title is a study, told apart from all else."""

    title: str
    models: tuple[str, ...]
    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    sources: tuple[str, ...]
    counts: tuple[int, ...]
    seeds: tuple[int, ...]

    def check(self, grid: Grid, where: str) -> None:
        """Raises ValueError for a value that the grid does not have, or out of bounds."""
        for name, values in vars(self).items():
            if not values and name != "title":
                raise ValueError(f"{where}.{name} must hold at least one value, got none")
        _check_known(self.models, grid.models, f"{where}.models")
        _check_known(self.methods, grid.methods, f"{where}.methods")
        _check_known(self.sources, grid.sources, f"{where}.sources")
        for count in self.counts:
            check_bounds(f"{where}.counts", count, ">= 1")
        _check_numbers(self.ratios, self.seeds, f"{where}.")

    def cells(self) -> list[Cell]:
        """Every combination; those of one calibration follow each other."""
        return [
            Cell(method, ratio, Calibration(model, source, count, seed))
            for model, source, count, seed, ratio, method in itertools.product(
                self.models, self.sources, self.counts, self.seeds, self.ratios, self.methods
            )
        ]


@dataclass(frozen=True)
class Grid:
    """A comparison: ``python -m moe_jax.compare``."""

    models: tuple[str, ...] = setting((), "Checkpoint folders or hub ids.")
    output: str = setting("", "Folder of all that is written.")
    methods: Mapping[str, Any] = setting(
        {},
        "Pairs (name, cut) or (name, stages). A cut, the last of several, is given without its "
        "size, which ratios give: as keep_ratio, width_ratio or (rounded, as a number of layers) "
        "drop_layers, whichever it takes. Stages are those of a run; quantize beside "
        "them rounds weights (bits, group_size, minimum, parts; alone: with a cut at ratio 1).",
    )
    ratios: tuple[float, ...] = setting(
        (0.75, 0.5), "Shares of experts, neurons or layers that stay."
    )
    sources: Mapping[str, tuple[str, ...]] = setting({}, "Pairs (name, files): calibration texts.")
    source: str = setting("", "The one that is used where nothing else is said; empty: the first.")
    count: int = setting(128, "Sequences of calibration where nothing else is said.", bounds=">= 1")
    seeds: tuple[int, ...] = setting((0,), "Of calibration samples and all else that is random.")
    blocks: tuple[Block, ...] = setting(
        (),
        "Dicts, each a product of its models, methods, ratios, sources, counts and seeds; what a "
        "block leaves out is as above; what several have in common is done once. A title makes a "
        "block a study of its own, with a table and a panel of its own.",
    )
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    steps: int = setting(
        0,
        "Steps of training for a method; in a stage's distill, share (1 if not given) says how "
        "much of them it takes.",
        bounds=">= 0",
    )
    distill: Mapping[str, Any] = setting({}, "Fields of distill that all trainings share.")
    marks: tuple[float, ...] = setting(
        (),
        "Shares of the steps: the last training of each method is carried out in these lengths, "
        "each with a schedule of its own, and measured after each.",
    )
    cooldown: float = setting(
        0.2,
        "With marks, the share of every length in which the learning rate falls.",
        bounds="[0, 1]",
    )
    dtype: str = setting(
        "float32", "Of computation; empty: as each checkpoint is stored.", choices=DTYPES
    )
    tasks: tuple[str, ...] = setting((), "Tasks of lm-evaluation-harness.")
    tasks_folder: str = setting("", "Folder with further task definitions (*.yaml).")
    tasks_root: str = setting(
        "", "Where relative data files of these start; empty: at the definition itself."
    )
    limit: int = setting(0, "Most items of each task to use; 0 uses all.", bounds=">= 0")
    focus: str = setting("", "Method that figures and sentences put forward.")
    rival: str = setting("", "Method that the first one is shown beside, in maps of experts.")
    reference_mib: int = setting(
        1024,
        "Memory for the originals' predictions on the held-out text, in MiB; where it is too "
        "little they are computed again for every cell.",
        bounds=">= 0",
    )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Grid:
        """Builds and checks a grid.

        Raises:
            ValueError: an unknown field (with the nearest known one), a value of the wrong kind
                or out of bounds, or a name that the grid does not define.
        """
        values = dict(raw)
        for name in ("models", "methods", "sources", "evaluation"):
            if not values.get(name):
                raise ValueError(f"{name} must be given")
        for name in ("methods", "sources"):
            values[name] = _pairs(values[name], name)
        shared = mapping(values.get("calibration"), "calibration")
        check_names(shared, [*_shared(CalibrationConfig())], "calibration.")
        blocks: Any = values.pop("blocks", None) or ({},)
        for name in ("ratios", "seeds", "marks"):
            values[name] = _several(values.get(name, getattr(cls, name)))
        grid = section(cls, values)
        grid = dataclasses.replace(grid, source=grid.source or next(iter(grid.sources)))
        grid = dataclasses.replace(grid, blocks=_blocks(blocks, grid))
        grid.check()
        return grid

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``from_dict`` takes them."""
        return dataclasses.asdict(self) | {"calibration": _shared(self.calibration)}

    def check(self) -> None:
        """Raises ValueError for what is wrong whatever the models."""
        if not self.output:
            raise ValueError("output must be given")
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"models must differ, got {self.models}")
        _check_known((self.source,), self.sources, "source")
        _check_known(filter(None, (self.focus, self.rival)), self.methods, "focus and rival")
        _check_numbers(self.ratios, self.seeds, "")
        for mark in self.marks:
            check_bounds("marks", mark, "(0, 1]")
        for i, block in enumerate(self.blocks):
            block.check(self, f"blocks[{i}]")
        for name in self.methods:
            stages = self.stages(name, ratio=0.5, num_layers=2)
            if any(stage.distill for stage in stages) and not self.training.files:
                raise ValueError(f"training.files must name text for methods[{name!r}], got none")

    @property
    def studies(self) -> tuple[str, ...]:
        """Titles of the blocks that have one."""
        return tuple(block.title for block in self.blocks if block.title)

    def cells(self) -> dict[Cell, tuple[str, ...]]:
        """Every combination of every block, once, with the titles of the blocks that hold it.

        Those of one calibration follow each other.
        """
        titles: dict[Cell, tuple[str, ...]] = {}
        for block in self.blocks:
            for cell in block.cells():
                titles[cell] = (*titles.get(cell, ()), block.title)
        order = {c: i for i, c in enumerate(dict.fromkeys(cell.calibration for cell in titles))}
        return {c: titles[c] for c in sorted(titles, key=lambda cell: order[cell.calibration])}

    def stages(
        self, method: str, ratio: float, num_layers: int, seed: int = 0
    ) -> tuple[StageConfig, ...]:
        """What a method does to a model with so many layers, to keep ``ratio`` of it."""
        given, where = self.methods[method], f"methods[{method!r}]"
        raw = [dict(mapping(stage, where)) for stage in _several(given)]
        cutting = [stage for stage in raw if stage.get("method") not in (None, DISTILL)]
        if not cutting:
            raise ValueError(f"{where} must cut in at least one stage, got {given!r}")
        if any(stage.get("quantize") for stage in raw[:-1]):
            raise ValueError(f"{where}: quantize goes with the last stage, after which it rounds")
        if self.marks and raw[-1].get("quantize"):
            raise ValueError(f"{where}: quantize does not go with marks")
        name = size_field(
            {k: v for k, v in cutting[-1].items() if k not in ("distill", "quantize")}, where
        )
        size = round((1 - ratio) * num_layers) if name == "drop_layers" else ratio
        cutting[-1][name] = size
        for stage in raw:
            if "distill" in stage:
                distill = {**self.distill, **mapping(stage["distill"], f"{where}.distill")}
                distill["steps"] = max(1, round(self.steps * distill.pop("share", 1.0)))
                stage["distill"] = distill
        return tuple(StageConfig.from_dict(stage, where, seed=seed) for stage in raw)

    def calibration_of(self, calibration: Calibration) -> CalibrationConfig:
        """Files and sizes of a sample."""
        return dataclasses.replace(
            self.calibration,
            files=self.sources[calibration.source],
            num_sequences=calibration.count,
        )


def size_field(cut: Mapping[str, Any], where: str) -> str:
    """The field that a method takes its ratio in: the first that a cut accepts beside the rest.

    Raises:
        ValueError: a cut with a size of its own, or one that no ratio makes valid.
    """
    given = sorted({*_SIZES, "keep_experts", "expert_width", "plan"} & set(cut))
    if given:
        raise ValueError(f"{where}: sizes come from ratios; got {given}")
    errors = []
    for name, size in _SIZES.items():
        try:
            Cut.from_dict({**cut, name: size}, where)
        except ValueError as error:
            errors.append(error)
        else:
            return name
    # The field that fits best leaves the fewest complaints.
    raise min(errors, key=lambda error: len(str(error)))


def _blocks(raw: Any, grid: Grid) -> tuple[Block, ...]:
    if isinstance(raw, (str, Mapping)) or not isinstance(raw, Sequence):
        raise ValueError(f"blocks must be a tuple of dicts, got {raw!r}")
    default = {
        "title": "",
        "models": grid.models,
        "methods": tuple(grid.methods),
        "ratios": grid.ratios,
        "sources": (grid.source,),
        "counts": (grid.count,),
        "seeds": grid.seeds,
    }
    hints = typing.get_type_hints(Block)
    blocks = []
    for i, part in enumerate(raw):
        where = f"blocks[{i}]"
        given = {n: v if n == "title" else _several(v) for n, v in mapping(part, where).items()}
        check_names(given, list(default), f"{where}.")
        # Names may have commas, at which texts are split elsewhere.
        numbers = {
            name: convert(value, hints[name], f"{where}.{name}")
            for name, value in given.items()
            if name in ("title", "ratios", "counts", "seeds")
        }
        blocks.append(Block(**{**default, **given, **numbers}))
    return tuple(blocks)


def _several(value: Any) -> tuple[Any, ...]:
    """One value as a tuple of one."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _check_numbers(ratios: Iterable[float], seeds: Iterable[int], prefix: str) -> None:
    for ratio in ratios:
        check_bounds(f"{prefix}ratios", ratio, "(0, 1]")
    for seed in seeds:
        check_seed(seed)


def _pairs(raw: Any, where: str) -> dict[str, Any]:
    """A dict, or pairs where the order matters (a ConfigDict sorts the names of a dict)."""
    if isinstance(raw, Mapping):
        return dict(raw)
    found = list(raw) if isinstance(raw, Sequence) and not isinstance(raw, str) else [raw]
    for pair in found:
        if not (isinstance(pair, Sequence) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ValueError(f"{where} must be a dict or pairs (name, value), got {pair!r}")
    if len({name for name, _ in found}) < len(found):
        raise ValueError(f"{where} must have different names, got {[name for name, _ in found]}")
    return dict(found)


def _check_known(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises ValueError, with the nearest known name, for the first that is none."""
    for name in names:
        if name not in known:
            hint = nearest(name, known)
            raise ValueError(f"{where} must be among {tuple(known)}, got {name!r}{hint}")


def _shared(calibration: CalibrationConfig) -> dict[str, Any]:
    """The settings that all samples share: not what sources and counts give."""
    own = ("files", "num_sequences", "mode")
    return {name: value for name, value in vars(calibration).items() if name not in own}
