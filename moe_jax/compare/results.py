"""What the cells say together: rows, means and spreads over seeds, rankings, courses."""

from __future__ import annotations

import csv
import io
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import t as student_t  # JAX needs scipy, too

from moe_jax.compare.grid import Grid
from moe_jax.compare.runner import read_numbers
from moe_jax.compare.subjects import Subject

ORIGINAL = "original"
QUANTITIES = ("bits_per_byte", "kl", "top1_agreement")
CONFIDENCE = 0.95
Row = dict[str, Any]


class Spread(NamedTuple):
    """Mean and standard deviation over seeds; None for one seed."""

    mean: float
    deviation: float | None


class Rank(NamedTuple):
    """A method among those that are compared at one size and calibration.

    Attributes:
        rows: one per seed.
        bits: bits per byte.
        behind: bits per byte more than another method (the best), mean over seeds.
        low, high: 95% interval of it, by Student's t over paired seeds; None for less than two.
        domains: of all, in how many it needs fewer bits than that one.
        first: whether it is the one that others are compared with.
    """

    method: str
    rows: list[Row]
    bits: Spread
    behind: float
    low: float | None
    high: float | None
    domains: int
    first: bool

    @property
    def tied(self) -> bool:
        """Whether seeds leave it open who is ahead."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def result_rows(subjects: Sequence[Subject]) -> list[Row]:
    """One row per model as it is, and one per cell.

    Keys: ``model method ratio source count seed studies parameters active bytes bits_per_byte kl
    top1_agreement domains tasks layers dropped_layers tokens sequences training_tokens curve course
    seconds file``. Studies are the titles of the blocks that hold a cell; layers are those of the
    first cut; a curve holds losses of training steps, a course those after trainings of several
    lengths.

    Raises:
        FileNotFoundError: a cell was not measured yet.
    """
    rows = []
    for subject in subjects:
        named = {"model": subject.label, "method": ORIGINAL, "ratio": 1.0, "studies": []}
        rows.append(named | _numbers(subject.original_file))
        for cell in subject.cells:
            sample = cell.calibration
            rows.append(
                {
                    "model": subject.label,
                    "method": cell.method,
                    "ratio": cell.ratio,
                    "source": sample.source,
                    "count": sample.count,
                    "seed": sample.seed,
                    "studies": list(subject.studies[cell]),
                    **_numbers(subject.cell_file(cell)),
                }
            )
    return rows


def _numbers(file: Path) -> Row:
    facts = read_numbers(file)
    if facts is None:
        raise FileNotFoundError(f"{file} is not there yet: run the comparison to its end")
    mean = facts["evaluation"]["mean"]
    return {
        "parameters": facts["parameters"]["total"],
        "active": facts["parameters"]["active"],
        "bytes": facts["bytes"],
        **{name: mean[name] for name in QUANTITIES},
        "domains": facts["evaluation"]["domains"],
        "tasks": _task_values(facts.get("tasks", {})),
        "layers": facts.get("layers", {}),
        "dropped_layers": facts.get("dropped_layers", []),
        **facts.get("calibration", {}),
        "training_tokens": facts.get("training_tokens", 0),
        "curve": facts.get("curve", []),
        "course": facts.get("course", []),
        "seconds": facts.get("seconds"),
        "file": file.name,
    }


def _task_values(tasks: Mapping[str, Any]) -> dict[str, float]:
    """By task, its ``acc_norm`` if there is one, else ``acc``, else what it has first.

    The MoNE paper's table reads so: normalised where answers differ in length.
    """
    values = {}
    for name, task in tasks.items():
        metrics = task["metrics"]
        chosen = next((m for m in ("acc_norm", "acc", *metrics) if m in metrics), None)
        if chosen is not None:
            values[f"{name}/{chosen}"] = metrics[chosen]["value"]
    return values


def csv_text(rows: Sequence[Row]) -> str:
    """All rows, with a column for each domain and task."""
    plain = ["model", "method", "ratio", "source", "count", "seed", "parameters", "active", "bytes"]
    plain += [*QUANTITIES, "tokens", "sequences", "training_tokens", "seconds", "file"]
    domains = dict.fromkeys(name for row in rows for name in row["domains"])
    tasks = dict.fromkeys(name for row in rows for name in row["tasks"])
    by_domain = [f"{quantity}/{name}" for quantity in QUANTITIES for name in domains]
    text = io.StringIO()
    table = csv.DictWriter(text, [*plain, *by_domain, *tasks], lineterminator="\n")
    table.writeheader()
    for row in rows:
        cells = {name: row.get(name, "") for name in plain}
        for (name, values), quantity in itertools.product(row["domains"].items(), QUANTITIES):
            cells[f"{quantity}/{name}"] = values[quantity]
        table.writerow(cells | row["tasks"])
    return text.getvalue()


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows of cells that have these values."""
    return [
        row
        for row in rows
        if row["method"] != ORIGINAL and all(row[name] == value for name, value in wanted.items())
    ]


def original(rows: Iterable[Row], model: str) -> Row:
    """The row of a model as it is."""
    return next(row for row in rows if row["model"] == model and row["method"] == ORIGINAL)


def values_of(rows: Iterable[Row], name: str) -> list[Any]:
    """The different values of a column, in the order of the rows."""
    return list(dict.fromkeys(row[name] for row in rows))


def spread(rows: Sequence[Row], quantity: str = "bits_per_byte") -> Spread:
    """Over rows that differ in their seed."""
    values = [row[quantity] for row in rows]
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def ranking(rows: Sequence[Row], against: str = "") -> list[Rank]:
    """Methods by bits per byte, the lowest first; rows differ in method and seed alone.

    ``against`` names the method that the others are compared with, if not the best.
    """
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    order = sorted(by_method, key=lambda method: spread(by_method[method]).mean)
    reference = by_method[against or order[0]]
    return [_rank(method, by_method[method], reference) for method in order]


def _rank(method: str, rows: list[Row], others: list[Row]) -> Rank:
    same_seed = {row["seed"]: row for row in others}
    pairs = [(row, same_seed[row["seed"]]) for row in rows if row["seed"] in same_seed]
    behind = [row["bits_per_byte"] - other["bits_per_byte"] for row, other in pairs]
    mean = statistics.fmean(behind)
    low = high = None
    if len(behind) > 1:
        quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, len(behind) - 1))
        half = quantile * statistics.stdev(behind) / math.sqrt(len(behind))
        low, high = mean - half, mean + half
    first = rows is others
    return Rank(method, rows, spread(rows), mean, low, high, _domains_won(pairs), first)


def _domains_won(pairs: Sequence[tuple[Row, Row]]) -> int:
    """Domains in which the first of each pair needs fewer bits, by the mean over pairs."""
    differences: dict[str, list[float]] = {}
    for row, other in pairs:
        for name, values in row["domains"].items():
            difference = values["bits_per_byte"] - other["domains"][name]["bits_per_byte"]
            differences.setdefault(name, []).append(difference)
    return sum(statistics.fmean(values) < 0 for values in differences.values())


def summary_groups(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Means and standard deviations over seeds of every other combination."""
    names = ("model", "method", "ratio", "source", "count")
    groups: dict[tuple, list[Row]] = {}
    for row in select(rows):
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    result = []
    for key, group in groups.items():
        found = {name: spread(group, name) for name in QUANTITIES}
        result.append(
            dict(zip(names, key, strict=True))
            | {"seeds": len(group), "parameters": [row["parameters"] for row in group]}
            | {name: {"mean": s.mean, "deviation": s.deviation} for name, s in found.items()}
        )
    return result


def percent_kept(ratio: float) -> str:
    return f"{ratio:.0%} kept"


def outside_studies(rows: Sequence[Row]) -> list[Row]:
    """The originals, and cells of blocks without a title."""
    return [row for row in rows if row["method"] == ORIGINAL or "" in row["studies"]]


def study_rows(rows: Sequence[Row], title: str) -> list[Row]:
    """Cells of the blocks with a title."""
    return [row for row in rows if title in row["studies"]]


def main_rows(rows: Sequence[Row], grid: Grid, model: str) -> list[Row]:
    """Cells of a model at the grid's own source and count."""
    return select(rows, model=model, source=grid.source, count=grid.count)


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


def courses(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Rows of trainings of several lengths, one per seed, by study (or size) and method."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row["course"]:
            for title in row["studies"]:
                place = title or f"{row['model']}, {percent_kept(row['ratio'])}"
                found.setdefault(place, {}).setdefault(row["method"], []).append(row)
    return found


def by_mark(rows: Sequence[Row]) -> list[tuple[Row, ...]]:
    """The points of a course, each with those of all seeds."""
    return list(zip(*(row["course"] for row in rows), strict=True))


def tokens_to_reach(points: Sequence[Mapping[str, float]], bits_per_byte: float) -> float | None:
    """Where a course first gets so low, on straight lines between its points; None if nowhere."""
    if points[0]["bits_per_byte"] <= bits_per_byte:
        return points[0]["tokens"]
    for before, after in itertools.pairwise(points):
        if after["bits_per_byte"] <= bits_per_byte:
            drop = before["bits_per_byte"] - after["bits_per_byte"]
            share = (before["bits_per_byte"] - bits_per_byte) / drop
            return before["tokens"] + share * (after["tokens"] - before["tokens"])
    return None


def tokens_needed(rows: Sequence[Row], others: Sequence[Row]) -> list[list[float | None]]:
    """For each mark of another method and each seed: tokens for the bits per byte that it has."""
    return [
        [
            tokens_to_reach(row["course"], point["bits_per_byte"])
            for row, point in zip(rows, points, strict=True)
        ]
        for points in by_mark(others)
    ]


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
