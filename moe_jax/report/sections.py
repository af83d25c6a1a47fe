"""What a report says, section by section; the page, the model card and the terminal render it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

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
from moe_jax.report.facts import Output, Report
from moe_jax.report.figures import quality
from moe_jax.report.points import domain_point_rows, point_rows, stage_points, stage_title
from moe_jax.report.stage_sections import plain_text, stage_heading, stage_parts
from moe_jax.text import MISSING, byte_size, number, relative_change, small_number

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


def document(report: Report) -> Document:
    """All that a report says; sections whose data are absent are left out."""
    lost: list[str] = []
    stages = report.get("stages") or []
    points = stage_points(report)
    listed: list[tuple[str, list]] = [
        ("Size and quality", [_sizes, _convergence]),
        ("Quality on held-out text", [_quality_figures, _domains]),
        ("From stage to stage", [lambda _: _stages_figure(points), lambda _: _points(points)]),
        *((stage_heading(n, stage), stage_parts(stage)) for n, stage in enumerate(stages)),
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
    if facts := {key: plain_text(value) for key, value in told.items() if value is not None}:
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
