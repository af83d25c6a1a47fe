"""From a size to end at to the stages that lead there, and the table of what they will do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_jax.config import ModelConfig, MoeConfig
from moe_jax.params import count_params
from moe_jax.plan import Cut, foreseen
from moe_jax.plan.cut import SLIM
from moe_jax.run.stage import StageConfig
from moe_jax.settings import TrainingConfig, check_names, section, setting
from moe_jax.text import aligned, extent

_SIZES = ("total_params", "active_params", "ratio")
_SLIM_FIELDS = ("importance", "aggregation", "group_importance")
_ROUNDING = 1e-9  # of powers: 27 * (1 / 27) ** (1 / 3) is 9


@dataclass(frozen=True)
class TargetConfig:
    """Where slimming ends, and in how many stages it gets there."""

    total_params: int | None = setting(
        None, "Most parameters at the end; the widest experts that fit are taken.", bounds=">= 1"
    )
    active_params: int | None = setting(
        None, "Instead: most parameters that a token reads.", bounds=">= 1"
    )
    ratio: float | None = setting(None, "Instead: a share of all parameters.", bounds="(0, 1]")
    kv_groups: int | None = setting(
        None, "Key/value groups that each layer ends with; empty keeps them."
    )
    stages: int = setting(2, "How many stages.", bounds=">= 1")
    schedule: str = setting(
        "geometric",
        "Sizes in between: each stage keeps the same share of what is there (geometric; what "
        "SlimMoE's released sizes suggest is not public), or takes away as much (linear).",
        choices=("geometric", "linear"),
    )
    round_to: int = setting(1, "Widths are multiples of it, rounded up in between.", bounds=">= 1")
    step_shares: tuple[float, ...] = setting(
        (), "Share of distill.steps that each stage gets; empty: equal."
    )
    slim: Mapping[str, Any] = setting(
        {}, f"Further fields of every stage: {', '.join(_SLIM_FIELDS)}."
    )
    distill: Mapping[str, Any] = setting(
        {}, "Fields of every stage's training; steps is the sum over stages. Empty: none."
    )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TargetConfig:
        """Builds and checks a target; raises ValueError naming the field and its bound."""
        target = section(cls, raw, "target")
        # Ranked across a layer, experts are padded to the widest: no bound would be kept.
        check_names(target.slim, _SLIM_FIELDS, "target.slim.")
        given = [name for name in _SIZES if getattr(target, name) is not None]
        if len(given) != 1:
            raise ValueError(f"target needs exactly one of {_SIZES}, got {given or 'none'}")
        shares = target.step_shares
        if shares and (
            len(shares) != target.stages or not all(s > 0 for s in shares) or not target.distill
        ):
            raise ValueError(
                f"target.step_shares must be {target.stages} positive numbers and go with "
                f"target.distill, got {shares}"
            )
        steps = target.distill.get("steps", 0)
        if target.distill and (type(steps) is not int or steps < target.stages):
            raise ValueError(
                f"target.distill.steps must be at least one for each of {target.stages} stages, "
                f"got {steps!r}"
            )
        return target

    def stages_for(self, model: ModelConfig, seed: int = 0) -> tuple[StageConfig, ...]:
        """The stages that lead from ``model`` to the target; ``seed`` is the run's.

        Raises:
            ValueError: it cannot be reached, or the experts of ``model`` differ in width.
        """
        widths = {model.moe(i).expert_width for i in model.moe_layers}
        if len(widths) != 1:
            raise ValueError(f"a target needs experts of one width, got {sorted(widths)}")
        (start,) = widths
        groups = {layer.num_kv_heads for layer in model.layers}
        if self.kv_groups is not None and len(groups) != 1:
            raise ValueError(f"target.kv_groups needs layers with equal groups, got {groups}")
        end = self._final_width(model, start)
        end_groups = None if self.kv_groups is None else self._between(max(groups), self.kv_groups)
        stages = []
        for i, width in enumerate(self._between(start, end, self.round_to)):
            raw: dict[str, Any] = {"method": SLIM, "expert_width": width, **self.slim}
            if end_groups is not None:
                raw["kv_groups"] = end_groups[i]
            if self.distill:
                raw["distill"] = {**self.distill, "steps": self._steps(i)}
            stages.append(StageConfig.from_dict(raw, f"target, stage {i}", seed=seed + i))
        return tuple(stages)

    def _final_width(self, model: ModelConfig, start: int) -> int:
        """The widest multiple of ``round_to`` that meets the bound."""
        bounds: dict[str, Any] = {
            name: bound for name in _SIZES[:2] if (bound := getattr(self, name)) is not None
        }
        if self.ratio is not None:
            bounds = {"total_params": math.floor(count_params(model).total * self.ratio)}
        widest = start // self.round_to * self.round_to or None
        cut = Cut(SLIM, kv_groups=self.kv_groups, round_to=self.round_to, **bounds)
        cut = dataclasses.replace(cut, max_width=widest)
        try:
            return max(moe.expert_width for moe in _moes(foreseen(cut, model)))
        except ValueError as error:
            raise ValueError(f"target: {error}; kv_groups can be cut, too") from error

    def _between(self, start: int, end: int, step: int = 1) -> list[int]:
        """Sizes after each stage, from ``start`` to ``end``."""
        if not 1 <= end <= start:
            raise ValueError(f"target.kv_groups must be in [1, {start}], got {end}")
        sizes = []
        for i in range(1, self.stages + 1):
            share = i / self.stages
            exact = (
                start * (end / start) ** share
                if self.schedule == "geometric"
                else start + (end - start) * share
            )
            sizes.append(
                end if i == self.stages else min(start, math.ceil(exact / step - _ROUNDING) * step)
            )
        return sizes

    def _steps(self, stage: int) -> int:
        """Steps of one stage; rounded so that all stages add up to the whole."""
        shares = self.step_shares or (1.0,) * self.stages
        total = self.distill["steps"]
        before, after = (round(total * sum(shares[:n]) / sum(shares)) for n in (stage, stage + 1))
        return max(1, after - before)


def stage_table(
    stages: Sequence[StageConfig],
    training: TrainingConfig,
    model: ModelConfig,
    models: Sequence[ModelConfig],
) -> str:
    """What a run will do, stage by stage: sizes and tokens, as text for a terminal.

    Args:
        stages: of the run.
        training: its text, which says how many tokens a step takes.
        model: what it starts from.
        models: what each stage leaves, from ``RunConfig.check_against``.
    """
    header = ("stage", "width", "experts", "kv groups", "parameters", "active", "steps", "tokens")
    rows = [header, _row("start", model, None, 0)]
    for i, (stage, after) in enumerate(zip(stages, models, strict=True)):
        steps = stage.distill.steps if stage.distill else 0
        tokens = steps * training.batch_size * training.seq_len
        rows.append(_row(f"{i} {stage.method}", after, steps, tokens))
    return aligned(rows)


def _moes(model: ModelConfig) -> list[MoeConfig]:
    return [model.moe(i) for i in model.moe_layers]


def _row(name: str, model: ModelConfig, steps: int | None, tokens: int) -> tuple[str, ...]:
    counts = count_params(model)
    return (
        name,
        extent(model.moe(i).expert_width for i in model.moe_layers),
        extent(len(model.moe(i).expert_ids) for i in model.moe_layers),
        extent(layer.num_kv_heads for layer in model.layers),
        f"{counts.total:,}",
        f"{counts.active:,}",
        "" if steps is None else f"{steps:,}",
        "" if steps is None else f"{tokens:,}",
    )
