"""What is compared: models, methods, sizes and calibrations, and which of their combinations."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_jax.compare.values import (
    check_known,
    comma_separated,
    integers,
    one_or_more,
    pairs,
    ratios,
)
from moe_jax.plan import Cut
from moe_jax.settings import (
    CalibrationConfig,
    EvaluationConfig,
    check_dtype,
    check_names,
    check_seed,
    mapping,
    section,
)

# What a ratio can be of, with a size that any method which takes the field accepts.
_SIZES: dict[str, float] = {"keep_ratio": 0.5, "width_ratio": 0.5, "drop_layers": 1}
_NUMBERS = ("count", "limit", "reference_mib")
_TEXTS = ("output", "dtype", "source", "focus", "rival", "tasks_folder", "tasks_root")


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
        calibration: what it was measured on; its seed is also that of random criteria.
    """

    method: str
    ratio: float
    calibration: Calibration


@dataclass(frozen=True)
class Block:
    """A product of settings, for every model of the grid."""

    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    sources: tuple[str, ...]
    counts: tuple[int, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """A comparison: ``python -m moe_jax.compare`` lists the fields and what they mean."""

    models: tuple[str, ...]
    output: str
    methods: Mapping[str, Mapping[str, Any]]
    sources: Mapping[str, tuple[str, ...]]
    evaluation: EvaluationConfig
    source: str = ""
    count: int = 128
    ratios: tuple[float, ...] = (0.75, 0.5)
    seeds: tuple[int, ...] = (0,)
    blocks: tuple[Block, ...] = ()
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    dtype: str = "float32"
    tasks: tuple[str, ...] = ()
    tasks_folder: str = ""
    tasks_root: str = ""
    limit: int = 0
    focus: str = ""
    rival: str = ""
    reference_mib: int = 1024

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Grid:
        """Builds and checks a grid.

        Raises:
            ValueError: an unknown field (with the nearest known one), a value of the wrong kind
                or out of bounds, or a name that the grid does not define.
        """
        values = dict(raw)
        check_names(values, [f.name for f in dataclasses.fields(cls)])
        for name in ("models", "methods", "sources", "evaluation"):
            if not values.get(name):
                raise ValueError(f"{name} must be given")
        for name in ("models", "tasks"):
            values[name] = comma_separated(values.get(name, ()), name)
        for name, kind in [*((n, int) for n in _NUMBERS), *((n, str) for n in _TEXTS)]:
            if name in values and type(values[name]) is not kind:
                raise ValueError(f"{name} must be {kind.__name__}, got {values[name]!r}")
        values["methods"] = {
            name: dict(mapping(stage, f"methods[{name!r}]"))
            for name, stage in pairs(values["methods"], "methods").items()
        }
        values["sources"] = {
            name: comma_separated(files, f"sources[{name!r}]")
            for name, files in pairs(values["sources"], "sources").items()
        }
        values["evaluation"] = section(EvaluationConfig, values["evaluation"], "evaluation")
        values["calibration"] = _calibration(values.get("calibration"))
        values.setdefault("source", next(iter(values["sources"])))
        values["ratios"] = ratios(values.get("ratios", cls.ratios), "ratios")
        values["seeds"] = integers(values.get("seeds", cls.seeds), "seeds")
        blocks: Any = values.pop("blocks", None) or ({},)
        grid = cls(**values)
        grid = dataclasses.replace(grid, blocks=_blocks(blocks, grid))
        grid.check()
        return grid

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``from_dict`` takes them."""
        return dataclasses.asdict(self) | {
            "blocks": tuple(dataclasses.asdict(block) for block in self.blocks),
            "calibration": _shared_fields(self.calibration),
        }

    def check(self) -> None:
        """Raises ValueError for what is wrong whatever the models."""
        if not self.output:
            raise ValueError("output must be given")
        check_dtype(self.dtype)
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"models must differ, got {self.models}")
        for name, bound in (("count", 1), ("limit", 0), ("reference_mib", 0)):
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        check_known((self.source,), self.sources, "source")
        check_known(filter(None, (self.focus, self.rival)), self.methods, "focus and rival")
        for i, block in enumerate(self.blocks):
            check_known(block.methods, self.methods, f"blocks[{i}].methods")
            check_known(block.sources, self.sources, f"blocks[{i}].sources")
            for seed in block.seeds:
                check_seed(seed)
            if min(block.counts) < 1:
                raise ValueError(f"blocks[{i}].counts must be at least 1, got {block.counts}")
        for name, stage in self.methods.items():
            size_field(stage, f"methods[{name!r}]")

    def cells(self) -> list[Cell]:
        """Every combination of every block, once; those of one calibration follow each other."""
        cells = dict.fromkeys(
            Cell(method, ratio, Calibration(model, source, count, seed))
            for model in self.models
            for block in self.blocks
            for source, count, seed, ratio, method in itertools.product(
                block.sources, block.counts, block.seeds, block.ratios, block.methods
            )
        )
        order = {c: i for i, c in enumerate(dict.fromkeys(cell.calibration for cell in cells))}
        return sorted(cells, key=lambda cell: order[cell.calibration])

    def stage(self, cell: Cell, num_layers: int) -> Cut:
        """The cut that makes a cell of a model with so many layers."""
        raw, where = self.methods[cell.method], f"methods[{cell.method!r}]"
        name = size_field(raw, where)
        size = round((1 - cell.ratio) * num_layers) if name == "drop_layers" else cell.ratio
        return Cut.from_dict({**raw, name: size}, where)

    def calibration_of(self, calibration: Calibration) -> CalibrationConfig:
        """Files and sizes of a sample."""
        return dataclasses.replace(
            self.calibration,
            files=self.sources[calibration.source],
            num_sequences=calibration.count,
        )


def size_field(stage: Mapping[str, Any], where: str) -> str:
    """The field that a method takes its ratio in: the first that a stage accepts beside the rest.

    Raises:
        ValueError: a stage with a size of its own or a training, or one that no ratio makes valid.
    """
    given = sorted({*_SIZES, "keep_experts", "expert_width", "plan", "distill"} & set(stage))
    if given:
        raise ValueError(f"{where}: sizes come from ratios, and nothing is trained; got {given}")
    errors = []
    for name, size in _SIZES.items():
        try:
            Cut.from_dict({**stage, name: size}, where)
        except ValueError as error:
            errors.append(error)
        else:
            return name
    # The field that fits best leaves the fewest complaints.
    raise min(errors, key=lambda error: len(str(error)))


def _blocks(raw: Any, grid: Grid) -> tuple[Block, ...]:
    if isinstance(raw, (str, Mapping)) or not isinstance(raw, Sequence):
        raise ValueError(f"blocks must be a tuple of dicts, got {raw!r}")
    blocks = []
    for i, part in enumerate(raw):
        where = f"blocks[{i}]"
        values = mapping(part, where)
        check_names(values, [f.name for f in dataclasses.fields(Block)], f"{where}.")
        blocks.append(
            Block(
                methods=one_or_more(values.get("methods", tuple(grid.methods)), f"{where}.methods"),
                ratios=ratios(values.get("ratios", grid.ratios), f"{where}.ratios"),
                sources=one_or_more(values.get("sources", (grid.source,)), f"{where}.sources"),
                counts=integers(values.get("counts", (grid.count,)), f"{where}.counts"),
                seeds=integers(values.get("seeds", grid.seeds), f"{where}.seeds"),
            )
        )
    return tuple(blocks)


def _calibration(raw: Any) -> CalibrationConfig:
    """The settings that all samples share."""
    known = list(_shared_fields(CalibrationConfig()))
    check_names(mapping(raw, "calibration"), known, "calibration.")
    return section(CalibrationConfig, raw, "calibration")


def _shared_fields(calibration: CalibrationConfig) -> dict[str, Any]:
    own = ("files", "num_sequences")  # what sources and counts give
    return {name: value for name, value in vars(calibration).items() if name not in own}
