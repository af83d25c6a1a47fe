"""Removal of experts with re-routing against its definition, one token and set at a time."""

import numpy as np
import pytest
from models import EXPERTS, tiny_model, token_batches

from moe_jax.calibrate import calibrate
from moe_jax.plan import Cut, plan_cut
from moe_jax.scoring import score
from moe_jax.scoring.rerouting import removal_costs

TOKENS, K = 40, 2
RNG = np.random.default_rng(0)
LOGITS, PULLS = RNG.normal(size=(TOKENS, EXPERTS)), RNG.normal(size=(TOKENS, EXPERTS))


CORRECTION = RNG.normal(size=EXPERTS)


def _change(scores, pulls, removed, divisor, correction) -> float:
    """What a token's layer adds, without some experts, in the direction of the gradient."""
    left = [e for e in range(len(scores)) if e not in removed]
    chosen = sorted(left, key=lambda e: -(scores[e] + correction[e]))[:K]
    among = {"chosen": chosen, "left": left}.get(divisor)
    whole = 1.0 if among is None else sum(scores[e] for e in among)
    return sum(scores[e] / whole * pulls[e] for e in chosen)


def _cost(removed, scores, divisor, correction) -> float:
    """The definition: squared first-order changes of all tokens' losses."""
    return sum(
        (_change(x, s, removed, divisor, correction) - _change(x, s, (), divisor, correction)) ** 2
        for x, s in zip(scores, PULLS, strict=True)
    )


@pytest.mark.parametrize(
    ("divisor", "corrected"),
    [("chosen", False), ("left", False), ("chosen", True), ("nothing", True)],
)
def test_each_step_removes_what_costs_least(divisor, corrected):
    scores = 1 / (1 + np.exp(-LOGITS)) if corrected else np.exp(LOGITS)
    correction = CORRECTION * corrected
    costs = removal_costs(scores, PULLS, K, divisor, correction)
    order = np.argsort(costs, kind="stable")
    removed: list[int] = []
    highest = 0.0
    for e in order[: EXPERTS - K]:
        left = [f for f in range(EXPERTS) if f not in removed]
        each = {f: _cost([*removed, f], scores, divisor, correction) for f in left}
        assert e == min(each, key=lambda f: each[f])
        removed.append(int(e))
        highest = max(highest, each[int(e)])
        assert costs[e] == pytest.approx(highest, rel=1e-9)
    assert costs[order[EXPERTS - K :]].min() > highest


def test_twins_do_not_both_go():
    """Two experts that are equal cost nothing one by one: each stands in for the other."""
    logits, pulls = np.zeros((30, 4)), np.zeros((30, 4))
    logits[:, :2] = 3  # experts 0 and 1, always first
    logits[:, 2:] = RNG.normal(size=(30, 2))
    pulls[:, :2], pulls[:, 2:] = 5, RNG.normal(size=(30, 2))
    costs = removal_costs(np.exp(logits), pulls, 1, "chosen")
    assert costs.argmax() in (0, 1)
    np.testing.assert_allclose(np.sort(costs)[:3], 0, atol=1e-12)


def test_from_statistics_to_a_plan():
    params, config = tiny_model("qwen3_moe")
    batches = token_batches(3)
    stats = calibrate(params, config, batches, importance=("rerouting",))
    parts = [calibrate(params, config, [batch], importance=("rerouting",)) for batch in batches]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    for i in config.moe_layers:
        assert len(stats.layers[i]["rerouting.pulls"]) == stats.tokens
        np.testing.assert_allclose(
            merged.layers[i]["rerouting.pulls"], stats.layers[i]["rerouting.pulls"], atol=1e-6
        )
    merged.check_model(config)
    scores = score(stats, "rerouted", model=(params, config))
    cut = Cut.from_dict({"method": "rerouted", "keep_experts": 3, "replacement": "delete"})
    assert cut.losses == ("rerouting",)
    plan = plan_cut(cut, stats, config, params=params).plan
    for i in config.moe_layers:
        assert plan.layers[i].deleted == tuple(sorted(np.argsort(scores[i])[: EXPERTS - 3]))


def test_refuses_routers_that_are_no_softmax():
    params, config = tiny_model("phimoe")
    stats = calibrate(params, config, token_batches(1), importance=("rerouting",))
    with pytest.raises(ValueError, match="'rerouted' needs a router"):
        score(stats, "rerouted", model=(params, config))
