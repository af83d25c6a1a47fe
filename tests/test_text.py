"""Tables, spans and digits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.text import (
    aligned,
    byte_size,
    counted,
    extent,
    filled_columns,
    relative_change,
    short_count,
    small_number,
    spans,
    two_digits,
)


@given(st.lists(st.lists(st.text("ab1 ", max_size=6), min_size=3, max_size=3), min_size=1))
def test_columns_of_a_table_end_together(rows):
    marked = [[f"|{cell}|" for cell in row] for row in rows]
    lines = aligned(marked).splitlines()
    assert len(lines) == len(rows)
    assert len({len(line) for line in lines}) == 1
    assert all(line.startswith(row[0]) for line, row in zip(lines, marked, strict=True))


def test_columns_without_content_are_left_out():
    rows = [["a", "-", "1"], ["-", "-", "2"]]
    assert filled_columns(["x", "y", "z"], rows) == [["x", "z"], ["a", "1"], ["-", "2"]]


@given(st.sets(st.integers(0, 40)))
def test_spans_hold_the_numbers_they_were_made_of(ids):
    found = set()
    for part in filter(None, spans(ids).split(", ")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    assert found == ids


def test_spans_and_extents():
    assert spans([8, 0, 1, 5, 6, 7]) == "0, 1, 5-8"
    assert extent([3, 1, 2]) == "1-3"
    assert extent([4, 4]) == "4"
    assert extent({1, 2}, " to ") == "1 to 2"
    assert [counted(n, "expert") for n in (0, 1, 1200)] == [
        "0 experts",
        "1 expert",
        "1,200 experts",
    ]


@pytest.mark.parametrize(
    ("write", "values", "expected"),
    [
        (small_number, (None, 0.0, 5.04e-7, 0.25), ["-", "0.0000", "5.0e-07", "0.2500"]),
        (
            two_digits,
            (0.0, 0.00251, 0.996, 1.25, 9.96, 123.4),
            ["0", "0.0025", "1.0", "1.2", "10", "123"],
        ),
        (
            short_count,
            (0, 999, 999.6, 2048, 999_499, 999_600, 4e10),
            ["0", "999", "1k", "2.05k", "999k", "1M", "40B"],
        ),
        (byte_size, (0, 12, 999.6, 84e9, 1.3e12), ["0", "12 B", "1 kB", "84 GB", "1.3 TB"]),
    ],
)
def test_digits(write, values, expected):
    assert list(map(write, values)) == expected


def test_relative_changes():
    pairs = (2, 3), (2, 1.99999), (0, 1), (1, None)
    assert [relative_change(*pair) for pair in pairs] == ["+50.0%", "+0.0%", None, None]
