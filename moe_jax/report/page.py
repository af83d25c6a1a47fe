"""The report as one HTML file: no script, no request, light and dark, from phone to desk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from moe_jax.report import figures
from moe_jax.report.elements import facts_html, figure_html, plain_text, table_html
from moe_jax.report.page_stages import spread, stage_sections
from moe_jax.report.stages import stage_title
from moe_jax.report.style import page_style
from moe_jax.report.tables import (
    DOMAIN_HEADER,
    domain_rows,
    headline_rows,
    run_rows,
)
from moe_jax.text import MISSING

# Two rows of four on a wide page: what it costs, then how well it does.
_TILES = (
    "parameters",
    "active per token",
    "weights, MB",
    "tokens per second",
    "bits per byte",
    "perplexity",
    "KL to the original, nats/token",
    "top-1 agreement",
)


def report_html(report: Mapping[str, Any]) -> str:
    """The whole page; sections whose data are absent are left out.

    Figures are part of it, and a content security policy forbids it to load or run anything.
    """
    name = str(report.get("name") or "Compression report")
    sections = [
        _heading(report, name),
        _tiles(report),
        _warnings(report),
        _quality(report),
        *stage_sections(report),
        _routing(report),
        _loading(report),
        _provenance(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escape(name)}</title><style>{page_style()}</style></head><body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def _heading(report: Mapping[str, Any], name: str) -> str:
    source = report.get("source") or {}
    origin = source.get("id") or source.get("path")
    parts = [f"from {origin}"] if origin else []
    parts += [str(source["family"])] if source.get("family") else []
    parts += [_way(report.get("stages") or ())]
    return f'<h1>{escape(name)}</h1><p class="sub">{escape(" · ".join(filter(None, parts)))}</p>'


def _way(stages: Sequence[Mapping[str, Any]]) -> str:
    """Such as ``mone then slim`` or ``slim and distillation, in 3 stages``."""
    titles = [title for stage in stages if (title := stage_title(stage))]
    if len(titles) > 1 and len(set(titles)) == 1:
        return f"{titles[0]}, in {len(titles)} stages"
    return " then ".join(titles)


def _tiles(report: Mapping[str, Any]) -> str:
    tiles = []
    for label, before, after, change in headline_rows(report):
        value = after if after != MISSING else before
        tiles.append((label, value, f"was {before} ({change})" if change else ""))
    tiles += [(label, value, "") for label, value in run_rows(report)]
    by_label = {label: _tile(label, value, was) for label, value, was in tiles}
    chosen = "".join(by_label[label] for label in _TILES if label in by_label)
    return f'<dl class="tiles">{chosen}</dl>' if chosen else ""


def _tile(label: str, value: str, was: str) -> str:
    below = f'<dd class="was">{escape(was)}</dd>' if was else ""
    return (
        f'<div class="tile"><dt>{escape(label)}</dt>'
        f'<dd class="value">{escape(value)}</dd>{below}</div>'
    )


def _warnings(report: Mapping[str, Any]) -> str:
    items = "".join(f"<li>{escape(str(w))}</li>" for w in report.get("warnings") or ())
    return f'<div class="warnings"><strong>Warnings</strong><ul>{items}</ul></div>' if items else ""


def _quality(report: Mapping[str, Any]) -> str:
    rows = domain_rows(report)
    if not rows:
        return ""
    sides = {"original": "before", "compressed": "after"}
    series = {
        label: bits
        for label, side in sides.items()
        if (bits := _by_domain(report, side, "bits_per_byte"))
    }
    divergence = _by_domain(report, "after", "kl")
    parts = ["<h2>Quality on held-out text</h2>"]
    if series:
        parts.append(
            figure_html(
                lambda dark: figures.plot_bits_per_byte(series, dark=dark),
                "What each domain's text costs, and the change.",
            )
        )
    if divergence:
        parts.append(
            figure_html(
                lambda dark: figures.plot_kl(divergence, dark=dark),
                "How far the predictions moved, whether they got worse or not.",
            )
        )
    totals = {"all text", "mean of domains"}
    body = [("total" if row.domain in totals else "", list(row)) for row in rows]
    parts.append(table_html(DOMAIN_HEADER, body))
    parts.append(
        '<p class="note">KL: divergence of the next-token distribution from the original\'s, '
        "nats per token. top-1: share of positions where both rank the same token first.</p>"
    )
    return "".join(parts)


def _by_domain(report: Mapping[str, Any], side: str, quantity: str) -> dict[str, float]:
    """What was measured, and finite, in each domain."""
    domains = ((report.get(side) or {}).get("evaluation") or {}).get("domains") or {}
    return {n: d[quantity] for n, d in domains.items() if d.get(quantity) is not None}


def _routing(report: Mapping[str, Any]) -> str:
    routed = [layer for layer in report.get("routing_by_domain") or () if layer.get("frequency")]
    layers, note = spread(routed)
    if not layers:
        return ""
    figure = figure_html(
        lambda dark: figures.plot_routing_by_domain(layers, dark=dark),
        "How often each domain selects each expert of the original model, against uniform use. "
        f"Specialised experts line up along the diagonal.{note}",
    )
    return f"<h2>Routing by domain</h2>{figure}"


def _loading(report: Mapping[str, Any]) -> str:
    loader = report.get("loader")
    if loader is None:
        return ""
    path = str((report.get("output") or {}).get("path") or "FOLDER")
    remote = ", trust_remote_code=True" if loader.get("trust_remote_code") else ""
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"folder = {json.dumps(path)}\n"
        f"model = AutoModelForCausalLM.from_pretrained(folder{remote})\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)"
    )
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in loader.get("notes") or ())
    listed = f"<ul>{notes}</ul>" if notes else ""
    return f"<h2>Loading the result</h2><pre><code>{escape(code)}</code></pre>{listed}"


def _provenance(report: Mapping[str, Any]) -> str:
    facts = {}
    for key, label in (("command", "command"), ("seed", "seed")):
        if report.get(key) is not None:
            facts[label] = str(report[key])
    for label, place in (("source", report.get("source")), ("output", report.get("output"))):
        if place and place.get("path"):
            facts[label] = str(place["path"])
    if report.get("peak_memory_mib") is not None:
        facts["peak memory"] = f"{report['peak_memory_mib']:,.0f} MiB"
    facts |= {k: plain_text(v) for k, v in (report.get("environment") or {}).items()}
    parts = [facts_html(facts)] if facts else []
    seconds = report.get("seconds") or {}
    if seconds:
        rows = [("", [step, f"{value:,.1f}"]) for step, value in seconds.items()]
        rows.append(("total", ["total", f"{sum(seconds.values()):,.1f}"]))
        parts.append("<h3>Wall time</h3>" + table_html(("step", "seconds"), rows))
    for kind, files in (report.get("data") or {}).items():
        rows = [("", [name, str(digest)[:16]]) for name, digest in files.items()]
        parts.append(f"<h3>{escape(str(kind).capitalize())} text</h3>")
        parts.append(table_html(("file", "sha256, first 16 digits"), rows))
    if report.get("config"):
        text = escape(json.dumps(report["config"], indent=2))
        parts.append(
            f"<details><summary>Configuration</summary><pre><code>{text}</code></pre></details>"
        )
    return "<h2>How this was run</h2>" + "".join(parts) if parts else ""
