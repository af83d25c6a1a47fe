"""Tables and sentences of a comparison."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.compare.grid import Grid
from moe_jax.compare.results import (
    Rank,
    Row,
    Spread,
    by_mark,
    complete,
    courses,
    main_rows,
    original,
    outside_studies,
    percent_kept,
    ranking,
    select,
    spread,
    study_rows,
    tokens_needed,
    values_of,
    wins,
)
from moe_jax.report.elements import Table
from moe_jax.text import MISSING, filled_columns, relative_change, small_number

_RANKING = (
    "method", "parameters", "active", "tokens trained", "bits per byte", "change", "KL", "top-1",
    "behind the best", "domains won",
)  # fmt: skip


def cell_text(value: Spread) -> str:
    """``2.053 ± 0.001``."""
    text = f"{value.mean:.4f}"
    return text if value.deviation is None else f"{text} ± {value.deviation:.4f}"


def all_tables(rows: Sequence[Row], grid: Grid) -> list[Table]:
    """Every table: study by study, and of what belongs to none model by model."""
    apart = outside_studies(rows)
    by_model = [
        table
        for model in values_of(apart, "model")
        for table in [
            by_ratio(apart, grid, model),
            *rankings(apart, grid, model),
            *_varied(apart, model, "source", count=grid.count),
            *_varied(apart, model, "count", source=grid.source),
            *by_task(apart, grid, model),
        ]
        if len(table.rows) > 1
    ]
    return [*studies(rows, grid), *by_model, *course_tables(rows)]


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
    chosen, before = main_rows(rows, grid, model), original(rows, model)
    return [
        _ranking_table(f"{model}: ranking at {percent_kept(ratio)}", found, before)
        for ratio in values_of(chosen, "ratio")
        if (found := ranking(select(chosen, ratio=ratio)))
    ]


def studies(rows: Sequence[Row], grid: Grid) -> list[Table]:
    """For each study and model what was measured, in the order in which methods were given."""
    tables = []
    for title, model in itertools.product(grid.studies, values_of(rows, "model")):
        if chosen := select(study_rows(rows, title), model=model):
            order = values_of(chosen, "method")
            found = sorted(ranking(chosen), key=lambda rank: order.index(rank.method))
            tables.append(_ranking_table(title, found, original(rows, model)))
    return tables


def _ranking_table(title: str, ranks: Sequence[Rank], before: Row) -> Table:
    lines = [_rank_cells(rank, before) for rank in ranks]
    return Table(filled_columns(_RANKING, lines), title=title)


def _rank_cells(rank: Rank, before: Row) -> list[str]:
    tokens = rank.rows[0]["training_tokens"]
    sizes = [statistics.fmean(row[name] for row in rank.rows) for name in ("parameters", "active")]
    won = f"{rank.domains} of {len(rank.rows[0]['domains'])}"
    return [
        rank.method,
        *(f"{size / 1e6:.2f}M" for size in sizes),
        f"{tokens:,}" if tokens else MISSING,
        cell_text(rank.bits),
        relative_change(before["bits_per_byte"], rank.bits.mean) or MISSING,
        small_number(spread(rank.rows, "kl").mean),
        f"{spread(rank.rows, 'top1_agreement').mean:.1%}",
        *([MISSING] * 2 if rank.first else [_behind(rank), won]),
    ]


def _behind(rank: Rank) -> str:
    """With half the interval, and a mark where it holds zero."""
    if rank.high is None:
        return f"{rank.behind:+.4f}"
    half = rank.high - rank.behind
    return f"{rank.behind:+.4f} ± {half:.4f}" + (" *" if rank.tied else "")


def varied_values(rows: Sequence[Row], name: str) -> list:
    """Values of a column that some method was measured at beside others; counts ascend."""
    values = values_of(rows, name)
    return sorted(values) if name == "count" else values


def _varied(rows: Sequence[Row], model: str, name: str, **others: Any) -> list[Table]:
    """Bits per byte for each calibration text, or amount of it, where there are several."""
    what = {"source": "calibration text", "count": "number of calibration sequences"}[name]
    tables = []
    for ratio in values_of(select(rows, model=model, **others), "ratio"):
        chosen = complete(select(rows, model=model, ratio=ratio, **others), name)
        values = varied_values(chosen, name)
        if len(values) > 1:
            title = f"{model}: by {what}, {percent_kept(ratio)}"
            tables.append(_crossed(title, chosen, name, values, str, with_range=True))
    return tables


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
    return Table([["method", *map(label, values), *last], *lines], title=title)


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
        tables.append(Table([["method", *tasks, "mean"], *lines], title=title))
    return tables


def course_tables(rows: Sequence[Row]) -> list[Table]:
    """Bits per byte by tokens, and what every method needs for the same as each other one."""
    tables = []
    for title, methods in courses(rows).items():
        marks = [points[0]["tokens"] for points in by_mark(next(iter(methods.values())))]
        lines = [
            [method, *(cell_text(spread(points)) for points in by_mark(group))]
            for method, group in methods.items()
        ]
        for one, other in itertools.permutations(methods, 2):
            needed = tokens_needed(methods[one], methods[other])
            cells = [needed_text(found, marks[-1]) for found in needed]
            lines.append([f"{one}: tokens for the same as {other}", *cells])
        header = ["tokens", *(f"{tokens:,}" for tokens in marks)]
        tables.append(Table([header, *lines], title=f"{title}: by tokens of training"))
    return tables


def needed_text(found: Sequence[float | None], most: int) -> str:
    """Mean and spread over seeds, and on how many ``most`` tokens were too few."""
    reached = [{"tokens": tokens} for tokens in found if tokens is not None]
    if not reached:
        return f"> {most:,}"
    mean, deviation = spread(reached, "tokens")
    if len(reached) == len(found):
        return f"{mean:,.0f} ± {deviation or 0:,.0f}"
    return f"{mean:,.0f} on {len(reached)} of {len(found)} seeds, else > {most:,}"


def findings(rows: Sequence[Row], grid: Grid) -> list[str]:
    """Who is ahead, at every model and ratio, and whom seeds cannot tell from it."""
    sentences = []
    for title in grid.studies:
        for model in values_of(study_rows(rows, title), "model"):
            chosen = select(study_rows(rows, title), model=model)
            sentences.append(_finding(chosen, title, grid.focus))
    rows = outside_studies(rows)
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
