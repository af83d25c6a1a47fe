"""From a size to end at to the stages that lead there, and the table of what they will do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_jax.config import ModelConfig
from moe_jax.params import count_params
from moe_jax.run.stage import StageConfig
from moe_jax.run.stage_checks import SLIM, check_choice
from moe_jax.settings import check_names, mapping, section
from moe_jax.text import aligned, extent

if TYPE_CHECKING:
    from moe_jax.run.config import RunConfig

_SIZES = ("total_params", "active_params", "ratio")
SCHEDULES = ("geometric", "linear")
_SLIM_FIELDS = ("importance", "aggregation", "group_importance")
_ROUNDING = 1e-9  # of powers: 27 * (1 / 27) ** (1 / 3) is 9


@dataclass(frozen=True)
class TargetConfig:
    """Where slimming ends, and in how many stages it gets there.

    Attributes:
        total_params, active_params, ratio: one of them: at most so many parameters, so many that
            a token reads (see ``params.ParameterCount``), or this share of all parameters. The
            widest experts that fit are taken.
        kv_groups: key/value groups that each layer ends with; None keeps them.
        stages: how many.
        schedule: sizes in between: ``geometric`` (each stage keeps the same share of what is
            there; what SlimMoE's released sizes suggest is not public) or ``linear``.
        round_to: widths are multiples of it, rounded up in between.
        step_shares: share of ``distill.steps`` that each stage gets; empty: equal.
        slim: further fields of every stage: ``importance``, ``aggregation``,
            ``group_importance``.
        distill: fields of every stage's training; ``steps`` is the sum over stages. Empty: none.
    """

    total_params: int | None = None
    active_params: int | None = None
    ratio: float | None = None
    kv_groups: int | None = None
    stages: int = 2
    schedule: str = "geometric"
    round_to: int = 1
    step_shares: tuple[float, ...] = ()
    slim: Mapping[str, Any] = field(default_factory=dict)
    distill: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TargetConfig:
        """Builds and checks a target; raises ValueError naming the field and its bound."""
        values = dict(raw)
        for name in ("slim", "distill"):
            values[name] = dict(mapping(values.get(name), f"target.{name}"))
        # Ranked across a layer, experts are padded to the widest: no bound would be kept.
        check_names(values["slim"], _SLIM_FIELDS, "target.slim.")
        target = section(cls, values, "target")
        given = [name for name in _SIZES if getattr(target, name) is not None]
        if len(given) != 1:
            raise ValueError(f"target needs exactly one of {_SIZES}, got {given or 'none'}")
        for name in _SIZES[:-1]:
            if getattr(target, name) is not None and getattr(target, name) < 1:
                raise ValueError(f"target.{name} must be at least 1, got {getattr(target, name)}")
        if target.ratio is not None and not 0 < target.ratio <= 1:
            raise ValueError(f"target.ratio must be in (0, 1], got {target.ratio}")
        for name in ("stages", "round_to"):
            if getattr(target, name) < 1:
                raise ValueError(f"target.{name} must be at least 1, got {getattr(target, name)}")
        check_choice("target.schedule", target.schedule, SCHEDULES)
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
        """The widest multiple of ``round_to`` that meets the bound, by bisection."""
        goal = StageConfig(SLIM, kv_groups=self.kv_groups)

        def size(width: int) -> int:
            counts = count_params(dataclasses.replace(goal, expert_width=width).after_cut(model))
            return counts.active if self.active_params is not None else counts.total

        bound = self.active_params or self.total_params
        if bound is None:
            assert self.ratio is not None
            bound = math.floor(count_params(model).total * self.ratio)
        low, high = 1, start // self.round_to
        if high < 1 or size(self.round_to) > bound:
            smallest = size(min(self.round_to, start))
            raise ValueError(
                f"target: experts of width {min(self.round_to, start)} leave {smallest:,} "
                f"parameters, more than the {bound:,} asked for; kv_groups can be cut, too"
            )
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if size(middle * self.round_to) <= bound else (low, middle - 1)
            )
        return low * self.round_to

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


def stage_table(run: RunConfig, model: ModelConfig, models: Sequence[ModelConfig]) -> str:
    """What a run will do, stage by stage: sizes and tokens, as text for a terminal.

    Args:
        run: with stages.
        model: what it starts from.
        models: what each stage leaves, from ``run.check_against``.
    """
    header = ("stage", "width", "experts", "kv groups", "parameters", "active", "steps", "tokens")
    rows = [header, _row("start", model, None, 0)]
    for i, (stage, after) in enumerate(zip(run.stages, models, strict=True)):
        steps = stage.distill.steps if stage.distill else 0
        tokens = steps * run.training.batch_size * run.training.seq_len
        rows.append(_row(f"{i} {'plan' if stage.plan else stage.method}", after, steps, tokens))
    return aligned(rows)


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
