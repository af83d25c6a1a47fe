"""The configuration of a compression run: fields, defaults, and checks before any work."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from moe_jax.config import ModelConfig
from moe_jax.fields import check_fields, mapping, nearest, section
from moe_jax.plan import Plan, Replacement, kept_count, kept_width, validate_plan
from moe_jax.scoring import (
    AGGREGATIONS,
    EXPERT_CRITERIA,
    IMPORTANCE_LOSSES,
    NEEDED_LOSS,
    NEURON_CRITERIA,
)

_EXPERT_FIELDS = ("keep_experts", "keep_ratio", "scope", "replacement", "frequency")
_NEURON_FIELDS = (
    "expert_width", "width_ratio", "round_to", "importance", "aggregation",
)  # fmt: skip
DTYPES = ("", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class CalibrationConfig:
    """Text to measure the model on; sequences are taken from all files in equal shares.

    Attributes:
        files: names, globs or ``hf:`` data sets; each is a domain.
        num_sequences: in all, one document each.
        seq_len: tokens per sequence; longer documents give a random window.
        batch_size: sequences per step.
        pack: join documents and cut blocks instead (what the MoNE authors do).
    """

    files: tuple[str, ...] = ()
    num_sequences: int = 128
    seq_len: int = 512
    batch_size: int = 8
    pack: bool = False

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> CalibrationConfig:
        """Raises ValueError for an unknown field, a value of the wrong kind or a size below 1."""
        settings = section(cls, raw, "calibration")
        _check_section(settings, "calibration")
        return settings


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out text; no files, no evaluation.

    Attributes:
        files: names, globs or ``hf:`` data sets; each is a domain.
        seq_len: tokens of context; longer documents are cut into several windows.
        batch_size: windows per step.
        max_bytes: use at most so many bytes of each file; 0 uses all.
    """

    files: tuple[str, ...] = ()
    seq_len: int = 512
    batch_size: int = 8
    max_bytes: int = 0


@dataclass(frozen=True)
class StageConfig:
    """One cut.

    Attributes:
        method: ``mone`` or another expert criterion, or ``slim`` (SlimMoE's one-shot step).
        keep_experts, keep_ratio: for expert criteria, one of them.
        scope: ``layer`` or ``global`` ranking of experts.
        replacement: of removed experts: ``novice``, ``zero`` or ``delete``.
        frequency: of ``mone``: ``routing_mass`` or ``mean_weight``.
        expert_width, width_ratio: for ``slim``, one of them.
        round_to: widths become multiples of it.
        importance: the neuron criterion of ``slim``.
        aggregation: how gradients of several sequences become one importance; empty takes the
            criterion's own.
        plan: a plan file to apply instead of measuring anything.
    """

    method: str = "mone"
    keep_experts: int | None = None
    keep_ratio: float | None = None
    scope: str = "layer"
    replacement: Replacement = "novice"
    frequency: str = "routing_mass"
    expert_width: int | None = None
    width_ratio: float | None = None
    round_to: int = 1
    importance: str = "kd_topk"
    aggregation: str = ""
    plan: str = ""

    @property
    def criterion(self) -> str:
        return self.importance if self.method == "slim" else self.method

    @property
    def score_options(self) -> dict[str, str]:
        """Options of ``scoring.score``."""
        if self.method == "mone":
            return {"frequency": self.frequency}
        if self.method == "slim" and self.aggregation:
            return {"aggregation": self.aggregation}
        return {}

    @property
    def losses(self) -> tuple[str, ...]:
        """Losses that calibration must differentiate for this stage."""
        if self.plan:
            return ()
        needed = NEEDED_LOSS.get(self.criterion)
        return (needed,) if needed else ()


@dataclass(frozen=True)
class RunConfig:
    """A whole run: ``python -m moe_jax.compress --config FILE``.

    Attributes:
        model: checkpoint folder or hub id.
        output: folder of all that the run makes.
        dtype: of computation: ``float32``, ``bfloat16``, ``float16``, or empty for the
            checkpoint's own. The result is stored in the checkpoint's dtype either way.
        seed: of every random choice.
        calibration, evaluation: text.
        stages: cuts, one after the other.
        mesh: sizes of the axes ``data fsdp expert tensor``; empty for one device.
    """

    model: str = ""
    output: str = ""
    dtype: str = ""
    seed: int = 0
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    stages: tuple[StageConfig, ...] = ()
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    mesh: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> RunConfig:
        """Builds and checks a run.

        Raises:
            ValueError: an unknown field (with the nearest known one), or a value out of bounds.
        """
        values = dict(raw)
        sections = {"calibration": CalibrationConfig, "evaluation": EvaluationConfig}
        for name, kind in sections.items():
            values[name] = section(kind, values.get(name), name)
        stages = values.get("stages") or ()
        if isinstance(stages, (str, Mapping)) or not isinstance(stages, Sequence):
            raise ValueError(f"stages must be a tuple of dicts, got {stages!r}")
        values["stages"] = tuple(
            section(StageConfig, stage, f"stages[{i}]") for i, stage in enumerate(stages)
        )
        values["mesh"] = dict(mapping(values.get("mesh"), "mesh"))
        check_fields(cls, values, "")
        run = cls(**values)
        run.check()
        return run

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def check(self) -> None:
        """Raises ValueError for what is wrong whatever the model."""
        for name in ("model", "output"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be given")
        check_dtype(self.dtype)
        check_seed(self.seed)
        for axis, size in self.mesh.items():
            if isinstance(size, bool) or not isinstance(size, int):
                raise ValueError(f"mesh.{axis} must be an integer, got {size!r}")
        if not self.stages:
            raise ValueError("stages must hold at least one stage, got none")
        _check_section(self.calibration, "calibration")
        _check_section(self.evaluation, "evaluation")
        for i, stage in enumerate(self.stages):
            _check_stage(f"stages[{i}]", stage)
        if not self.calibration.files and not all(stage.plan for stage in self.stages):
            raise ValueError("calibration.files must name text to calibrate on, got none")

    def check_against(
        self, model: ModelConfig, plans: Mapping[int, Plan] | None = None
    ) -> list[ModelConfig]:
        """What each stage makes of ``model``; reads no weights.

        Which experts go is not known yet, and a global ranking is taken as one by layer.

        Args:
            model: the original.
            plans: by index, those of the stages that apply one.

        Raises:
            ValueError: a stage that the model cannot go through.
        """
        for text in (self.calibration, self.evaluation):
            if text.files:
                check_seq_len(text.seq_len, model)
        if not model.moe_layers:
            raise ValueError(f"{self.model} has no layer with experts")
        models = []
        for i, stage in enumerate(self.stages):
            try:
                if stage.plan:
                    model = planned_config(model, (plans or {})[i])
                else:
                    if stage.criterion == "kd_full" and i == 0:
                        _check_train_noise(model)
                    for layer in model.moe_layers:
                        model = _after_cut(model, layer, stage)
            except ValueError as error:
                raise ValueError(f"stages[{i}]: {error}") from error
            models.append(model)
        return models


def check_dtype(dtype: str) -> None:
    """Raises ValueError unless ``dtype`` is one to compute in, or empty."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}")


def check_seed(seed: int) -> None:
    """Raises ValueError unless ``seed`` is an integer from 0 on."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer, 0 or more, got {seed!r}")


def check_seq_len(seq_len: int, model: ModelConfig) -> None:
    """Raises ValueError if sequences are longer than the model's context."""
    if seq_len > model.max_positions:
        raise ValueError(
            f"seq_len must be at most the model's {model.max_positions} positions, got {seq_len}"
        )


def check_importance(losses: str | Sequence[str]) -> tuple[str, ...]:
    """Names of importance losses as a tuple; raises ValueError for an unknown one."""
    names = (losses,) if isinstance(losses, str) else tuple(losses)
    for name in names:
        if name not in IMPORTANCE_LOSSES:
            raise ValueError(
                f"importance must be among {IMPORTANCE_LOSSES}, got {name!r}"
                f"{nearest(str(name), IMPORTANCE_LOSSES)}"
            )
    return names


def planned_config(config: ModelConfig, plan: Plan) -> ModelConfig:
    """The architecture that ``prune.apply_plan`` gives, without its weights.

    Raises:
        ValueError: the plan does not fit.
    """
    outside = sorted(set(plan.layers) - set(config.moe_layers))
    if outside:
        raise ValueError(f"plan layers must be among {config.moe_layers}, got {outside}")
    validate_plan(plan, config)
    for i, layer in plan.layers.items():
        moe = config.moe(i)
        rows = [e for e in range(moe.num_experts) if e not in layer.deleted]
        novices = {*moe.novice_ids, *layer.novices}
        kept = next(e for e in rows if e not in novices)
        config = config.replace_moe(
            i,
            num_experts=len(rows),
            expert_width=len(layer.neurons.get(kept, range(moe.expert_width))),
            novice_ids=tuple(row for row, e in enumerate(rows) if e in novices),
        )
    return config


def _check_train_noise(model: ModelConfig) -> None:
    if model.router.kind != "sparsemixer":
        raise ValueError(
            "importance 'kd_full' vanishes while the model is its own teacher and its router has "
            "no train-mode noise; use 'kd_topk', 'lm' or 'fisher'"
        )


def _after_cut(model: ModelConfig, layer: int, stage: StageConfig) -> ModelConfig:
    """The model with one layer cut; which experts go is not known yet."""
    moe = model.moe(layer)
    if stage.method == "slim":
        width = kept_width(moe, layer, stage.expert_width, stage.width_ratio, stage.round_to)
        return model.replace_moe(layer, expert_width=width)
    keep = kept_count(moe, layer, stage.keep_experts, stage.keep_ratio)
    if stage.replacement == "delete":
        novices = len(moe.novice_ids)
        return model.replace_moe(
            layer, num_experts=keep + novices, novice_ids=tuple(range(keep, keep + novices))
        )
    return model.replace_moe(layer, novice_ids=tuple(range(keep, moe.num_experts)))


def _check_section(section: Any, where: str) -> None:
    for name in ("num_sequences", "seq_len", "batch_size"):
        value = getattr(section, name, 1)
        if value < 1:
            raise ValueError(f"{where}.{name} must be at least 1, got {value}")
    if getattr(section, "max_bytes", 0) < 0:
        raise ValueError(f"{where}.max_bytes must be 0 (all) or more, got {section.max_bytes}")


def _check_choice(where: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(
            f"{where} must be one of {tuple(choices)}, got {value!r}{nearest(value, choices)}"
        )


def _check_stage(where: str, stage: StageConfig) -> None:
    default = StageConfig()
    given = [name for name, value in vars(stage).items() if value != getattr(default, name)]
    if stage.plan:
        extra = sorted(set(given) - {"plan", "method"})
        if extra:
            raise ValueError(f"{where}: a stage with a plan takes nothing else, got {extra}")
        return
    _check_choice(f"{where}.method", stage.method, (*EXPERT_CRITERIA, "slim"))
    _check_choice(f"{where}.scope", stage.scope, ("layer", "global"))
    _check_choice(f"{where}.replacement", stage.replacement, get_args(Replacement))
    _check_choice(f"{where}.frequency", stage.frequency, ("routing_mass", "mean_weight"))
    _check_choice(f"{where}.importance", stage.importance, tuple(NEURON_CRITERIA))
    _check_choice(f"{where}.aggregation", stage.aggregation, ("", *AGGREGATIONS))
    if stage.round_to < 1:
        raise ValueError(f"{where}.round_to must be at least 1, got {stage.round_to}")
    slim = stage.method == "slim"
    if stage.aggregation and stage.importance not in (*IMPORTANCE_LOSSES, "fisher"):
        raise ValueError(
            f"{where}.aggregation is for gradients, not for importance {stage.importance!r}"
        )
    foreign = sorted(set(given) & set(_EXPERT_FIELDS if slim else _NEURON_FIELDS))
    if foreign:
        raise ValueError(f"{where}: method {stage.method!r} does not use {foreign}")
    sizes = ("expert_width", "width_ratio") if slim else ("keep_experts", "keep_ratio")
    found = [name for name in sizes if getattr(stage, name) is not None]
    if len(found) != 1:
        raise ValueError(
            f"{where}: method {stage.method!r} needs exactly one of {sizes}, got {found or 'none'}"
        )
