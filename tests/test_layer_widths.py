"""One width for each layer: experts of a layer alike, layers as the model needs them."""

import itertools

import numpy as np
import pytest
from models import EXPERT_WIDTH, EXPERTS, tiny_config, tiny_model, token_batches

from moe_jax.model import forward
from moe_jax.params import count_params
from moe_jax.plan import Cut, make_plan, planned_config
from moe_jax.prune import apply_plan

CONFIG = tiny_config("qwen3_moe")
RNG = np.random.default_rng(0)
SCORES = {
    i: RNG.exponential(scale, (EXPERTS, EXPERT_WIDTH))
    for i, scale in zip(CONFIG.moe_layers, (1.0, 3.0), strict=True)
}


def _kept(plan, i) -> float:
    neurons = plan.layers[i].neurons
    return sum(SCORES[i][e][list(kept)].sum() for e, kept in neurons.items())


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("step", [1, 2])
def test_no_other_widths_keep_more(ratio, step):
    plan = make_plan(
        SCORES,
        CONFIG,
        width_ratio=ratio,
        neuron_scope="layer_width",
        own_widths=True,
        round_to=step,
    )
    found = planned_config(CONFIG, plan)
    widths = [found.moe(i).expert_width for i in CONFIG.moe_layers]
    budget = 2 * EXPERT_WIDTH * ratio
    assert sum(widths) <= budget
    best = max(
        sum(
            np.sort(SCORES[i], axis=1)[:, EXPERT_WIDTH - n :].sum()
            for i, n in zip(CONFIG.moe_layers, pair, strict=True)
        )
        for pair in itertools.product(range(step, EXPERT_WIDTH + 1, step), repeat=2)
        if sum(pair) <= sum(widths)
    )
    assert sum(_kept(plan, i) for i in CONFIG.moe_layers) == pytest.approx(best)
    assert widths[1] >= widths[0]  # where scores are three times as high
    assert sum(widths) + step > budget or max(widths) == EXPERT_WIDTH


def test_padded_computes_what_own_widths_do():
    params, config = tiny_model("qwen3_moe")
    tokens, logits = token_batches(1)[0]["tokens"], []
    for own in (True, False):
        plan = make_plan(
            SCORES, config, width_ratio=0.5, neuron_scope="layer_width", own_widths=own
        )
        smaller, weights = apply_plan(params, config, plan)
        logits.append(forward(weights, smaller, tokens)[0])
        widths = {smaller.moe(i).expert_width for i in smaller.moe_layers}
        assert len(widths) == (2 if own else 1)
    np.testing.assert_array_equal(*logits)


def test_a_budget_is_kept():
    limit = count_params(CONFIG).total * 4 // 5
    plan = make_plan(
        SCORES, CONFIG, total_params=limit, neuron_scope="layer_width", own_widths=True
    )
    assert 0.97 * limit < count_params(planned_config(CONFIG, plan)).total <= limit


@pytest.mark.parametrize("field", [{"active_share": 0.5}, {"max_buckets": 2}])
def test_what_is_about_experts_own_widths_is_refused(field):
    cut = {"method": "token_fisher", "neuron_scope": "layer_width", "own_widths": True}
    with pytest.raises(ValueError, match="own_widths, of experts"):
        Cut.from_dict({**cut, "width_ratio": 0.5, **field})
