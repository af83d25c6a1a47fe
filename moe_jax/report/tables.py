"""What a report says in numbers: the rows that the page, the card and the terminal share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax.text import MISSING, number, relative_change, small_number, spans


class Row(NamedTuple):
    """One quantity before and after; ``change`` is relative, or empty."""

    label: str
    before: str
    after: str
    change: str = ""


class DomainRow(NamedTuple):
    """One domain's numbers, formatted."""

    domain: str
    perplexity_before: str
    perplexity_after: str
    bits_before: str
    bits_after: str
    change: str
    kl: str
    agreement: str


DOMAIN_HEADER = DomainRow(
    "domain", "ppl before", "ppl after", "bpb before", "bpb after", "change", "KL", "top-1"
)


def headline_rows(report: Mapping[str, Any]) -> list[Row]:
    """Parameters, bytes, perplexity, bits per byte, tokens per second; those that are known."""
    rows = [
        _row(report, "parameters", "{:,}", "parameters", "total"),
        _row(report, "active per token", "{:,}", "parameters", "active"),
        _row(report, "in experts", "{:,}", "parameters", "experts"),
        _row(report, "weights, MB", "{:,.1f}", "bytes", scale=1e-6),
        _row(report, "perplexity", "{:,.2f}", "evaluation", "total", "perplexity"),
        _row(report, "bits per byte", "{:.4f}", "evaluation", "total", "bits_per_byte"),
        _row(report, "tokens per second", "{:,.0f}", "evaluation", "tokens_per_second"),
    ]
    return [row for row in rows if row.before != MISSING or row.after != MISSING]


def domain_rows(report: Mapping[str, Any]) -> list[DomainRow]:
    """One row per domain, then all text together and the mean over domains."""
    before, after = (_get(report, side, "evaluation") or {} for side in ("before", "after"))
    domains = list(dict.fromkeys([*before.get("domains", {}), *after.get("domains", {})]))
    rows = [
        _domain_row(name, _get(before, "domains", name) or {}, _get(after, "domains", name) or {})
        for name in domains
    ]
    if len(domains) > 1:
        for label, key in (("all text", "total"), ("mean of domains", "mean")):
            rows.append(_domain_row(label, before.get(key) or {}, after.get(key) or {}))
    return rows


def run_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What compares to nothing: distance to the original, memory, time."""
    total = _get(report, "after", "evaluation", "total") or {}
    seconds = report.get("seconds") or {}
    rows = [
        ("KL to the original, nats/token", small_number(total.get("kl"))),
        ("top-1 agreement", number(total.get("top1_agreement"), "{:.2%}")),
        ("peak memory, MiB", number(report.get("peak_memory_mib"), "{:,.0f}")),
        ("wall time, s", number(sum(seconds.values()) if seconds else None, "{:,.1f}")),
    ]
    return [row for row in rows if row[1] != MISSING]


def gone_ids(layer: Mapping[str, Any]) -> list[int]:
    """Ids of a layer's experts that were removed, became constants or merged into others."""
    return sorted(
        {*(layer.get("removed") or ()), *(layer.get("novices") or ()), *merged_ids(layer)}
    )


def merged_ids(layer: Mapping[str, Any]) -> list[int]:
    """Ids of a layer's experts that were merged into another, in whose place both now stand."""
    return sorted(e for _, *others in layer.get("merged") or () for e in others)


def unreached_experts(stage: Mapping[str, Any]) -> list[str]:
    """``layer 3: experts 1, 5`` for each layer that has experts no token was routed to."""
    lines = []
    for layer in stage.get("layers") or ():
        ids = layer.get("unreached")
        if ids is None:
            ids = [e for e, count in enumerate(layer.get("count") or ()) if count == 0]
        lines += _experts_of(layer, ids)
    return lines


def underdetermined_experts(stage: Mapping[str, Any]) -> list[str]:
    """The same for experts with fewer tokens than neurons, where second moments were used."""
    return [
        line
        for layer in stage.get("layers") or ()
        for line in _experts_of(layer, layer.get("fewer_tokens_than_neurons") or ())
    ]


def _experts_of(layer: Mapping[str, Any], ids: Sequence[int]) -> list[str]:
    """One line, or none without experts."""
    noun = "expert" if len(ids) == 1 else "experts"
    return [f"layer {layer['layer']}: {noun} {spans(ids)}"] if ids else []


def _row(
    report: Mapping[str, Any], label: str, form: str, *path: str, scale: float | None = None
) -> Row:
    before, after = (_get(report, side, *path) for side in ("before", "after"))
    change = relative_change(before, after) or ""
    if scale is not None:
        before, after = (None if v is None else v * scale for v in (before, after))
    return Row(label, number(before, form), number(after, form), change)


def _domain_row(label: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> DomainRow:
    bits = before.get("bits_per_byte"), after.get("bits_per_byte")
    change = relative_change(*bits) or MISSING
    return DomainRow(
        label,
        number(before.get("perplexity"), "{:,.2f}"),
        number(after.get("perplexity"), "{:,.2f}"),
        number(bits[0], "{:.4f}"),
        number(bits[1], "{:.4f}"),
        change,
        small_number(after.get("kl")),
        number(after.get("top1_agreement"), "{:.1%}"),
    )


def _get(tree: Any, *path: str) -> Any:
    for key in path:
        tree = (tree or {}).get(key)
    return tree
