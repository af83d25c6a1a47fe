"""What a report says, section by section; the page, the model card and the terminal render it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from moe_jax.confidence import coverage_sentence, unsure_sentence
from moe_jax.report.elements import (
    CARD,
    PAGE,
    TERMINAL,
    Bullets,
    Code,
    Document,
    Element,
    Facts,
    Figure,
    Paragraph,
    Table,
    section,
)
from moe_jax.report.facts import (
    Confidence,
    Layer,
    Output,
    Report,
    Stage,
    Training,
    gone_ids,
    merged_ids,
)
from moe_jax.report.figures import confidence, experts, quality
from moe_jax.report.points import (
    cuts,
    domain_point_rows,
    point_rows,
    stage_points,
    stage_title,
    training_verb,
)
from moe_jax.text import (
    MISSING,
    byte_size,
    filled_columns,
    number,
    relative_change,
    small_number,
    spans,
)

# Panels of one figure; of deeper models so many layers are shown, evenly spaced.
_MAX_PANELS = 16
# A table with more columns than these is too wide for a card.
_CARD_COLUMNS = 7
_HASH_DIGITS = 16
_EVERYWHERE = (PAGE, CARD, TERMINAL)

_SIZES: dict[str, tuple[str, float, Sequence[str]]] = {
    "parameters": ("{:,}", 1, ("parameters", "total")),
    "active per token": ("{:,}", 1, ("parameters", "active")),
    "in experts": ("{:,}", 1, ("parameters", "experts")),
    "weights, MB": ("{:,.1f}", 1e-6, ("bytes",)),
    "perplexity": ("{:,.2f}", 1, ("evaluation", "total", "perplexity")),
    "bits per byte": ("{:.4f}", 1, ("evaluation", "total", "bits_per_byte")),
    "tokens per second": ("{:,.0f}", 1, ("evaluation", "tokens_per_second")),
}
_DOMAIN_HEADER = (
    "domain", "ppl before", "ppl after", "bpb before", "bpb after", "change", "KL", "top-1",
)  # fmt: skip
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


def document(report: Report) -> Document:
    """All that a report says; sections whose data are absent are left out."""
    lost: list[str] = []
    stages = report.get("stages") or []
    points = stage_points(report)
    listed: list[tuple[str, list]] = [
        ("Size and quality", [_sizes, _convergence]),
        ("Quality on held-out text", [_quality_figures, _domains]),
        ("From stage to stage", [lambda _: _stages_figure(points), lambda _: _points(points)]),
        *((_stage_heading(n, stage), _stage_parts(stage)) for n, stage in enumerate(stages)),
        ("Loading the result", [_loading]),
        ("How this was run", [_run_facts, _wall_time, _texts, _configuration]),
    ]
    made = [section(title, [partial(p, report) for p in parts], lost) for title, parts in listed]
    return Document(
        str(report.get("name") or "Compressed Mixture-of-Experts model"),
        _subtitle(report),
        [s for s in made if s.content],
        [*(report.get("warnings") or ()), *lost],
    )


def _subtitle(report: Report) -> str:
    """Such as ``from OLMoE · olmoe · mone then slim``; equal stages are counted."""
    source = report.get("source") or {}
    origin = source.get("id") or source.get("path")
    titles = [title for stage in report.get("stages") or () if (title := stage_title(stage))]
    way = " then ".join(titles)
    if len(titles) > 1 and len(set(titles)) == 1:
        way = f"{titles[0]}, in {len(titles)} stages"
    return " · ".join(filter(None, [origin and f"from {origin}", source.get("family"), way]))


def _get(tree: Any, *path: str) -> Any:
    for key in path:
        tree = (tree or {}).get(key)
    return tree


def _plain_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# Sizes and quality


def _sizes(report: Report) -> Iterator[Element]:
    rows = []
    for label, (form, scale, path) in _SIZES.items():
        sides = [_get(report, side, *path) for side in ("before", "after")]
        if sides != [None, None]:
            cells = [number(None if v is None else v * scale, form) for v in sides]
            rows.append((label, *cells, relative_change(*sides) or ""))
    total = _get(report, "after", "evaluation", "total") or {}
    distances = {
        "KL to the original, nats/token": small_number(total.get("kl")),
        "top-1 agreement": number(total.get("top1_agreement"), "{:.2%}"),
    }
    rows += [(label, "", text, "") for label, text in distances.items() if text != MISSING]
    if rows:
        header = ("", "before", "after", "change")
        yield Table([header, *rows], tiles=True, on=_EVERYWHERE)


def _convergence(report: Report) -> Iterator[Element]:
    """What half of the calibration text would have kept of each stage, all layers together."""
    shares = []
    for stage in report.get("stages") or ():
        found = _get(stage, "confidence", "convergence") or {}
        if len(found.get("shares") or ()) > 1:
            shares.append(f"{np.average(found['common'][-2], weights=found['kept']):.1%}")
    if shares:
        told = {"kept set after half of the text": f"{', '.join(shares)} the same"}
        yield Facts(told, on=(TERMINAL,))


def _quality_figures(report: Report) -> Iterator[Element]:
    sides = {"original": "before", "compressed": "after"}
    series = {
        label: bits
        for label, side in sides.items()
        if (bits := _by_domain(report, side, "bits_per_byte"))
    }
    if series:
        caption = "What each domain's text costs, and the change."
        yield Figure(partial(quality.plot_bits_per_byte, series), caption)
    if divergence := _by_domain(report, "after", "kl"):
        caption = "How far the predictions moved, whether they got worse or not."
        yield Figure(partial(quality.plot_kl, divergence), caption)


def _by_domain(report: Report, side: str, quantity: str) -> dict[str, float]:
    """What was measured, and finite, in each domain."""
    domains = _get(report, side, "evaluation", "domains") or {}
    return {n: d[quantity] for n, d in domains.items() if d.get(quantity) is not None}


def _domains(report: Report) -> Iterator[Element]:
    before, after = (_get(report, side, "evaluation") or {} for side in ("before", "after"))
    sides = [before.get("domains") or {}, after.get("domains") or {}]
    domains = list(dict.fromkeys([*sides[0], *sides[1]]))
    rows = [_domain_row(name, *(side.get(name) or {} for side in sides)) for name in domains]
    if len(domains) > 1:
        for label, key in (("all text", "total"), ("mean of domains", "mean")):
            rows.append(_domain_row(label, before.get(key) or {}, after.get(key) or {}))
    if rows:
        yield Table([_DOMAIN_HEADER, *rows], totals=len(rows) - len(domains), on=_EVERYWHERE)
        yield Paragraph(
            "ppl: perplexity. bpb: bits per byte. KL: divergence of the next-token distribution "
            "from the original's, nats per token. top-1: share of positions where both rank the "
            "same token first.",
            note=True,
        )


def _domain_row(label: str, before: Mapping, after: Mapping) -> Sequence[str]:
    bits = before.get("bits_per_byte"), after.get("bits_per_byte")
    return (
        label,
        *(number(side.get("perplexity"), "{:,.2f}") for side in (before, after)),
        *(number(value, "{:.4f}") for value in bits),
        relative_change(*bits) or MISSING,
        small_number(after.get("kl")),
        number(after.get("top1_agreement"), "{:.1%}"),
    )


def _stages_figure(points: Sequence) -> Iterator[Element]:
    if quality.shows_stages(points):
        caption = "What each cut costs and what training wins back: held-out text after each step."
        yield Figure(partial(quality.plot_stages, points), caption)


def _points(points: Sequence) -> Iterator[Element]:
    if not points:
        return
    yield Table(point_rows(points), totals=1, on=_EVERYWHERE)
    yield Paragraph(
        "Quality is the mean over domains; KL in nats per token and top-1 compare with the "
        "original. Tokens are those of all trainings so far.",
        note=True,
    )
    if rows := domain_point_rows(points):
        on = (PAGE, CARD) if len(rows[0]) <= _CARD_COLUMNS else (PAGE,)
        yield Table(rows, totals=1, on=on, title="Bits per byte by domain")


# One stage


def _stage_heading(n: int, stage: Stage) -> str:
    title = stage_title(stage)
    return f"Stage {n}: {title}" if title else f"Stage {n}"


def _stage_parts(stage: Stage) -> list:
    layers, training = stage.get("layers") or [], stage.get("training") or {}
    parts = (
        lambda _: _cut(stage),
        lambda _: _experts_figures(layers),
        lambda _: _routing_figure(layers),
        lambda _: _neurons_figure(layers),
        lambda _: _layer_table(layers),
        lambda _: _thin_evidence(layers),
        lambda _: _confidence(stage.get("confidence") or {}),
        lambda _: _training(training),
        lambda _: _training_figure(training),
    )
    return list(parts)


def _cut(stage: Stage) -> Iterator[Element]:
    if stage.get("kept") and cuts(stage):
        yield Paragraph(f"Kept: {stage['kept']}.")
    if stage.get("settings"):
        yield Facts({k: _plain_text(v) for k, v in stage["settings"].items()})


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
    told = {name: _plain_text(value) for name, value in (training.get("settings") or {}).items()}
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


# The result, and how it came about


def _loading(report: Report) -> Iterator[Element]:
    loader = report.get("loader")
    if loader is None:
        return
    remote = ", trust_remote_code=True" if loader.get("trust_remote_code") else ""
    place = str((report.get("output") or {}).get("path") or "FOLDER")
    for medium, folder in ((PAGE, json.dumps(place)), (CARD, '"."  # this folder')):
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"folder = {folder}\n"
            f"model = AutoModelForCausalLM.from_pretrained(folder{remote})\n"
            "tokenizer = AutoTokenizer.from_pretrained(folder)"
        )
        yield Code(code, "python", on=(medium,))
    if serve := loader.get("serve"):
        yield Code(serve, "bash")
    jax_line = "In JAX: config, params = moe_jax.load_hf(folder)."
    storage = (report.get("output") or {}).get("storage") or ()
    yield Bullets([*(loader.get("notes") or ()), *storage, jax_line])


def _run_facts(report: Report) -> Iterator[Element]:
    source, output = report.get("source") or {}, report.get("output") or {}
    peak = report.get("peak_memory_mib")
    told = {
        "command": report.get("command"),
        "seed": report.get("seed"),
        "source": source.get("id") or source.get("path"),
        "digest of the source": source.get("digest"),
        "output": output.get("path"),
        "tensors of the source": _account(output),
        "read back": _read_back(output),
        "peak memory": None if peak is None else f"{peak:,.0f} MiB",
        **(report.get("environment") or {}),
    }
    if facts := {key: _plain_text(value) for key, value in told.items() if value is not None}:
        yield Facts(facts)
    seconds = report.get("seconds") or {}
    summed = {
        "peak memory, MiB": number(peak, "{:,.0f}"),
        "wall time, s": number(sum(seconds.values()) if seconds else None, "{:,.1f}"),
    }
    if facts := {label: text for label, text in summed.items() if text != MISSING}:
        yield Facts(facts, on=(TERMINAL,))


def _account(output: Output) -> str | None:
    counts = output.get("tensors") or {}
    return ", ".join(f"{count:,} {outcome}" for outcome, count in counts.items()) or None


def _read_back(output: Output) -> str | None:
    told = []
    if (nbytes := output.get("compared_bytes")) is not None:
        told.append(f"{byte_size(nbytes)} equal to the source to the bit")
    if (difference := output.get("logit_difference")) is not None:
        told.append(f"logits of {output.get('logit_tokens')} tokens within {difference:.1e}")
    return "; ".join(told) or None


def _wall_time(report: Report) -> Iterator[Element]:
    if seconds := report.get("seconds"):
        rows = [(step, f"{value:,.1f}") for step, value in seconds.items()]
        total = ("total", f"{sum(seconds.values()):,.1f}")
        header = ("step", "seconds")
        yield Table([header, *rows, total], totals=1, on=(PAGE,), title="Wall time")


def _texts(report: Report) -> Iterator[Element]:
    for kind, files in (report.get("data") or {}).items():
        rows = [(name, str(digest)[:_HASH_DIGITS]) for name, digest in files.items()]
        if rows:
            header = ("file", f"sha256, first {_HASH_DIGITS} digits")
            yield Table([header, *rows], title=f"{str(kind).capitalize()} text")


def _configuration(report: Report) -> Iterator[Element]:
    if report.get("config"):
        text = json.dumps(report["config"], indent=2)
        yield Code(text, folded="Configuration", on=(PAGE,))
