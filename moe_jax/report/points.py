"""How a model got from the original to the result: the points where it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax.report.facts import Report, Stage, Training
from moe_jax.text import filled_columns, number, short_count, small_number

# Below so many points the table by domain says no more than that of the two models.
_FEWEST_POINTS = 3
_HEADER = ("from stage to stage", "parameters", "bits per byte", "KL", "top-1", "tokens trained")


class Point(NamedTuple):
    """The model at one moment of its way.

    Attributes:
        label, short: what happened last, with and without its details.
        tokens: trained on so far; None if a training does not say.
        parameters: in all; None if unknown.
        evaluation: ``Evaluation.to_dict()``, or empty.
        cut: what cut led here, such as ``stage 0: slim``; empty after a training.
    """

    label: str
    short: str
    tokens: int | None
    parameters: int | None
    evaluation: Mapping[str, Any]
    cut: str = ""

    def mean(self, quantity: str) -> float | None:
        """Mean over domains, such as of ``bits_per_byte``; None if it was not measured."""
        return (self.evaluation.get("mean") or {}).get(quantity)


def stage_points(report: Report) -> list[Point]:
    """The original, then the model after each stage's cut and after its training.

    Empty unless a stage was trained, or measured. The last point is the report's ``after``.
    """
    stages = report.get("stages") or []
    if not any(stage.get("training") or stage.get("evaluation") for stage in stages):
        return []
    before, after = report.get("before") or {}, report.get("after") or {}
    points = []
    if before:
        evaluation = before.get("evaluation") or {}
        points.append(Point("original", "original", 0, _total(before), evaluation))
    tokens: int | None = 0
    for n, stage in enumerate(stages):
        measured = stage.get("evaluation") or {}
        # A training changes no size: what the last cut leaves is the result.
        parameters = _total(after if n == len(stages) - 1 else stage)
        if cuts(stage):
            name = f"stage {n}: {stage.get('method') or 'cut'}"
            evaluation = measured.get("cut") or {}
            short = f"stage {n}, cut"
            points.append(Point(f"{name}, cut", short, tokens, parameters, evaluation, name))
        if trains(stage):
            training = stage.get("training") or {}
            more = training.get("tokens")
            tokens = None if tokens is None or more is None else tokens + more
            verb = training_verb(training)
            label = f"stage {n}: {verb}"
            label += f" ({short_count(more)} tokens)" if more is not None else ""
            evaluation = measured.get("trained") or {}
            points.append(Point(label, f"stage {n}, {verb}", tokens, parameters, evaluation))
    last = points[-1]
    return [*points[:-1], last._replace(evaluation=after.get("evaluation") or last.evaluation)]


def _total(model: Mapping[str, Any]) -> int | None:
    return (model.get("parameters") or {}).get("total")


def cuts(stage: Stage) -> bool:
    """Whether a stage removed anything."""
    if stage.get("method"):
        return stage["method"] != "distill"
    return bool(stage.get("layers")) or not trains(stage)


def trains(stage: Stage) -> bool:
    return bool(stage.get("training") or (stage.get("evaluation") or {}).get("trained"))


def training_verb(training: Training) -> str:
    """``distilled`` if the training looked at the original, else ``trained``."""
    settings = training.get("settings") or {}
    compares = settings.get("hidden_weight") or settings.get("router_weight")
    return "trained" if settings.get("loss") == "lm" and not compares else "distilled"


def stage_title(stage: Stage) -> str:
    """Such as ``slim``, ``slim and distillation``, ``distillation``."""
    parts = [str(stage["method"])] if cuts(stage) and stage.get("method") else []
    if trains(stage):
        verb = training_verb(stage.get("training") or {})
        parts.append("distillation" if verb == "distilled" else "training")
    return " and ".join(parts)


def point_rows(points: Sequence[Point]) -> list[Sequence[str]]:
    """A header and a row per point, without columns that hold nothing; empty without points.

    Quality is the mean over domains. Parameters are shown where those of every point are known.
    """
    sized = all(point.parameters is not None for point in points)
    rows = [
        (
            point.label,
            number(point.parameters if sized else None, "{:,}"),
            number(point.mean("bits_per_byte"), "{:.4f}"),
            small_number(point.mean("kl")),
            number(point.mean("top1_agreement"), "{:.1%}"),
            number(point.tokens, "{:,}"),
        )
        for point in points
    ]
    return filled_columns(_HEADER, rows) if rows else []


def domain_point_rows(points: Sequence[Point]) -> list[Sequence[str]]:
    """Bits per byte: a header, a row per domain and one for their mean; a column per point.

    Empty if fewer points were measured than would say more than the table of both models.
    """
    shown = [point for point in points if point.evaluation.get("domains")]
    if len(shown) < _FEWEST_POINTS:
        return []
    rows: list[Sequence[str]] = [("domain", *(point.short for point in shown))]
    for name in dict.fromkeys(name for point in shown for name in point.evaluation["domains"]):
        found = [point.evaluation["domains"].get(name) or {} for point in shown]
        rows.append((name, *(number(domain.get("bits_per_byte"), "{:.4f}") for domain in found)))
    means = [number(point.mean("bits_per_byte"), "{:.4f}") for point in shown]
    return [*rows, ("mean of domains", *means)]
