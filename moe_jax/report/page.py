"""The report as one HTML file: no script, no request, light and dark, from phone to desk."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from moe_jax.report import figures
from moe_jax.report.tables import (
    DOMAIN_HEADER,
    MISSING,
    domain_rows,
    headline_rows,
    id_ranges,
    number,
    run_rows,
    unreached_experts,
)

# Panels of one figure; of deeper models so many layers are shown, evenly spaced.
_MAX_PANELS = 16

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

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--muted:#5d6775;--line:#dde2e9;--paper:#fff;
--tile:#f5f7fa;--accent:#1f6fc5;--warn:#d1480f}
@media (prefers-color-scheme:dark){:root{--ink:#e8ecf2;--muted:#9aa5b4;--line:#313a47;
--paper:#151a21;--tile:#1d242e;--accent:#62a8f5;--warn:#ff8a57}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .35rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.75rem 0 .75rem;padding-top:1.25rem;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.75rem 0 .5rem}
p{margin:.5rem 0}.sub,figcaption,.note{color:var(--muted)}
.sub{overflow-wrap:anywhere}figcaption,.note{font-size:.875rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.75rem;
margin:1.75rem 0 0;padding:0}
.tile{background:var(--tile);border-radius:.6rem;padding:.85rem 1rem;margin:0}
.tile dt{color:var(--muted);font-size:.8125rem}
.tile dd{margin:0}.tile .value{font-size:1.35rem;font-weight:600;
font-variant-numeric:tabular-nums}
.tile .was{color:var(--muted);font-size:.8125rem;font-variant-numeric:tabular-nums}
.warnings{border-left:4px solid var(--warn);background:var(--tile);border-radius:.3rem;
padding:.75rem 1rem;margin:1.5rem 0 0}
.warnings ul{margin:.25rem 0 0;padding-left:1.2rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .6rem;text-align:right;border-bottom:1px solid var(--line);
white-space:nowrap}
th{color:var(--muted);font-weight:500}
th:first-child,td:first-child{text-align:left;padding-left:0}
td.ids{white-space:normal;min-width:14rem;text-align:left}th.ids{text-align:left}
tr.total td{font-weight:600}
figure{margin:1.5rem 0}figure img{display:block;width:100%;min-width:38rem;height:auto}
figcaption{margin-top:.4rem}
pre,code{font:.85em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--tile);border-radius:.5rem;padding:.85rem 1rem;overflow-x:auto}
code{overflow-wrap:anywhere}pre code{overflow-wrap:normal;font-size:1em}
dl.facts{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1.25rem;margin:.75rem 0;
font-size:.9rem}
dl.facts dt{color:var(--muted)}dl.facts dd{margin:0;overflow-wrap:anywhere}
details{margin:.75rem 0}summary{cursor:pointer;color:var(--accent)}
@media (max-width:34rem){main{padding:1.5rem 1rem 3rem}h1{font-size:1.5rem}
.tiles{grid-template-columns:repeat(2,1fr)}.tile .value{font-size:1.1rem}
dl.facts{grid-template-columns:1fr;gap:0}dl.facts dd{margin-bottom:.5rem}}
@media print{main{max-width:none}h2{break-after:avoid}figure,table{break-inside:avoid}}
"""


def report_html(report: Mapping[str, Any]) -> str:
    """The whole page; sections whose data are absent are left out.

    Figures are inlined twice, for light and for dark, and a content security policy forbids the
    page to load or run anything.
    """
    name = str(report.get("name") or "Compression report")
    sections = [
        _heading(report, name),
        _tiles(report),
        _warnings(report),
        _quality(report),
        *(_stage(n, stage) for n, stage in enumerate(report.get("stages") or ())),
        _routing(report),
        _loading(report),
        _provenance(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escape(name)}</title><style>{_STYLE}</style></head><body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def _heading(report: Mapping[str, Any], name: str) -> str:
    source = report.get("source") or {}
    origin = source.get("id") or source.get("path")
    parts = [f"from {origin}"] if origin else []
    parts += [str(source["family"])] if source.get("family") else []
    methods = [str(s["method"]) for s in report.get("stages") or () if s.get("method")]
    parts += [" then ".join(methods)] if methods else []
    return f'<h1>{escape(name)}</h1><p class="sub">{escape(" · ".join(parts))}</p>'


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
    series = {
        label: {name: domain["bits_per_byte"] for name, domain in domains.items()}
        for label, side in (("original", "before"), ("compressed", "after"))
        if (domains := ((report.get(side) or {}).get("evaluation") or {}).get("domains"))
    }
    after = ((report.get("after") or {}).get("evaluation") or {}).get("domains") or {}
    divergence = {n: d["kl"] for n, d in after.items() if d.get("kl") is not None}
    parts = ["<h2>Quality on held-out text</h2>"]
    parts.append(
        _figure(
            lambda dark: figures.plot_bits_per_byte(series, dark=dark),
            "What each domain's text costs, and the change.",
        )
    )
    if divergence:
        parts.append(
            _figure(
                lambda dark: figures.plot_kl(divergence, dark=dark),
                "How far the predictions moved, whether they got worse or not.",
            )
        )
    totals = {"all text", "mean of domains"}
    body = [("total" if row.domain in totals else "", list(row)) for row in rows]
    parts.append(_table(DOMAIN_HEADER, body))
    parts.append(
        '<p class="note">KL: divergence of the next-token distribution from the original\'s, '
        "nats per token. top-1: share of positions where both rank the same token first.</p>"
    )
    return "".join(parts)


def _stage(n: int, stage: Mapping[str, Any]) -> str:
    layers = stage.get("layers") or []
    parts = [f"<h2>Stage {n}: {escape(str(stage.get('method', '')))}</h2>"]
    if stage.get("kept"):
        parts.append(f"<p>{escape(str(stage['kept']))}</p>")
    if stage.get("settings"):
        parts.append(_facts({k: _plain_text(v) for k, v in stage["settings"].items()}))
    parts += _stage_figures(layers)
    if layers:
        parts.append(_layer_table(layers))
    unreached = unreached_experts(stage)
    if unreached:
        items = "".join(f"<li>{escape(line)}</li>" for line in unreached)
        parts.append(f"<h3>Experts that calibration never reached</h3><ul>{items}</ul>")
    elif any(layer.get("count") for layer in layers):
        parts.append('<p class="note">Calibration reached every expert.</p>')
    return "".join(parts)


def _stage_figures(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    parts = []
    scattered, note = _spread(figures.layers_with_experts(layers))
    if scattered:
        chosen = any(layer.get("removed") or layer.get("novices") for layer in layers)
        selection = (
            " Those to the lower left are used little and answer nearly the same whatever they "
            "are given."
            if chosen
            else ""
        )
        parts.append(
            _figure(
                lambda dark: figures.plot_experts(scattered, dark=dark),
                f"Each point is an expert.{selection}{note}",
            )
        )
    scored = [layer for layer in layers if layer.get("score")]
    if scored:
        parts.append(
            _figure(
                lambda dark: figures.plot_scores(scored, dark=dark),
                "Score of every expert, by which the stage ranked them.",
            )
        )
    curves, note = _spread([layer for layer in layers if layer.get("importance")])
    if curves:
        parts.append(
            _figure(
                lambda dark: figures.plot_neuron_importance(curves, dark=dark),
                "Median over a layer's experts, with the range that holds 80% of them. The "
                f"neurons beyond the line were cut.{note}",
            )
        )
    return parts


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> str:
    header = ["layer", "experts", "kept", "constants", "width", "routing kept", "importance kept"]
    body = [("", _layer_cells(layer)) for layer in layers]
    filled = [
        i for i in range(len(header)) if i == 0 or any(cells[i] != MISSING for _, cells in body)
    ]
    columns = [header[i] for i in filled]
    rows = [(kind, [cells[i] for i in filled]) for kind, cells in body]
    gone = [id_ranges(figures.gone_ids(layer)) for layer in layers]
    table = _table(columns, rows, ("experts that did not stay", gone) if any(gone) else None)
    if len(layers) <= _MAX_PANELS:
        return table
    return f"<details><summary>All {len(layers)} layers</summary>{table}</details>"


def _layer_cells(layer: Mapping[str, Any]) -> list[str]:
    num_experts = layer.get("num_experts")
    gone = figures.gone_ids(layer)
    width = layer.get("expert_width")
    importance = layer.get("importance")
    mass = layer.get("routing_mass") or layer.get("count")
    routing_kept = None
    if mass and gone:
        routing_kept = 1 - sum(mass[e] for e in gone) / max(sum(mass), 1e-30)
    return [
        str(layer["layer"]),
        number(num_experts, "{}"),
        number(None if num_experts is None else num_experts - len(gone), "{}"),
        number(len(layer["novices"]) if layer.get("novices") else None, "{}"),
        f"{width[0]} → {width[1]}" if width and width[0] != width[1] else MISSING,
        number(routing_kept, "{:.1%}"),
        number(float(np.mean(importance["kept_share"])) if importance else None, "{:.1%}"),
    ]


def _routing(report: Mapping[str, Any]) -> str:
    routed = [layer for layer in report.get("routing_by_domain") or () if layer.get("frequency")]
    layers, note = _spread(routed)
    if not layers:
        return ""
    figure = _figure(
        lambda dark: figures.plot_routing_by_domain(layers, dark=dark),
        "How often each domain selects each expert of the original model, against uniform use. "
        f"Specialised experts line up along the diagonal.{note}",
    )
    return f"<h2>Routing by domain</h2>{figure}"


def _spread(layers: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """At most ``_MAX_PANELS`` layers, and a sentence that says so where some were left out."""
    if len(layers) <= _MAX_PANELS:
        return list(layers), ""
    picks = np.linspace(0, len(layers) - 1, _MAX_PANELS).round().astype(int)
    note = f" {_MAX_PANELS} of {len(layers)} layers are shown; report.json holds all."
    return [layers[i] for i in picks], note


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
    facts |= {k: _plain_text(v) for k, v in (report.get("environment") or {}).items()}
    parts = [_facts(facts)] if facts else []
    seconds = report.get("seconds") or {}
    if seconds:
        rows = [("", [step, f"{value:,.1f}"]) for step, value in seconds.items()]
        rows.append(("total", ["total", f"{sum(seconds.values()):,.1f}"]))
        parts.append("<h3>Wall time</h3>" + _table(("step", "seconds"), rows))
    for kind, files in (report.get("data") or {}).items():
        rows = [("", [name, str(digest)[:16]]) for name, digest in files.items()]
        parts.append(f"<h3>{escape(str(kind).capitalize())} text</h3>")
        parts.append(_table(("file", "sha256, first 16 digits"), rows))
    if report.get("config"):
        text = escape(json.dumps(report["config"], indent=2))
        parts.append(
            f"<details><summary>Configuration</summary><pre><code>{text}</code></pre></details>"
        )
    return "<h2>How this was run</h2>" + "".join(parts) if parts else ""


def _plain_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _facts(facts: Mapping[str, str]) -> str:
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _table(
    header: Sequence[str],
    rows: Sequence[tuple[str, Sequence[str]]],
    ids: tuple[str, Sequence[str]] | None = None,
) -> str:
    """Rows are (class, cells); ``ids`` is a last column of running text."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    head += f'<th class="ids">{escape(ids[0])}</th>' if ids else ""
    body = []
    for n, (kind, cells) in enumerate(rows):
        line = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        line += f'<td class="ids">{escape(ids[1][n])}</td>' if ids else ""
        body.append(f'<tr class="{kind}">{line}</tr>' if kind else f"<tr>{line}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _figure(draw: Callable[[bool], Figure], caption: str) -> str:
    light, dark = (_data_uri(draw(mode)) for mode in (False, True))
    return (
        '<figure><div class="scroll"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(caption)}"></picture></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    # A fixed salt and no date: the same data give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "moe_jax"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/svg+xml;base64,{encoded}"
