"""What a report says of one stage: its cut, the evidence for it, its training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from moe_jax.confidence import coverage_sentence, unsure_sentence
from moe_jax.report.elements import PAGE, Bullets, Element, Facts, Figure, Paragraph, Table
from moe_jax.report.facts import Confidence, Layer, Stage, Training, gone_ids, merged_ids
from moe_jax.report.figures import confidence, experts, quality
from moe_jax.report.points import cuts, stage_title, training_verb
from moe_jax.text import MISSING, filled_columns, number, spans

# Panels of one figure; of deeper models so many layers are shown, evenly spaced.
_MAX_PANELS = 16
_LAYER_HEADER = (
    "layer", "experts", "kept", "constants", "merged", "width", "shared width", "kv groups",
    "routing kept", "importance kept", "experts that did not stay",
)  # fmt: skip
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


def stage_heading(n: int, stage: Stage) -> str:
    title = stage_title(stage)
    return f"Stage {n}: {title}" if title else f"Stage {n}"


def stage_parts(stage: Stage) -> list:
    layers, training = stage.get("layers") or [], stage.get("training") or {}
    return [
        lambda _: _cut(stage),
        lambda _: _experts_figures(layers),
        lambda _: _routing_figure(layers),
        lambda _: _neurons_figure(layers),
        lambda _: _layer_table(layers),
        lambda _: _thin_evidence(layers),
        lambda _: _confidence(stage.get("confidence") or {}),
        lambda _: _training(training),
        lambda _: _training_figure(training),
    ]


def _cut(stage: Stage) -> Iterator[Element]:
    if stage.get("kept") and cuts(stage):
        yield Paragraph(f"Kept: {stage['kept']}.")
    if stage.get("settings"):
        yield Facts({k: plain_text(v) for k, v in stage["settings"].items()})


def _experts_figures(layers: Sequence[Layer]) -> Iterator[Element]:
    scattered, note = _some(experts.with_experts(layers))
    if scattered:
        caption = "Each point is an expert."
        if any(map(gone_ids, layers)):
            caption += (
                " Those to the lower left are used little and answer nearly the same whatever they "
                "are given."
            )
        yield Figure(partial(experts.plot_experts, scattered), caption + note)
    if scored := [layer for layer in layers if layer.get("score")]:
        caption = "Score of every expert, by which the stage ranked them."
        yield Figure(partial(experts.plot_scores, scored), caption)


def _routing_figure(layers: Sequence[Layer]) -> Iterator[Element]:
    routed, note = _some([layer for layer in layers if layer.get("frequency")])
    if routed:
        caption = (
            "How often each domain selects each expert before the cut, against uniform use. "
            f"Specialised experts line up along the diagonal.{note}"
        )
        draw = partial(experts.plot_routing_by_domain, routed)
        yield Figure(draw, caption, title="Routing by domain")


def _neurons_figure(layers: Sequence[Layer]) -> Iterator[Element]:
    curves, note = _some([layer for layer in layers if layer.get("importance")])
    if curves:
        caption = (
            "Median over a layer's experts, with the range that holds 80% of them. The neurons "
            f"beyond the line were cut.{note}"
        )
        yield Figure(partial(experts.plot_neuron_importance, curves), caption)


def _some(layers: Sequence[Layer]) -> tuple[list[Layer], str]:
    """At most ``_MAX_PANELS`` layers, and a sentence that says so where some were left out."""
    if len(layers) <= _MAX_PANELS:
        return list(layers), ""
    picks = np.linspace(0, len(layers) - 1, _MAX_PANELS).round().astype(int)
    note = f" {_MAX_PANELS} of {len(layers)} layers are shown; report.json holds all."
    return [layers[i] for i in picks], note


def _layer_table(layers: Sequence[Layer]) -> Iterator[Element]:
    if not layers:
        return
    rows = filled_columns(_LAYER_HEADER, [_layer_cells(layer) for layer in layers])
    folded = f"All {len(layers)} layers" if len(layers) > _MAX_PANELS else ""
    prose = rows[0][-1] == _LAYER_HEADER[-1]
    yield Table(rows, prose=prose, folded=folded, on=(PAGE,))


def _layer_cells(layer: Layer) -> list[str]:
    gone, merged = gone_ids(layer), merged_ids(layer)
    num_experts, importance = layer.get("num_experts"), layer.get("importance")
    mass = layer.get("routing_mass") or layer.get("count")
    lost = {*gone} - {*merged}  # what was merged is stood for
    kept = 1 - sum(mass[e] for e in lost) / max(sum(mass), 1e-30) if mass and lost else None
    own = [width for width in layer.get("widths") or () if width]
    width = _change(layer.get("expert_width"))
    return [
        str(layer["layer"]),
        number(num_experts, "{}"),
        number(None if num_experts is None else num_experts - len(gone), "{}"),
        number(len(layer.get("novices") or ()) or None, "{}"),
        number(len(merged) or None, "{}"),
        f"{layer['expert_width'][0]} → {min(own)} to {max(own)}" if own else width,
        _change(layer.get("shared_width")),
        _change(layer.get("kv_groups")),
        number(kept, "{:.1%}"),
        number(float(np.mean(importance["kept_share"])) if importance else None, "{:.1%}"),
        spans(gone) or MISSING,
    ]


def _change(sizes: Sequence[int] | None) -> str:
    return f"{sizes[0]} → {sizes[1]}" if sizes and sizes[0] != sizes[1] else MISSING


def _thin_evidence(layers: Sequence[Layer]) -> Iterator[Element]:
    """Experts that the text says little or nothing of."""
    if unreached := experts_named(layers, unreached_ids):
        yield Bullets(unreached, title="Experts that calibration never reached")
    elif any(layer.get("count") for layer in layers):
        yield Paragraph("Calibration reached every expert.", note=True, on=(PAGE,))
    if few := experts_named(layers, lambda layer: layer.get("fewer_tokens_than_neurons") or ()):
        yield Bullets(few, title="Experts with fewer tokens than neurons")
        yield Paragraph(
            "Their second moments are singular, and the ridge decides what the text leaves open."
        )


def unreached_ids(layer: Layer) -> Sequence[int]:
    """Experts that no calibration token was routed to."""
    known = layer.get("unreached")
    return [e for e, n in enumerate(layer.get("count") or ()) if n == 0] if known is None else known


def experts_named(layers: Sequence[Layer], ids_of) -> list[str]:
    """``layer 3: experts 1, 5`` for each layer of which ``ids_of`` gives experts."""
    found = [(layer["layer"], ids) for layer in layers if (ids := ids_of(layer))]
    return [f"layer {i}: expert{'s' * (len(ids) > 1)} {spans(ids)}" for i, ids in found]


def _confidence(told: Confidence) -> Iterator[Element]:
    title = "Whether the text was enough"
    if told.get("verdict"):
        yield Paragraph(str(told["verdict"]), title=title)
        title = ""
    if coverage := told.get("coverage"):
        caption = (
            f"Left of the line, experts with fewer than {coverage['floor']} tokens, whose scores "
            "are rough."
        )
        if confidence.shows_convergence(told):
            caption += (
                " On the right, what parts of the text would have kept: all layers together, and "
                "the range of single layers."
            )
        yield Figure(partial(confidence.plot_confidence, told), caption, title=title)
        yield Paragraph(coverage_sentence(coverage), on=(PAGE,))
    if told.get("unsure"):
        yield Paragraph(unsure_sentence(told["unsure"]), on=(PAGE,))


def _training(training: Training) -> Iterator[Element]:
    if not training:
        return
    noun = "Distillation" if training_verb(training) == "distilled" else "Training"
    yield Paragraph(training_sentences(training), title=noun)
    told = {name: plain_text(value) for name, value in (training.get("settings") or {}).items()}
    if training.get("tokens_per_second") is not None:
        told["tokens per second"] = f"{training['tokens_per_second']:,.0f}"
    if told:
        yield Facts(told)


def _training_figure(training: Training) -> Iterator[Element]:
    if quality.shown_parts(quality.thin(training.get("metrics") or ())):
        caption = quality.training_caption(training)
        yield Figure(partial(quality.plot_training, training), caption)


def training_sentences(training: Training) -> str:
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
    words = _LOSSES.get(kind, kind.replace("{", "{{").replace("}", "}}")).format(k=k)
    if settings.get("lm_weight"):
        words += f", mixed with {settings['lm_weight']:.0%} cross-entropy of the text itself"
    weighed = [name for name in _EXTRAS if settings.get(name)]
    return words + "".join(f", plus {settings[n]:g} times {_EXTRAS[n]}" for n in weighed)


def plain_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
