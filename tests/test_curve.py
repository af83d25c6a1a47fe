"""The curve of what cuts of falling size would lose."""

import numpy as np
import pytest
from models import EXPERTS, tiny_model, token_batches

from moe_jax import calibrate
from moe_jax.plan import Cut, plan_cut
from moe_jax.plan.curve import Point, curve_table, knee, removal_curve


@pytest.fixture(scope="module")
def measured():
    params, config = tiny_model("olmoe")
    return params, config, calibrate(params, config, token_batches(2), importance=("lm",))


def test_points_are_those_of_the_plans(measured):
    _, config, stats = measured
    cut = Cut.from_dict({"method": "token_fisher", "width_ratio": 0.5, "super_floor": 0.0})
    points = removal_curve(cut, stats, config, ratios=(0.75, 0.5, 0.25))
    assert [p.ratio for p in points] == [0.75, 0.5, 0.25]
    assert points[0].lost < points[1].lost < points[2].lost < 1
    assert points[0].parameters > points[1].parameters > points[2].parameters
    planned = plan_cut(cut, stats, config)
    total = sum(values.sum() for values in planned.scores.values())
    kept = sum(
        planned.scores[i][e, list(neurons)].sum()
        for i, layer in planned.plan.layers.items()
        for e, neurons in layer.neurons.items()
    )
    assert points[1].lost == pytest.approx(1 - kept / total)


def test_sizes_that_are_not_allowed_are_left_out(measured):
    _, config, stats = measured
    cut = Cut.from_dict({"method": "frequency", "keep_ratio": 0.5, "replacement": "delete"})
    points = removal_curve(cut, stats, config, ratios=(0.9, 0.5, 0.01))
    assert [p.ratio for p in points] == [0.9, 0.5]
    counts = stats.layers[0]["count"]
    assert points[1].parameters < points[0].parameters
    assert 0 < points[1].lost <= 1 - np.sort(counts)[-EXPERTS // 2 :].sum() / counts.sum() + 0.5
    with pytest.raises(ValueError, match=r"no ratio of \(0.01,\) can be planned"):
        removal_curve(cut, stats, config, ratios=(0.01,))
    with pytest.raises(ValueError, match="rank experts or neurons"):
        removal_curve(Cut.from_dict({"drop_layers": 1}), stats, config)


def test_the_knee_is_where_the_curve_turns():
    lost = (0.01, 0.02, 0.03, 0.3, 1.0)
    points = [
        Point(ratio, 1, 1, share)
        for ratio, share in zip((0.9, 0.7, 0.5, 0.3, 0.1), lost, strict=True)
    ]
    assert knee(points).ratio == 0.5
    lines = curve_table(points).splitlines()
    assert [line.endswith("knee") for line in lines] == [False] * 3 + [True] + [False] * 2
