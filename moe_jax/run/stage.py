"""One stage of a run: a cut, a training, or a cut and then a training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from moe_jax.config import ModelConfig
from moe_jax.distill import TrainSettings
from moe_jax.plan import Cut, Plan, foreseen, planned_config
from moe_jax.quantization import Quantization
from moe_jax.settings import check_values, mapping, section, setting

DISTILL = "distill"


@dataclass(frozen=True)
class StageConfig:
    """What happens to the model in one stage; in a configuration the cut's fields stand beside.

    Attributes:
        cut: what to remove; None if the stage only trains, or applies a plan.
    """

    cut: Cut | None = setting(None, "", beside=True)
    plan: str = setting(
        "", "A plan file to apply instead of a cut; goes with no other field but distill."
    )
    distill: TrainSettings | None = setting(
        None, "How to train after the cut; alone, with method distill, the stage only trains."
    )
    quantize: Quantization | None = setting(
        None,
        "In compare alone: round the weights afterwards as a quantised checkpoint would give them "
        "back (bits, group_size, minimum, parts), and count its bytes.",
    )

    @classmethod
    def from_dict(cls, raw: Any, where: str, seed: int = 0) -> StageConfig:
        """Builds and checks a stage; raises ValueError naming the field and its bound.

        ``seed`` is that of its training, unless ``raw`` has one.
        """
        values = dict(mapping(raw, where))
        plan, distill = values.pop("plan", None) or "", values.pop("distill", None)
        rounding = values.pop("quantize", None)
        if rounding is not None:
            rounding = section(
                Quantization, mapping(rounding, f"{where}.quantize"), f"{where}.quantize"
            )
            check_values(rounding, f"{where}.quantize.")
        if not isinstance(plan, str):
            raise ValueError(f"{where}.plan must be text, got {plan!r}")
        training = None
        if distill is not None:
            training = _train_settings(distill, f"{where}.distill", seed)
        method = values.get("method")
        given = sorted(name for name, value in values.items() if value not in (None, "", {}))
        extra = [name for name in given if name != "method"]
        if plan:
            if extra:
                raise ValueError(f"{where}: a stage with a plan takes nothing else, got {extra}")
            return cls(None, plan, training, rounding)
        if method == DISTILL or (training is not None and not given):
            if extra:
                raise ValueError(f"{where}: method 'distill' removes nothing; it takes no {extra}")
            if training is None:
                raise ValueError(f"{where}: method 'distill' needs the field distill, got none")
            return cls(None, "", training, rounding)
        return cls(Cut.from_dict(values, where), "", training, rounding)

    def to_dict(self) -> dict[str, Any]:
        """The fields that ``from_dict`` makes it of."""
        values: dict[str, Any] = {"method": self.method} if not self.plan else {"plan": self.plan}
        if self.cut is not None:
            values |= self.cut.given()
        if self.distill is not None:
            values["distill"] = dataclasses.asdict(self.distill)
        if self.quantize is not None:
            values["quantize"] = dataclasses.asdict(self.quantize)
        return values

    def given(self) -> dict[str, Any]:
        """The fields that are not at their defaults: a new one leaves a digest as it was."""
        values = self.cut.given() if self.cut is not None else {}
        if self.distill is not None:
            default = TrainSettings(self.distill.steps, warmup_steps=0)
            asked = {n: v for n, v in vars(self.distill).items() if v != getattr(default, n)}
            values["distill"] = {"warmup_steps": 0, **asked, "steps": self.distill.steps}
        if self.quantize is not None:
            values["quantize"] = dataclasses.asdict(self.quantize)
        return values

    @property
    def removes(self) -> dict[str, Any]:
        """What it removes, as its fields say it; empty if it only trains."""
        return {
            name: value
            for name, value in self.to_dict().items()
            if name not in ("distill", "quantize")
        }

    @property
    def method(self) -> str:
        """The cut's; ``plan`` or ``distill`` without one."""
        if self.cut is not None:
            return self.cut.method
        return "plan" if self.plan else DISTILL

    @property
    def cuts(self) -> bool:
        """Whether the stage removes anything."""
        return self.cut is not None or bool(self.plan)

    @property
    def sequential(self) -> bool:
        """Whether its cut goes layer by layer; a plan says so itself."""
        return self.cut is not None and self.cut.sequential

    @property
    def losses(self) -> tuple[str, ...]:
        """Losses that calibration must differentiate for this stage."""
        return self.cut.losses if self.cut is not None else ()

    def after_cut(self, model: ModelConfig, plan: Plan | None = None) -> ModelConfig:
        """What the cut makes of ``model``, see ``plan.foreseen``; exactly, of a given plan.

        Raises:
            ValueError: the model cannot be cut so.
        """
        if plan is not None:
            return planned_config(model, plan)
        return model if self.cut is None else foreseen(self.cut, model)


def _train_settings(raw: Any, where: str, seed: int) -> TrainSettings:
    values = {"seed": seed, **mapping(raw, where)}
    if "steps" not in values:
        raise ValueError(f"{where}.steps must be given")
    if type(values["steps"]) is not int:
        raise ValueError(f"{where}.steps must be int, got {values['steps']!r}")
    # A default warm-up longer than a short run would never end.
    values.setdefault("warmup_steps", min(TrainSettings.warmup_steps, values["steps"] // 10))
    try:
        return section(TrainSettings, values, where)
    except (TypeError, ValueError) as error:
        text = str(error)
        raise ValueError(text if where in text else f"{where}: {text}") from error
