"""A statistic is one row of a table: what is read off it holds for a row that we make up."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_config

from moe_jax.calibrate import plan_second_moments
from moe_jax.confidence import converges
from moe_jax.scoring import CRITERIA
from moe_jax.statistics import Stats
from moe_jax.statistics_table import (
    STATISTICS,
    Statistic,
    axis_sizes,
    merge_arrays,
    sliced,
    spread,
    statistic,
)

TABLE = {
    **STATISTICS,
    "layers": {
        **STATISTICS["layers"],
        "peak": Statistic("largest of something", "X F", "maximum", sliced=True),
        "cube": Statistic("large", "X F1 F1", "maximum", request="second_moments"),
    },
}
# Router row 2 is a novice.
CONFIG = tiny_config().replace_moe(0, novice_ids=(2,)).replace_moe(1, novice_ids=(2,))
STORED = [e for e in range(CONFIG.moe(0).num_experts) if e != 2]
WIDTH = CONFIG.moe(0).expert_width


def text(seed: int) -> tuple[dict[str, np.ndarray], Stats]:
    """What a device has of some text, over stored experts, and the same on the host."""
    rng = np.random.default_rng(seed)
    count = rng.integers(1, 9, len(STORED))
    arrays = {
        "stored_count": count.astype(np.int32),
        "output_mean": rng.standard_normal((len(STORED), CONFIG.width)).astype(np.float32),
        "output_m2": rng.random((len(STORED), CONFIG.width)).astype(np.float32),
        "peak": rng.random((len(STORED), WIDTH)).astype(np.float32),
        "cube": rng.random((len(STORED), WIDTH + 1, WIDTH + 1)).astype(np.float32),
    }
    rows = np.zeros(CONFIG.moe(0).num_experts, np.int32)
    rows[STORED] = count
    layers = {i: spread({**arrays, "count": rows}, CONFIG, i, TABLE) for i in CONFIG.moe_layers}
    norms = {i: {"weight_norm": np.ones(2, np.float32)} for i in range(CONFIG.num_layers)}
    own = {i: sliced(layer, TABLE) for i, layer in layers.items()}
    share = Stats(own, int(count.sum()), 1, 1)
    stats = Stats(layers, int(count.sum()), 1, 1, {}, norms, {}, {(0, seed % 2): share})
    return arrays, stats


def test_a_made_up_row_merges_alike_on_device_and_host():
    (a, host_a), (b, host_b) = text(0), text(2)
    device = jax.jit(lambda x, y: merge_arrays(x, y, xp=jnp, table=TABLE))(a, b)
    host = host_a.merge(host_b, table=TABLE)
    for name in ("peak", "cube"):
        np.testing.assert_array_equal(device[name], np.maximum(a[name], b[name]))
        np.testing.assert_array_equal(host.layers[0][name][STORED], device[name])
        assert not host.layers[0][name][2].any()
    for name in ("output_mean", "output_m2"):
        np.testing.assert_allclose(host.layers[0][name][STORED], device[name], rtol=1e-5, atol=1e-6)
    part = host.slices[0, 0].layers[1]
    np.testing.assert_array_equal(part["peak"], host.layers[1]["peak"])
    assert "cube" not in part


def test_a_made_up_row_is_kept_in_files_and_checked_against_a_model(tmp_path):
    _, stats = text(0)
    stats.save(tmp_path / "stats")
    loaded = Stats.load(tmp_path / "stats")
    for mine, theirs in ((stats, loaded), (stats.slices[0, 0], loaded.slices[0, 0])):
        np.testing.assert_array_equal(mine.layers[1]["peak"], theirs.layers[1]["peak"])
    loaded.check_model(CONFIG, TABLE)
    wider = CONFIG
    for i in CONFIG.moe_layers:
        wider = wider.replace_moe(i, expert_width=WIDTH + 2)
    with pytest.raises(ValueError, match=rf"peak of layer 0 must be \[6, {WIDTH + 2}\], got"):
        loaded.check_model(wider, TABLE)
    assert set(loaded.without_requested(TABLE).layers[0]) == set(loaded.layers[0]) - {"cube"}
    with pytest.raises(ValueError, match="no statistic of layers is called 'peak'"):
        stats.merge(stats)


def test_a_made_up_row_counts_in_the_memory_plan():
    plain, more = (plan_second_moments(CONFIG, table=table) for table in (STATISTICS, TABLE))
    each = 4 * CONFIG.moe(0).num_experts * (WIDTH + 1) ** 2
    assert more.by_layer == {i: size + each for i, size in plain.by_layer.items()}
    assert more.total == 2 * plain.total


def test_rows_of_moments_come_in_pairs_over_counted_experts():
    for part, rows in STATISTICS.items():
        for name, row in rows.items():
            sizes = axis_sizes(CONFIG, 0) | {"T": 1}  # tokens, as many as the text has
            assert all(axis in sizes for axis in row.axes.split()), name
            if row.merge == "mean":
                pair = rows[name.removesuffix("mean") + "m2"]
                assert pair == dataclasses.replace(row, about=pair.about, merge="m2")
                assert part == "layers"
                assert row.axes.split()[0] in ("E", "X", "O")


def test_every_sum_that_a_criterion_names_is_a_statistic():
    for ranked, criteria in CRITERIA.items():
        for name, criterion in criteria.items():
            for array in criterion.reads():
                row = statistic(array, criterion.part)
                # Slices must keep what rankings of experts read, or their text cannot be weighed.
                weighed = ranked == "experts" and converges(name)
                assert row.sliced or not weighed, (name, array)
            sources = {statistic(array, criterion.part).source for array in criterion.reads()}
            assert ("backward" in sources) == bool(criterion.loss)
