"""Tables and sentences of a comparison, the same in Markdown and on the page."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from moe_jax.compare.grid import Grid
from moe_jax.compare.results import Rank, Row, Spread, original, ranking, select, spread, values_of
from moe_jax.text import MISSING, relative_change, small_number


class Table(NamedTuple):
    """Text in cells; the first column names the rows."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def markdown(table: Table) -> str:
    """A heading and the table."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"### {table.title}\n\n{body}\n"


def cell_text(value: Spread) -> str:
    """``2.053 ± 0.001``."""
    text = f"{value.mean:.4f}"
    return text if value.deviation is None else f"{text} ± {value.deviation:.4f}"


def all_tables(rows: Sequence[Row], grid: Grid) -> list[Table]:
    """Every table, model by model."""
    return [
        table
        for model in values_of(rows, "model")
        for table in [
            by_ratio(rows, grid, model),
            *rankings(rows, grid, model),
            *by_source(rows, grid, model),
            *by_count(rows, grid, model),
            *by_task(rows, grid, model),
        ]
        if table.rows
    ]


def percent_kept(ratio: float) -> str:
    return f"{ratio:.0%} kept"


def main_rows(rows: Sequence[Row], grid: Grid, model: str) -> list[Row]:
    """Cells of a model at the grid's own source and count."""
    return select(rows, model=model, source=grid.source, count=grid.count)


def by_ratio(rows: Sequence[Row], grid: Grid, model: str) -> Table:
    """Bits per byte of methods, a column for each ratio; the lowest mean on top."""
    chosen = main_rows(rows, grid, model)
    ratios = values_of(chosen, "ratio")
    title = (
        f"{model}: bits per byte by method and ratio "
        f"(original {original(rows, model)['bits_per_byte']:.4f}; "
        f"calibrated on {grid.count} sequences of {grid.source})"
    )
    return _crossed(title, chosen, "ratio", ratios, percent_kept)


def rankings(rows: Sequence[Row], grid: Grid, model: str) -> list[Table]:
    """For each ratio all that was measured, and how far each method is behind the best."""
    header = (
        "method", "parameters", "active", "bits per byte", "change", "KL", "top-1",
        "behind the best", "domains won",
    )  # fmt: skip
    before = original(rows, model)
    chosen = main_rows(rows, grid, model)
    tables = []
    for ratio in values_of(chosen, "ratio"):
        found = ranking(select(chosen, ratio=ratio))
        lines = [_rank_cells(rank, before, first=rank is found[0]) for rank in found]
        tables.append(Table(f"{model}: ranking at {percent_kept(ratio)}", header, lines))
    return tables


def _rank_cells(rank: Rank, before: Row, first: bool) -> list[str]:
    sizes = [statistics.fmean(row[name] for row in rank.rows) for name in ("parameters", "active")]
    won = f"{rank.domains} of {len(rank.rows[0]['domains'])}"
    return [
        rank.method,
        *(f"{size / 1e6:.2f}M" for size in sizes),
        cell_text(rank.bits),
        relative_change(before["bits_per_byte"], rank.bits.mean) or MISSING,
        small_number(spread(rank.rows, "kl").mean),
        f"{spread(rank.rows, 'top1_agreement').mean:.1%}",
        *([MISSING] * 2 if first else [_behind(rank), won]),
    ]


def _behind(rank: Rank) -> str:
    """With half the interval, and a mark where it holds zero."""
    if rank.high is None:
        return f"{rank.behind:+.4f}"
    half = rank.high - rank.behind
    return f"{rank.behind:+.4f} ± {half:.4f}" + (" *" if rank.tied else "")


def by_source(rows: Sequence[Row], grid: Grid, model: str) -> list[Table]:
    """Bits per byte for each calibration text, where there are several."""
    return _varied(
        select(rows, model=model, count=grid.count),
        "source",
        lambda ratio: f"{model}: by calibration text, {percent_kept(ratio)}",
        lambda source: source,
    )


def by_count(rows: Sequence[Row], grid: Grid, model: str) -> list[Table]:
    """Bits per byte for each number of calibration sequences, where there are several."""
    return _varied(
        select(rows, model=model, source=grid.source),
        "count",
        lambda ratio: f"{model}: by number of calibration sequences, {percent_kept(ratio)}",
        lambda count: f"{count}",
    )


def varied_values(rows: Sequence[Row], name: str) -> list:
    """Values of a column that some method was measured at beside others; counts ascend."""
    values = values_of(rows, name)
    return sorted(values) if name == "count" else values


def _varied(
    rows: Sequence[Row], name: str, title: Callable[[float], str], label: Callable[..., str]
) -> list[Table]:
    tables = []
    for ratio in values_of(rows, "ratio"):
        chosen = complete(select(rows, ratio=ratio), name)
        values = varied_values(chosen, name)
        if len(values) > 1:
            tables.append(_crossed(title(ratio), chosen, name, values, label, with_range=True))
    return tables


def complete(rows: Sequence[Row], name: str) -> list[Row]:
    """Rows of the methods that were measured at every value of a column, of the seeds at all."""
    values = set(values_of(rows, name))
    found = {m: {r[name] for r in rows if r["method"] == m} for m in values_of(rows, "method")}
    rows = [row for row in rows if found[row["method"]] == values]
    places: dict[tuple, set[int]] = {}
    for row in rows:
        places.setdefault((row["method"], row[name]), set()).add(row["seed"])
    seeds = set.intersection(*places.values()) if places else set()
    return [row for row in rows if row["seed"] in seeds]


def _crossed(
    title: str,
    rows: Sequence[Row],
    name: str,
    values: Sequence,
    label: Callable[..., str],
    with_range: bool = False,
) -> Table:
    """Methods against the values of a column, the lowest mean over these on top."""
    lines = []
    order = {m: spread(select(rows, method=m)).mean for m in values_of(rows, "method")}
    for method in sorted(order, key=order.__getitem__):
        groups = [select(rows, method=method, **{name: value}) for value in values]
        cells = [cell_text(spread(group)) if group else MISSING for group in groups]
        if with_range:
            means = [spread(group).mean for group in groups]
            cells.append(f"{max(means) - min(means):.4f}")
        lines.append([method, *cells])
    last = ["range"] if with_range else []
    return Table(title, ["method", *map(label, values), *last], lines)


def by_task(rows: Sequence[Row], grid: Grid, model: str) -> list[Table]:
    """Accuracy on tasks, mean over seeds, and the unweighted mean of the tasks."""
    before = original(rows, model)
    tasks = list(before["tasks"])
    if not tasks:
        return []
    chosen = main_rows(rows, grid, model)
    tables = []
    for ratio in values_of(chosen, "ratio"):
        groups = {"original": [before]}
        for row in select(chosen, ratio=ratio):
            groups.setdefault(row["method"], []).append(row)
        lines = []
        for method, group in groups.items():
            means = [statistics.fmean(row["tasks"][task] for row in group) for task in tasks]
            lines.append([method, *(f"{100 * m:.1f}" for m in [*means, statistics.fmean(means)])])
        title = f"{model}: tasks, {percent_kept(ratio)}, in percent"
        tables.append(Table(title, ["method", *tasks, "mean"], lines))
    return tables


def findings(rows: Sequence[Row], grid: Grid) -> list[str]:
    """Who is ahead, at every model and ratio, and whom seeds cannot tell from it."""
    sentences = []
    for model in values_of(rows, "model"):
        chosen = main_rows(rows, grid, model)
        for ratio in values_of(chosen, "ratio"):
            place = f"{model}, {percent_kept(ratio)}"
            sentences.append(_finding(select(chosen, ratio=ratio), place, grid.focus))
    first, total = wins(rows)
    if total > 1:
        listed = ", ".join(f"{method} in {n}" for method, n in first.most_common())
        sentences.append(
            f"Of {total} combinations of model, ratio and calibration (text and amount), fewest "
            f"bits per byte: {listed}."
        )
    return sentences


def _finding(rows: Sequence[Row], place: str, focus: str) -> str:
    """Who is first, whom seeds cannot tell from it, and where ``focus`` stands."""
    best, *others = ranking(rows)
    text = f"{place}: {best.method} is first ({cell_text(best.bits)})"
    if others:
        open_ones = [f"{rank.method} ({rank.behind:+.4f})" for rank in others if rank.tied]
        clear = len(others) - len(open_ones)
        text += f", clearly before {clear} of {len(others)} others"
        text += f"; not told from it: {', '.join(open_ones)}" if open_ones else ""
    if focus != best.method and focus in values_of(rows, "method"):
        compared = [rank for rank in ranking(rows, focus) if rank.method != focus]
        worse = [rank for rank in compared if rank.behind > 0]
        better = [rank for rank in compared if rank.behind <= 0]
        text += (
            f". {focus} is before {len(worse)} (clearly {_num_clear(worse)}) "
            f"and behind {len(better)} (clearly {_num_clear(better)})"
        )
    return f"{text}."


def _num_clear(ranks: Sequence[Rank]) -> int:
    return sum(not rank.tied for rank in ranks)


def wins(rows: Sequence[Row]) -> tuple[Counter[str], int]:
    """By method, at how many combinations of all else it is first, and how many there are."""
    names = ("model", "ratio", "source", "count")
    cells = select(rows)
    first: Counter[str] = Counter()
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in cells):
        ranks = ranking(select(cells, **dict(zip(names, key, strict=True))))
        if len(ranks) > 1:
            first[ranks[0].method] += 1
    return first, first.total()
