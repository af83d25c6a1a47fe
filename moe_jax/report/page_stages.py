"""The page's sections on stages: the way from the original to the result, and each one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from moe_jax.report import figures
from moe_jax.report.elements import facts_html, figure_html, plain_text, table_html
from moe_jax.report.figures.confidence import plot_confidence, shows_convergence
from moe_jax.report.stages import (
    coverage_sentence,
    cuts,
    domain_point_rows,
    point_rows,
    stage_points,
    stage_title,
    training_noun,
    training_sentences,
    unsure_sentence,
)
from moe_jax.report.tables import (
    gone_ids,
    merged_ids,
    underdetermined_experts,
    unreached_experts,
)
from moe_jax.text import MISSING, filled_columns, number, spans

# Panels of one figure; of deeper models so many layers are shown, evenly spaced.
_MAX_PANELS = 16


def stage_sections(report: Mapping[str, Any]) -> list[str]:
    """Sections for what there is: all stages together, then one by one."""
    stages = report.get("stages") or ()
    return [_way(report), *(_stage(n, stage) for n, stage in enumerate(stages))]


def _way(report: Mapping[str, Any]) -> str:
    points = stage_points(report)
    if not points:
        return ""
    parts = ["<h2>From stage to stage</h2>"]
    if figures.shows_stages(points):
        parts.append(
            figure_html(
                lambda dark: figures.plot_stages(points, dark=dark),
                "What each cut costs and what training wins back: held-out text after each step.",
            )
        )
    header, *rows = point_rows(points)
    body = [("total" if row is rows[-1] else "", row) for row in rows]
    parts.append(table_html(header, body))
    parts.append(
        '<p class="note">Quality is the mean over domains; KL in nats per token and top-1 compare '
        "with the original. Tokens are those of all trainings so far.</p>"
    )
    by_domain = domain_point_rows(points)
    if by_domain:
        header, *rows = by_domain
        body = [("total" if row is rows[-1] else "", row) for row in rows]
        parts.append("<h3>Bits per byte by domain</h3>" + table_html(header, body, kind="wide"))
    return "".join(parts)


def _stage(n: int, stage: Mapping[str, Any]) -> str:
    layers = stage.get("layers") or []
    title = stage_title(stage)
    parts = [f"<h2>Stage {n}{': ' if title else ''}{escape(title)}</h2>"]
    if stage.get("kept") and cuts(stage):
        parts.append(f"<p>{escape(str(stage['kept']))}</p>")
    if stage.get("settings"):
        parts.append(facts_html({k: plain_text(v) for k, v in stage["settings"].items()}))
    parts += _stage_figures(layers)
    if layers:
        parts.append(_layer_table(layers))
    unreached = unreached_experts(stage)
    if unreached:
        items = "".join(f"<li>{escape(line)}</li>" for line in unreached)
        parts.append(f"<h3>Experts that calibration never reached</h3><ul>{items}</ul>")
    elif any(layer.get("count") for layer in layers):
        parts.append('<p class="note">Calibration reached every expert.</p>')
    few = underdetermined_experts(stage)
    if few:
        items = "".join(f"<li>{escape(line)}</li>" for line in few)
        parts.append(
            "<h3>Experts with fewer tokens than neurons</h3><p>Their second moments are singular, "
            f"and the ridge decides what the text leaves open.</p><ul>{items}</ul>"
        )
    parts.append(_confidence(stage.get("confidence") or {}))
    return "".join(parts) + _training(stage.get("training") or {})


def _confidence(confidence: Mapping[str, Any]) -> str:
    parts = [f"<p>{escape(str(confidence['verdict']))}</p>"] if confidence.get("verdict") else []
    if confidence.get("coverage"):
        caption = (
            f"Left of the line, experts with fewer than {confidence['coverage']['floor']} tokens, "
            "whose scores are rough."
        )
        if shows_convergence(confidence):
            caption += (
                " On the right, what parts of the text would have kept: all layers together, and "
                "the range of single layers."
            )
        parts.append(figure_html(lambda dark: plot_confidence(confidence, dark=dark), caption))
        parts.append(f"<p>{escape(coverage_sentence(confidence['coverage']))}</p>")
    if confidence.get("unsure"):
        parts.append(f"<p>{escape(unsure_sentence(confidence['unsure']))}</p>")
    return "<h3>Whether the text was enough</h3>" + "".join(parts) if parts else ""


def _training(training: Mapping[str, Any]) -> str:
    if not training:
        return ""
    parts = [f"<h3>{training_noun(training).capitalize()}</h3>"]
    parts.append(f"<p>{escape(training_sentences(training))}</p>")
    told = {name: plain_text(value) for name, value in (training.get("settings") or {}).items()}
    if training.get("tokens_per_second") is not None:
        told["tokens per second"] = f"{training['tokens_per_second']:,.0f}"
    if told:
        parts.append(facts_html(told))
    if figures.shows_training(training):
        parts.append(
            figure_html(
                lambda dark: figures.plot_training(training, dark=dark),
                figures.training_caption(training),
            )
        )
    return "".join(parts)


def _stage_figures(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    parts = []
    scattered, note = spread(figures.layers_with_experts(layers))
    if scattered:
        chosen = any(map(gone_ids, layers))
        selection = (
            " Those to the lower left are used little and answer nearly the same whatever they "
            "are given."
            if chosen
            else ""
        )
        parts.append(
            figure_html(
                lambda dark: figures.plot_experts(scattered, dark=dark),
                f"Each point is an expert.{selection}{note}",
            )
        )
    scored = [layer for layer in layers if layer.get("score")]
    if scored:
        parts.append(
            figure_html(
                lambda dark: figures.plot_scores(scored, dark=dark),
                "Score of every expert, by which the stage ranked them.",
            )
        )
    curves, note = spread([layer for layer in layers if layer.get("importance")])
    if curves:
        parts.append(
            figure_html(
                lambda dark: figures.plot_neuron_importance(curves, dark=dark),
                "Median over a layer's experts, with the range that holds 80% of them. The "
                f"neurons beyond the line were cut.{note}",
            )
        )
    return parts


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> str:
    header = (
        "layer",
        "experts",
        "kept",
        "constants",
        "merged",
        "width",
        "kv groups",
        "routing kept",
        "importance kept",
    )
    columns, *rows = filled_columns(header, [_layer_cells(layer) for layer in layers])
    gone = [spans(gone_ids(layer)) for layer in layers]
    body = [("", cells) for cells in rows]
    table = table_html(columns, body, ("experts that did not stay", gone) if any(gone) else None)
    if len(layers) <= _MAX_PANELS:
        return table
    return f"<details><summary>All {len(layers)} layers</summary>{table}</details>"


def _layer_cells(layer: Mapping[str, Any]) -> list[str]:
    num_experts = layer.get("num_experts")
    gone = gone_ids(layer)
    importance = layer.get("importance")
    mass = layer.get("routing_mass") or layer.get("count")
    merged = merged_ids(layer)
    lost = set(gone) - set(merged)  # what was merged is stood for
    routing_kept = None
    if mass and lost:
        routing_kept = 1 - sum(mass[e] for e in lost) / max(sum(mass), 1e-30)
    return [
        str(layer["layer"]),
        number(num_experts, "{}"),
        number(None if num_experts is None else num_experts - len(gone), "{}"),
        number(len(layer["novices"]) if layer.get("novices") else None, "{}"),
        number(len(merged) or None, "{}"),
        _widths(layer),
        _change(layer.get("kv_groups")),
        number(routing_kept, "{:.1%}"),
        number(float(np.mean(importance["kept_share"])) if importance else None, "{:.1%}"),
    ]


def _widths(layer: Mapping[str, Any]) -> str:
    """Such as 64 → 16; of experts that differ, from the narrowest to the widest."""
    own = [width for width in layer.get("widths") or () if width]
    if not own:
        return _change(layer.get("expert_width"))
    return f"{layer['expert_width'][0]} → {min(own)} to {max(own)}"


def _change(sizes: Sequence[int] | None) -> str:
    return f"{sizes[0]} → {sizes[1]}" if sizes and sizes[0] != sizes[1] else MISSING


def spread(layers: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """At most ``_MAX_PANELS`` layers, and a sentence that says so where some were left out."""
    if len(layers) <= _MAX_PANELS:
        return list(layers), ""
    picks = np.linspace(0, len(layers) - 1, _MAX_PANELS).round().astype(int)
    note = f" {_MAX_PANELS} of {len(layers)} layers are shown; report.json holds all."
    return [layers[i] for i in picks], note
