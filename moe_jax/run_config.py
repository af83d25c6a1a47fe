"""The configuration of a compression run: fields, defaults, and checks before any work."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_jax.config import ModelConfig
from moe_jax.plan import Replacement, kept_count, kept_width
from moe_jax.scoring import (
    AGGREGATIONS,
    EXPERT_CRITERIA,
    IMPORTANCE_LOSSES,
    NEEDED_LOSS,
    NEURON_CRITERIA,
)

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
        """Raises ValueError for an unknown field, or a size below 1."""
        settings = _section(cls, raw, "calibration")
        _check_sizes(settings, "calibration")
        return settings


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out text; no files, no evaluation."""

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
        _check_fields(cls, values, "")
        values["calibration"] = _section(
            CalibrationConfig, values.get("calibration"), "calibration"
        )
        values["evaluation"] = _section(EvaluationConfig, values.get("evaluation"), "evaluation")
        values["stages"] = tuple(
            _section(StageConfig, stage, f"stages[{i}]")
            for i, stage in enumerate(values.get("stages") or ())
        )
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
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype!r}")
        if not self.stages:
            raise ValueError("stages must hold at least one stage, got none")
        measured = [stage for stage in self.stages if not stage.plan]
        if measured and not self.calibration.files:
            raise ValueError("calibration.files must name text to calibrate on, got none")
        _check_sizes(self.calibration, "calibration")
        _check_sizes(self.evaluation, "evaluation")
        for i, stage in enumerate(self.stages):
            _check_stage(i, stage)

    def check_against(self, model: ModelConfig) -> None:
        """Raises ValueError for stages that this model cannot go through; reads no weights."""
        seq_len = max(self.calibration.seq_len, self.evaluation.seq_len)
        if seq_len > model.max_positions:
            raise ValueError(
                f"seq_len must be at most the model's {model.max_positions} positions, "
                f"got {seq_len}"
            )
        if not model.moe_layers:
            raise ValueError(f"{self.model} has no layer with experts")
        for i, stage in enumerate(self.stages):
            if stage.plan:
                return  # what follows depends on the plan's content
            if stage.criterion == "kd_full" and model.router.kind != "sparsemixer" and i == 0:
                raise ValueError(
                    f"stages[{i}]: importance 'kd_full' vanishes while the model is its own "
                    "teacher and its router has no train-mode noise; use 'kd_topk', 'lm' or "
                    "'fisher'"
                )
            for layer in model.moe_layers:
                moe = model.moe(layer)
                try:
                    if stage.method == "slim":
                        width = kept_width(
                            moe, layer, stage.expert_width, stage.width_ratio, stage.round_to
                        )
                        model = model.replace_moe(layer, expert_width=width)
                    else:
                        keep = kept_count(moe, layer, stage.keep_experts, stage.keep_ratio)
                        model = _after_removal(model, layer, keep, stage)
                except ValueError as error:
                    raise ValueError(f"stages[{i}]: {error}") from error


def _check_sizes(section: Any, where: str) -> None:
    for name in ("num_sequences", "seq_len", "batch_size"):
        value = getattr(section, name, 1)
        if value < 1:
            raise ValueError(f"{where}.{name} must be at least 1, got {value}")


def _after_removal(model: ModelConfig, layer: int, keep: int, stage: StageConfig) -> ModelConfig:
    """The model with so many experts; which ones is not known yet."""
    moe = model.moe(layer)
    if stage.replacement == "delete":
        return model.replace_moe(layer, num_experts=keep + len(moe.novice_ids), novice_ids=())
    return model.replace_moe(layer, novice_ids=tuple(range(keep, moe.num_experts)))


def _check_stage(i: int, stage: StageConfig) -> None:
    where = f"stages[{i}]"
    methods = (*EXPERT_CRITERIA, "slim")
    if stage.method not in methods:
        raise ValueError(
            f"{where}.method must be one of {methods}, got {stage.method!r}"
            f"{_nearest(stage.method, methods)}"
        )
    if stage.plan:
        return
    if stage.method == "slim":
        if stage.importance not in NEURON_CRITERIA:
            raise ValueError(
                f"{where}.importance must be one of {tuple(NEURON_CRITERIA)}, "
                f"got {stage.importance!r}{_nearest(stage.importance, NEURON_CRITERIA)}"
            )
        if stage.aggregation and stage.importance not in (*IMPORTANCE_LOSSES, "fisher"):
            raise ValueError(
                f"{where}.aggregation is for gradients, not for importance {stage.importance!r}"
            )
        if stage.aggregation not in ("", *AGGREGATIONS):
            raise ValueError(
                f"{where}.aggregation must be one of {AGGREGATIONS}, got {stage.aggregation!r}"
            )
        sizes = {"expert_width": stage.expert_width, "width_ratio": stage.width_ratio}
    else:
        sizes = {"keep_experts": stage.keep_experts, "keep_ratio": stage.keep_ratio}
    given = [name for name, value in sizes.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"{where}: method {stage.method!r} needs exactly one of {tuple(sizes)}, "
            f"got {given or 'none'}"
        )


def _section(kind: type, raw: Any, where: str) -> Any:
    values = dict(raw or {})
    _check_fields(kind, values, f"{where}.")
    if isinstance(values.get("files"), str):
        values["files"] = (values["files"],)
    if "files" in values:
        values["files"] = tuple(values["files"])
    return kind(**values)


def _check_fields(kind: type, values: Mapping[str, Any], prefix: str) -> None:
    check_names(values, [f.name for f in dataclasses.fields(kind)], prefix)


def check_names(values: Mapping[str, Any], known: Sequence[str], prefix: str = "") -> None:
    """Raises ValueError, with the nearest known name, if ``values`` has another."""
    for name in values:
        if name not in known:
            raise ValueError(
                f"unknown configuration field {prefix}{name}{_nearest(name, known)}; "
                f"known: {', '.join(known)}"
            )


def _nearest(name: str, known: Any) -> str:
    match = difflib.get_close_matches(name, list(known), 1, 0.4)
    return f" (did you mean {match[0]!r}?)" if match else ""


def digest(*parts: Any) -> str:
    """Sixteen hex digits that stand for these JSON values."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
