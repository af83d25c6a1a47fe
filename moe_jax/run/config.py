"""The configuration of a compression run: fields, defaults, and checks before any work."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_jax.config import ModelConfig
from moe_jax.distill import TrainSettings
from moe_jax.kinds import check_own_teacher
from moe_jax.losses import TOP_K_KINDS
from moe_jax.plan import Plan
from moe_jax.processes import BATCH_AXES
from moe_jax.run.serving import ServeConfig
from moe_jax.run.stage import StageConfig
from moe_jax.run.target import TargetConfig
from moe_jax.settings import (
    CalibrationConfig,
    EvaluationConfig,
    ExportConfig,
    TrackingConfig,
    TrainingConfig,
    check_dtype,
    check_seed,
    check_seq_len,
    check_values,
    mapping,
    section,
)


@dataclass(frozen=True)
class RunConfig:
    """A whole run: ``python -m moe_jax.compress --config FILE``.

    Attributes:
        model: checkpoint folder or hub id.
        teacher: the original that trainings learn from and results are compared with; empty: the
            model itself. Another one is given to go on from an earlier run's result.
        output: folder of all that the run makes.
        dtype: of computation: ``float32``, ``bfloat16``, ``float16``, or empty for the
            checkpoint's own. The result is stored in the checkpoint's dtype either way.
        seed: of every random choice.
        calibration, training, evaluation: text.
        stages: cuts and trainings, one after the other.
        target: instead of stages: where to end, from which they follow.
        tracking: of trainings.
        mesh: sizes of the axes ``data fsdp expert tensor``; empty for one device.
        serve: how the result will be served, for warnings about sizes.
        export: how the result is stored.
        dry_run: print what the run would do, from the model's ``config.json`` alone, and stop.
    """

    model: str = ""
    teacher: str = ""
    output: str = ""
    dtype: str = ""
    seed: int = 0
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    stages: tuple[StageConfig, ...] = ()
    target: TargetConfig | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    mesh: Mapping[str, int] = field(default_factory=dict)
    serve: ServeConfig = field(default_factory=ServeConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    dry_run: bool = False

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> RunConfig:
        """Builds and checks a run.

        Raises:
            ValueError: an unknown field (with the nearest known one), or a value out of bounds.
        """
        values = dict(raw)
        stages = values.get("stages") or ()
        if isinstance(stages, (str, Mapping)) or not isinstance(stages, Sequence):
            raise ValueError(f"stages must be a tuple of dicts, got {stages!r}")
        values["stages"] = tuple(
            StageConfig.from_dict(stage, f"stages[{i}]", seed=_seed(values) + i)
            for i, stage in enumerate(stages)
        )
        target = mapping(values.get("target"), "target")
        values["target"] = TargetConfig.from_dict(target) if target else None
        run = section(cls, values)
        run.check()
        return run

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values of what decides the result."""
        stages = [stage.to_dict() for stage in self.stages]
        fields = dataclasses.asdict(self) | {"stages": stages}
        del fields["dry_run"]
        return json.loads(json.dumps(fields))

    def check(self) -> None:
        """Raises ValueError for what is wrong whatever the model."""
        for name in ("model", "output"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be given")
        check_dtype(self.dtype)
        check_seed(self.seed)
        check_values(self.serve, "serve.")
        check_values(self.export, "export.")
        if bool(self.stages) == (self.target is not None):
            raise ValueError(
                "exactly one of stages (at least one stage) and target must be given, got "
                f"{'both' if self.stages else 'none'}"
            )
        if any(stage.quantize for stage in self.stages):
            raise ValueError(
                "quantize is simulated, in comparisons alone: checkpoints are written in 16 or 32 "
                "bits; quantise the result with the tool of the engine that runs it"
            )
        measures = self.target or any(stage.cuts and not stage.plan for stage in self.stages)
        if measures and not self.calibration.files:
            raise ValueError("calibration.files must name text to calibrate on, got none")
        for package, wanted in (
            ("tensorboardX", self.tracking.tensorboard),
            ("wandb", self.tracking.wandb_project),
        ):
            if wanted and importlib.util.find_spec(package) is None:
                raise ValueError(f"tracking needs the package {package}: pip install {package}")
        if self.calibration.mode == "layerwise":
            sharded = any(size != 1 for size in self.mesh.values())
            for name, there in (("distill", self.trains), ("mesh", sharded)):
                if there:
                    raise ValueError(
                        "calibration.mode 'layerwise' holds one layer at a time on one device; it "
                        f"goes without {name}"
                    )
        if self.trains and not (self.training.files or self.training.teacher_cache):
            raise ValueError("training.files must name text to train on, got none")

    @property
    def trains(self) -> bool:
        """Whether any stage trains."""
        if self.target is not None:
            return bool(self.target.distill)
        return any(stage.distill for stage in self.stages)

    def for_model(self, model: ModelConfig) -> RunConfig:
        """The same run with stages in the place of a target.

        Raises:
            ValueError: the target cannot be reached.
        """
        if self.target is None:
            return self
        stages = self.target.stages_for(model, self.seed)
        return dataclasses.replace(self, stages=stages, target=None)

    def check_against(
        self,
        model: ModelConfig,
        plans: Mapping[int, Plan] | None = None,
        teacher: ModelConfig | None = None,
    ) -> list[ModelConfig]:
        """What each stage makes of ``model``; reads no weights.

        Which experts go is not known yet, a global ranking is taken as one by layer, and experts
        ranked across a layer as equally wide.

        Args:
            model: what the first stage starts from.
            plans: by index, those of the stages that apply one.
            teacher: the original; None: ``model``.

        Raises:
            ValueError: a stage that the model cannot go through.
        """
        teacher = teacher or model
        for text in (self.calibration, self.evaluation, *([self.training] if self.trains else ())):
            if text.files:
                check_seq_len(text.seq_len, model.max_positions)
        model.require_experts("compression")
        models = []
        for i, stage in enumerate(self.stages):
            try:
                if "kd_full" in stage.losses and i == 0 and not self.teacher:
                    check_own_teacher(model.router)
                model = stage.after_cut(model, plans[i] if plans and stage.plan else None)
                if stage.distill:
                    self._check_training(stage.distill, model, teacher)
            except ValueError as error:
                raise ValueError(f"stages[{i}]: {error}") from error
            models.append(model)
        self.check_batches(self.mesh)
        return models

    def _check_training(
        self, settings: TrainSettings, model: ModelConfig, teacher: ModelConfig
    ) -> None:
        settings.check_models(model, teacher)
        batch_size, pieces = self.training.batch_size, settings.accumulation
        if settings.needs_teacher_states and self.training.teacher_cache:
            raise ValueError(
                "hidden_weight and router_weight need the live teacher, which "
                "training.teacher_cache replaces"
            )
        if settings.needs_teacher and self.training.teacher_cache:
            settings.check_models(model, None, settings.top_k)
        if batch_size % pieces:
            raise ValueError(
                "training.batch_size must be a multiple of distill.accumulation = "
                f"{pieces}, got {batch_size}"
            )
        if settings.loss in TOP_K_KINDS and settings.top_k > model.vocab_size:
            raise ValueError(
                f"distill.top_k must be at most vocab_size = {model.vocab_size}, "
                f"got {settings.top_k}"
            )

    def check_batches(self, mesh_sizes: Mapping[str, int]) -> None:
        """Raises ValueError if a batch, or a micro-batch, cannot be split over the mesh."""
        parts = math.prod(mesh_sizes.get(axis, 1) for axis in BATCH_AXES)
        for name, text in (("calibration", self.calibration), ("evaluation", self.evaluation)):
            if text.files and parts > 0 and text.batch_size % parts:
                raise ValueError(
                    f"{name}.batch_size must be a multiple of the mesh's "
                    f"{' x '.join(BATCH_AXES)} = {parts}, got {text.batch_size}"
                )
        for i, stage in enumerate(self.stages):
            pieces = stage.distill.accumulation if stage.distill else 1
            if stage.distill and parts > 0 and self.training.batch_size // pieces % parts:
                raise ValueError(
                    f"stages[{i}]: training.batch_size / accumulation must be a multiple of the "
                    f"mesh's {' x '.join(BATCH_AXES)} = {parts}, got "
                    f"{self.training.batch_size} / {pieces}"
                )


def _seed(raw: Mapping[str, Any]) -> int:
    """The run's seed, if it is a number at all; whether it may be one is checked later."""
    seed = raw.get("seed", 0)
    return seed if isinstance(seed, int) else 0
