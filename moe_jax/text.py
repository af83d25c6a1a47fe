"""Words and numbers for people: tables in columns, spans of numbers, digits, sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# Stands where a table has nothing to say.
MISSING = "-"


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Columns of equal width: the first to the left, all others to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def filled_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Header and rows without the columns (but the first) that hold nothing in any row."""
    columns = list(zip(*rows, strict=True))
    filled = [i for i, column in enumerate(columns) if i == 0 or set(column) != {MISSING}]
    return [[row[i] for i in filled] for row in (header, *rows)]


def number(value: float | int | None, form: str) -> str:
    """``value`` in a form such as ``{:,.1f}``; ``MISSING`` for None."""
    return MISSING if value is None else form.format(value)


def small_number(value: float | int | None) -> str:
    """Four decimals, or two digits of what would be lost in them."""
    if value is None or value == 0 or abs(value) >= 1e-3:
        return number(value, "{:.4f}")
    return f"{value:.1e}"


def two_digits(value: float) -> str:
    """Two significant digits: ``0.050``, ``0.0025``, ``1.2``, ``12``, ``5.0e-07``."""
    if value == 0 or abs(value) >= 9.95:
        return f"{value:.0f}"
    return f"{value:#.2g}"


def short_count(value: float) -> str:
    """Three digits of a count: ``655k``, ``1.31M``, ``40B``."""
    return _with_unit(value, ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")))


def byte_size(size: float) -> str:
    """Three digits of a number of bytes in decimal units: ``512 B``, ``1.31 MB``, ``84 GB``."""
    return _with_unit(size, ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"), (1, " B")))


def _with_unit(value: float, units: Sequence[tuple[float, str]]) -> str:
    for size, unit in units:
        # What would round to 1,000 of a unit is 1 of the next.
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def relative_change(before: float | int | None, after: float | int | None) -> str | None:
    """``+12.3%``; None if there is nothing to compare."""
    if not before or after is None:
        return None
    # Adding zero turns -0.0 into 0.0.
    return f"{round(after / before - 1, 3) + 0.0:+.1%}"


def spans(ids: Iterable[int]) -> str:
    """Runs of whole numbers in order: ``[8, 0, 1, 2, 5, 7]`` is ``0-2, 5, 7, 8``."""
    runs: list[list[int]] = []
    for i in sorted(ids):
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs
    )


def extent(values: Iterable[int], between: str = "-") -> str:
    """The least and the largest, such as ``8-16``, or the one value that all have."""
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]}{between}{found[-1]}"


def counted(number: int, noun: str) -> str:
    """``1 expert``, ``3 experts``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
