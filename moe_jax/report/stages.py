"""How a model got from the original to the result: its cuts and trainings, in numbers and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax.text import filled_columns, number, short_count, small_number

# Below so many points the table by domain says no more than that of the two models.
_FEWEST_POINTS = 3
_SHOWN_EXPERTS = 12
_POINT_HEADER = (
    "from stage to stage",
    "parameters",
    "bits per byte",
    "KL",
    "top-1",
    "tokens trained",
)
# Loss of a training -> what it is, in words.
_LOSSES = {
    "kd_topk": "cross-entropy with the original's {k}most likely tokens",
    "kd_topk_renormalized": "cross-entropy with the original's {k}most likely tokens, renormalised",
    "kd_topk_both": "KL divergence over the original's {k}most likely tokens",
    "kd_full": "KL divergence from the original's predictions",
    "reverse_kl": "reverse KL divergence from the original's predictions",
    "jensen_shannon": "Jensen-Shannon divergence from the original's predictions",
    "lm": "cross-entropy of the text itself",
}
# Weight of a training -> what it weighs, in words.
_EXTRAS = {
    "hidden_weight": "the distance between the hidden states of both",
    "router_weight": "the divergence between the routers of both",
    "balance_weight": "the load balance of the experts",
}


class Point(NamedTuple):
    """The model at one moment of its way.

    Attributes:
        label, short: what happened last, with and without its details.
        tokens: trained on so far; None if a training does not say.
        parameters: in all; None if unknown.
        evaluation: an EVALUATION of ``moe_jax.report``, or empty.
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


def stage_points(report: Mapping[str, Any]) -> list[Point]:
    """The original, then the model after each stage's cut and after its training.

    Empty unless a stage was trained, or measured. The last point is the report's ``after``.
    """
    stages = report.get("stages") or ()
    if not any(stage.get("training") or stage.get("evaluation") for stage in stages):
        return []
    before, after = report.get("before") or {}, report.get("after") or {}
    points = []
    if before:
        points.append(
            Point("original", "original", 0, _total(before), before.get("evaluation") or {})
        )
    tokens: int | None = 0
    for n, stage in enumerate(stages):
        measured = stage.get("evaluation") or {}
        # A training changes no size: what the last cut leaves is the result.
        parameters = _total(after) if n == len(stages) - 1 else _total(stage)
        if cuts(stage):
            method = str(stage.get("method") or "cut")
            name, short = f"stage {n}: {method}", f"stage {n}, cut"
            evaluation = measured.get("cut") or {}
            points.append(Point(f"{name}, cut", short, tokens, parameters, evaluation, name))
        if trains(stage):
            training = stage.get("training") or {}
            more = training.get("tokens")
            tokens = None if tokens is None or more is None else tokens + more
            verb = training_verb(training)
            label, short = f"stage {n}: {verb}", f"stage {n}, {verb}"
            label += f" ({short_count(more)} tokens)" if more is not None else ""
            evaluation = measured.get("trained") or {}
            points.append(Point(label, short, tokens, parameters, evaluation))
    last = points[-1]
    return [*points[:-1], last._replace(evaluation=after.get("evaluation") or last.evaluation)]


def _total(model: Mapping[str, Any]) -> int | None:
    return (model.get("parameters") or {}).get("total")


def cuts(stage: Mapping[str, Any]) -> bool:
    """Whether a stage removed anything."""
    if stage.get("method"):
        return stage["method"] != "distill"
    return bool(stage.get("layers")) or not trains(stage)


def trains(stage: Mapping[str, Any]) -> bool:
    return bool(stage.get("training") or (stage.get("evaluation") or {}).get("trained"))


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
    return filled_columns(_POINT_HEADER, rows) if rows else []


def domain_point_rows(points: Sequence[Point]) -> list[Sequence[str]]:
    """Bits per byte: a header, a row per domain and one for their mean; a column per point.

    Empty if fewer points were measured than would say more than the table of both models.
    """
    shown = [point for point in points if point.evaluation.get("domains")]
    if len(shown) < _FEWEST_POINTS:
        return []
    domains = list(dict.fromkeys(name for point in shown for name in point.evaluation["domains"]))
    rows: list[Sequence[str]] = [("domain", *(point.short for point in shown))]
    for name in domains:
        found = [point.evaluation["domains"].get(name) or {} for point in shown]
        rows.append((name, *(number(domain.get("bits_per_byte"), "{:.4f}") for domain in found)))
    means = [number(point.mean("bits_per_byte"), "{:.4f}") for point in shown]
    return [*rows, ("mean of domains", *means)]


def stage_title(stage: Mapping[str, Any]) -> str:
    """Such as ``slim``, ``slim and distillation``, ``distillation``."""
    parts = [str(stage["method"])] if cuts(stage) and stage.get("method") else []
    if trains(stage):
        parts.append(training_noun(stage.get("training") or {}))
    return " and ".join(parts)


def confidence_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What half of the calibration text would have kept, of all stages in one row; none if unknown.

    Of each stage, the share of the kept experts, all layers together.
    """
    shares = []
    for stage in report.get("stages") or ():
        found = (stage.get("confidence") or {}).get("convergence") or {}
        if len(found.get("shares") or ()) > 1:
            half, kept = found["common"][-2], found["kept"]
            weighted = sum(share * number for share, number in zip(half, kept, strict=True))
            shares.append(f"{weighted / sum(kept):.1%}")
    return [("kept set after half of the text", f"{', '.join(shares)} the same")] if shares else []


def coverage_sentence(coverage: Mapping[str, Any]) -> str:
    """Such as ``3 of 256 experts were chosen by fewer than 100 tokens: layer 0: 5 (12 tokens)...``.

    ``coverage`` is that of a CONFIDENCE of ``moe_jax.report``.
    """
    layer, expert, share = coverage["busiest"]
    most = (
        f"The busiest, expert {expert} of layer {layer}, was chosen by {share:.1%} of the tokens "
        f"({share / coverage['uniform']:.1f} times its even share)."
    )
    number, floor = coverage["num_few"], coverage["floor"]
    if not number:
        return f"Every expert was chosen by at least {floor} tokens. {most}"
    by_layer: dict[int, list[str]] = {}
    for i, e, tokens in coverage["few"][:_SHOWN_EXPERTS]:
        by_layer.setdefault(i, []).append(f"{e} ({tokens})")
    named = "; ".join(f"layer {i}: {', '.join(names)}" for i, names in by_layer.items())
    more = number - min(len(coverage["few"]), _SHOWN_EXPERTS)
    return (
        f"{number} of {coverage['experts']} experts were chosen by fewer than {floor} tokens: "
        f"{named}{f' and {more} more' if more else ''}. {most}"
    )


def unsure_sentence(unsure: Mapping[str, Any]) -> str:
    """Which experts other text of the same size might well have decided otherwise (bootstrap).

    ``unsure`` is that of a CONFIDENCE of ``moe_jax.report``.
    """
    number, experts = unsure["number"], unsure["experts"][:_SHOWN_EXPERTS]
    told = (
        f"With other text of this size, {number or 'no'} expert{'' if number == 1 else 's'} would "
        f"be on the other side with a probability of at least {unsure['probability']:.0%}"
    )
    named = ", ".join(
        f"layer {i} expert {e} ({'kept' if kept else 'removed'}, {probability:.0%})"
        for i, e, kept, probability in experts
    )
    more = f" and {number - len(experts)} more" if number > len(experts) else ""
    return f"{told}: {named}{more}." if named else f"{told}."


def training_noun(training: Mapping[str, Any]) -> str:
    return "distillation" if training_verb(training) == "distilled" else "training"


def training_verb(training: Mapping[str, Any]) -> str:
    """``distilled`` if the training looked at the original, else ``trained``."""
    settings = training.get("settings") or {}
    compares = settings.get("hidden_weight") or settings.get("router_weight")
    return "trained" if settings.get("loss") == "lm" and not compares else "distilled"


def training_sentences(training: Mapping[str, Any]) -> str:
    """How a stage was trained, for a reader who knows no setting's name."""
    settings = training.get("settings") or {}
    verb = training_verb(training)
    text = "Distilled from the original" if verb == "distilled" else "Trained"
    if training.get("tokens") is not None:
        text += f" on {training['tokens']:,} tokens"
    if training.get("steps") is not None:
        text += f" in {training['steps']:,} steps"
    text += "."
    if settings.get("loss"):
        text += f" Loss: {_loss_words(settings)}."
    if settings.get("learning_rate") is not None:
        text += f" Peak learning rate: {settings['learning_rate']:g}."
    return text


def _loss_words(settings: Mapping[str, Any]) -> str:
    kind = str(settings["loss"])
    k = f"{settings['top_k']} " if settings.get("top_k") else ""
    words = _LOSSES[kind].format(k=k) if kind in _LOSSES else kind
    if settings.get("lm_weight"):
        words += f", mixed with {settings['lm_weight']:.0%} cross-entropy of the text itself"
    for name, meaning in _EXTRAS.items():
        if settings.get(name):
            words += f", plus {settings[name]:g} times {meaning}"
    return words
