"""A planted expert of huge, rare outputs: found, kept at every ratio, and what losing it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import EXPERT_WIDTH, EXPERTS, tiny_config, token_batches

from moe_jax import apply_plan, calibrate, forward
from moe_jax.model import init_params
from moe_jax.plan import Cut, plan_cut
from moe_jax.scoring.super_experts import super_experts, with_floor
from moe_jax.statistics import Stats

LAYER, EXPERT = 0, 3
BATCHES = token_batches(4, batch=4, length=16)


@pytest.fixture(scope="module")
def planted():
    """One expert of the first layer writes a hundred times as much, for the few that choose it.

    The head was fitted to the model as it is, in the direction that this expert alone writes.
    """
    config = tiny_config("qwen3_moe", vocab_size=64)
    params = init_params(config, jax.random.key(0))
    moe = params["layers"][LAYER]["moe"]
    down = moe["experts"]["down"].at[EXPERT].multiply(100.0)
    kernel = moe["router"]["kernel"].at[:, EXPERT].multiply(0.3)
    moe = {**moe, "experts": {**moe["experts"], "down": down}, "router": {"kernel": kernel}}
    params["layers"][LAYER] = {**params["layers"][LAYER], "moe": moe}
    stats = calibrate(params, config, BATCHES, importance=("lm", "rerouting"), warn=False)
    return params, config, stats


def _divergence(original, smaller) -> float:
    """Mean KL divergence of a cut model's predictions from the original's."""
    total = count = 0.0
    for batch in BATCHES:
        ids = jnp.asarray(batch["mask"], jnp.int32)
        p, q = (
            jax.nn.log_softmax(forward(params, config, batch["tokens"], ids)[0])
            for params, config in (original, smaller)
        )
        kl = (jnp.exp(p) * (p - q)).sum(-1)
        total, count = total + float((kl * ids).sum()), count + float(ids.sum())
    return total / count


def _kept(planted, **fields) -> int:
    """Neurons of the planted expert that a cut keeps."""
    params, config, stats = planted
    plan = plan_cut(Cut.from_dict(fields), stats, config, params=params).plan.layers[LAYER]
    if EXPERT in {*plan.vanishing, *plan.novices}:
        return 0
    return len(plan.neurons.get(EXPERT, range(EXPERT_WIDTH)))


def test_it_is_found_and_nothing_else(planted):
    _, _, stats = planted
    assert stats.layers[LAYER]["count"][EXPERT] < stats.layers[LAYER]["count"].mean()
    assert super_experts(stats) == {LAYER: (EXPERT,)}
    config = tiny_config("qwen3_moe", vocab_size=64)
    plain = calibrate(init_params(config, jax.random.key(0)), config, BATCHES, warn=False)
    assert super_experts(plain) == {}


def test_the_largest_output_is_the_largest_of_all_batches(planted):
    params, config, stats = planted
    largest = np.zeros(EXPERTS)
    for batch in BATCHES:
        taps = ("output", "group_sizes")
        aux = forward(params, config, batch["tokens"], jnp.asarray(batch["mask"], jnp.int32), taps)
        layer = aux[1]["layers"][LAYER]
        ends = np.cumsum(layer["group_sizes"])
        norms = np.linalg.norm(np.asarray(layer["output"], np.float64), axis=-1)
        for e, (start, end) in enumerate(zip(ends - layer["group_sizes"], ends, strict=True)):
            largest[e] = max(largest[e], norms[start:end].max(initial=0))
    np.testing.assert_allclose(stats.layers[LAYER]["output_peak"], largest, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.25, 0.125])
def test_ours_keep_it_at_every_ratio(planted, ratio):
    least = EXPERT_WIDTH // 4
    own = {"neuron_scope": "model", "own_widths": True, "width_ratio": ratio}
    assert _kept(planted, method="token_fisher", **own) >= least
    within = {"neuron_scope": "layer_width", "width_ratio": max(ratio, 0.25)}
    assert _kept(planted, method="token_fisher", **within) >= least
    keep = max(ratio, 2 / EXPERTS)
    gone = _kept(planted, method="rerouted", replacement="delete", keep_ratio=keep)
    assert gone == EXPERT_WIDTH


def test_published_criteria_of_means_lose_it(planted):
    """By frequency, as published, it goes, and predictions are others; without it they stay."""
    params, config, stats = planted
    fields = {"method": "frequency", "replacement": "delete", "keep_experts": 4}
    assert _kept(planted, **fields) == 0
    assert _kept(planted, **fields, super_floor=1.0) == EXPERT_WIDTH
    found = []
    for floor in (0.0, 1.0):
        cut = Cut.from_dict({**fields, "super_floor": floor})
        plan = plan_cut(cut, stats, config, params=params).plan
        smaller, weights = apply_plan(params, config, plan, stats)
        found.append(_divergence((params, config), (weights, smaller)))
    assert found[0] > 1.5 * found[1]  # as many experts are gone either way


def test_raised_scores_keep_their_order():
    layer = {"output_peak": np.array([1.0, 1.0, 50.0, 1.0])}
    stats = Stats({0: layer}, 1, 1, 1)
    scores = {0: np.array([[1.0, 2.0], [3.0, 4.0], [0.2, 0.1], [5.0, 6.0]])}
    raised = with_floor(scores, stats, 0.5)[0]
    assert raised[2, 0] > 21 and raised[2, 1] == 0.1  # noqa: PT018
    assert with_floor(scores, stats, 0.0) is scores
    experts = with_floor({0: np.array([1.0, 2.0, 0.0, 3.0])}, stats, 1.0)[0]
    assert experts.argmax() == 2
    assert super_experts(Stats({0: {"count": np.ones(4)}}, 1, 1, 1)) == {}
