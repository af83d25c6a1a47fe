"""Data of the figures, from the rows of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.compare.figures import Measured, Panel
from moe_jax.compare.grid import Calibration, Grid
from moe_jax.compare.results import Row, original, select, spread, values_of
from moe_jax.compare.runner import statistics_path
from moe_jax.compare.subjects import Subject
from moe_jax.compare.tables import complete, main_rows, percent_kept, varied_values
from moe_jax.scoring import output_deviation
from moe_jax.statistics import Stats


def size_panels(rows: Sequence[Row], grid: Grid) -> list[Panel]:
    """By model, what methods need for their parameters at the grid's own calibration."""
    return [
        _panel(
            rows,
            model,
            model,
            {
                method: [
                    _measured(statistics.fmean(r["parameters"] for r in group), group)
                    for group in _split(select(chosen, method=method), "ratio")
                ]
                for method in values_of(chosen, "method")
            },
        )
        for model in values_of(rows, "model")
        if (chosen := main_rows(rows, grid, model))
    ]


def rank_panels(rows: Sequence[Row], grid: Grid) -> list[Panel]:
    """By model and ratio, each method's one value."""
    return [
        _panel(
            rows,
            model,
            f"{model}, {percent_kept(ratio)}",
            {m: [_measured(m, select(chosen, method=m))] for m in values_of(chosen, "method")},
        )
        for model in values_of(rows, "model")
        for ratio in values_of(main_rows(rows, grid, model), "ratio")
        if (chosen := select(main_rows(rows, grid, model), ratio=ratio))
    ]


def robustness_panels(rows: Sequence[Row], grid: Grid) -> list[Panel]:
    """By model and ratio, methods over calibration texts and over their sizes."""
    fixed: dict[str, dict[str, Any]] = {
        "source": {"count": grid.count},
        "count": {"source": grid.source},
    }
    panels = []
    for model in values_of(rows, "model"):
        for ratio in values_of(select(rows, model=model), "ratio"):
            for name, others in fixed.items():
                chosen = complete(select(rows, model=model, ratio=ratio, **others), name)
                values = varied_values(chosen, name)
                if len(values) > 1:
                    methods = {
                        method: [
                            _measured(v, select(chosen, method=method, **{name: v})) for v in values
                        ]
                        for method in values_of(chosen, "method")
                    }
                    title = f"{model}, {percent_kept(ratio)}"
                    panels.append(_panel(rows, model, title, methods))
    return panels


def access_maps(
    rows: Sequence[Row], grid: Grid, subjects: Sequence[Subject]
) -> dict[str, tuple[list[dict[str, Any]], dict[str, Mapping[int, Any]]]]:
    """By model and ratio, what ``plot_access`` takes: of the first seed, for focus and rival.

    A model whose statistics are gone is left out.
    """
    maps: dict[str, tuple[list[dict[str, Any]], dict[str, Mapping[int, Any]]]] = {}
    output = Path(grid.output).expanduser()
    names = [name for name in (grid.focus, grid.rival) if name]
    for subject in subjects:
        chosen = main_rows(rows, grid, subject.label)
        for ratio in values_of(chosen, "ratio"):
            found = {n: r for n in names if (r := select(chosen, ratio=ratio, method=n))}
            if not found:
                continue
            seed = next(iter(found.values()))[0]["seed"]
            sample = Calibration(subject.name, grid.source, grid.count, seed)
            key = subject.statistics_key(sample)
            stats = Stats.load_if_same(statistics_path(output, subject, sample), key)
            if stats is None:
                continue
            gone: dict[str, Mapping[int, Any]] = {
                name: {int(i): fates for i, fates in group[0]["layers"].items()}
                for name, group in found.items()
            }
            maps[f"{subject.label}, {percent_kept(ratio)}"] = (_layers(stats), gone)
    return maps


def _layers(stats: Stats) -> list[dict[str, Any]]:
    return [
        {
            "layer": i,
            "count": arrays["count"].tolist(),
            "variance": (output_deviation(arrays) ** 2).tolist(),
        }
        for i, arrays in sorted(stats.layers.items())
    ]


def _panel(
    rows: Sequence[Row], model: str, title: str, methods: Mapping[str, Sequence[Measured]]
) -> Panel:
    before = original(rows, model)
    return Panel(title, methods, before["bits_per_byte"], before["parameters"])


def _measured(x: Any, rows: Sequence[Row]) -> Measured:
    found = spread(rows)
    return Measured(x, found.mean, found.deviation)


def _split(rows: Sequence[Row], name: str) -> list[list[Row]]:
    return [select(rows, **{name: value}) for value in values_of(rows, name)]
