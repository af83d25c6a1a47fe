"""What a lineage says of a model, against what the cut did to its weights."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest
from models import EXPERT_WIDTH, EXPERTS, tiny_config, token_batches

from moe_jax.calibrate import calibrate
from moe_jax.config import SharedExpert
from moe_jax.kinds import SigmoidRouter
from moe_jax.lineage import Lineage, Origin, gathered
from moe_jax.model import init_params
from moe_jax.params import Model, abstract_params, leaves_with_path, path_name
from moe_jax.plan import LayerPlan, Merge, Plan
from moe_jax.prune import apply_plan, refit
from moe_jax.run.job import needs_statistics


def _narrow(seed: int, *widths: int) -> dict[int, tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    chosen = (sorted(rng.permutation(EXPERT_WIDTH)[:width].tolist()) for width in widths)
    return dict(enumerate(map(tuple, chosen)))


# Name -> the plans of layers 0 and 2 (1 is dense), and entries of layer 0 that are new, by leaf.
CUTS = {
    "removal": ((LayerPlan(deleted=(1, 4), kv_groups=(1,)), LayerPlan(deleted=(0,))), {}),
    "novices": ((LayerPlan(novices=(0, 3), novice_value="zero"),), {"novices.constant": 2}),
    "one width": ((LayerPlan(neurons=_narrow(0, *[5] * EXPERTS)),) * 2, {}),
    "padding": ((LayerPlan(neurons=_narrow(1, 3, 5, 2, 5, 5, 4), padded_width=6),), {}),
    "own widths": (
        (LayerPlan((2,), (5,), "zero", _narrow(2, 8, 3, 8, 3, 5, 8), own_widths=True),),
        {"novices.constant": 1},
    ),
    "merge": (
        (LayerPlan(merges=(Merge(2, (0, 5), (0.5, 0.25, 0.25)),)),),
        {"router.kernel": 1, "router.correction": 1, "experts.gate": 1, "experts.up": 1,
         "experts.down": 1},
    ),
    "repair": ((LayerPlan(neurons=_narrow(3, *[5] * EXPERTS), repair=True),), {"experts.down": 6}),
    "constants": (
        (LayerPlan(neurons=_narrow(4, *[5] * EXPERTS), constants=True),), {"expert_bias": 6}
    ),
    "shared": ((LayerPlan(shared_neurons=(0, 2, 3, 5)),) * 2, {}),
    "shared, repaired": (
        (LayerPlan(shared_neurons=(1, 2, 3), repair=True),), {"shared.down": 1}
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def source():
    config = tiny_config("qwen3_moe", router=SigmoidRouter(correction=True))
    config = dataclasses.replace(
        config, attention=dataclasses.replace(config.attention, qk_norm="head")
    )
    for i in config.moe_layers:
        config = config.replace_moe(i, shared=SharedExpert(6))
    return Model(init_params(config, jax.random.key(0)), config)


def _gathered(source: Model, origin: Origin) -> np.ndarray:
    """What a lineage says that a part of a leaf is."""
    trees = (source.params, abstract_params(source.config))
    array, leaf = (dict(leaves_with_path(tree))[origin.path] for tree in trees)
    row = slice(None) if origin.row is None else slice(origin.row, origin.row + 1)
    return gathered(np.asarray(array)[row], leaf.axes, origin)


def _check(lineage: Lineage, source: Model, model: Model) -> dict[str, int]:
    """What is not new is the source's to the bit; how many entries of each leaf are new."""
    assert lineage.config == model.config
    new: Counter[str] = Counter()
    leaves = dict(leaves_with_path(abstract_params(model.config)))
    for path, array in leaves_with_path(model.params):
        parts = list(array) if leaves[path].axes[0] in "EC" else [array]
        for origin, part in zip(lineage.origins(path), parts, strict=True):
            if origin is None or origin.new:
                new[path_name(path)] += 1
            else:
                np.testing.assert_array_equal(part, _gathered(source, origin), path_name(path))
    return dict(new)


def _cut(lineage: Lineage, model: Model, plan: Plan) -> tuple[Lineage, Model]:
    batches = token_batches(1)
    stats = None
    if needs_statistics(plan):
        stats = calibrate(*model, batches, second_moments=True, shared_moments=True, warn=False)
    config, params = apply_plan(*model, plan, stats)
    smaller = Model(params, config)
    if plan.settings.get("refit"):
        smaller = Model(refit(model, smaller, batches), config)
    return lineage.after(plan, config), smaller


@pytest.mark.parametrize("name", CUTS)
def test_what_is_not_new_is_the_sources_to_the_bit(source, name):
    """After the cut, and after a second one of another kind on its result."""
    layers, expected = CUTS[name]
    lineage, model = _cut(
        Lineage.of(source.config), source, Plan(dict(zip((0, 2), layers, strict=False)))
    )
    new = _check(lineage, source, model)
    assert {k: n for k, n in new.items() if k.startswith("layers.0.moe.")} == {
        f"layers.0.moe.{leaf}": count for leaf, count in expected.items()
    }
    kept = model.config.moe(0).expert_ids
    narrow = {e: tuple(range(1, model.config.moe(0).width_of(e), 2)) for e in kept}
    shared = model.config.moe(0).shared
    assert shared is not None
    fewer = tuple(range(0, shared.width, 2))
    again = LayerPlan(deleted=(kept[-1],), neurons=narrow, own_widths=True, shared_neurons=fewer)
    lineage, model = _cut(lineage, model, Plan({0: again}, dropped_layers=(1,)))
    new = _check(lineage, source, model)
    named = _check(lineage.changed(("router", "head")), source, model).keys() - new.keys()
    assert named >= {"lm_head.kernel", "layers.1.moe.router.kernel"}
    assert all("router" in leaf or "lm_head" in leaf for leaf in named)


def test_a_refit_makes_all_down_projections_new(source):
    plan = Plan({0: LayerPlan(deleted=(2,))}, settings={"refit": True})
    lineage, model = _cut(Lineage.of(source.config), source, plan)
    downs = {"layers.0.moe.experts.down": EXPERTS - 1, "layers.2.moe.experts.down": EXPERTS}
    downs |= {f"layers.{i}.moe.shared.down": 1 for i in (0, 2)}
    assert _check(lineage, source, model) == downs
