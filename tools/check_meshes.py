"""Every transform on meshes of eight devices against one device, in a table.

    python tools/check_meshes.py                          # four models, six meshes
    python tools/check_meshes.py --models phimoe --meshes 1x2x2x2

Models are tiny and random, with fixed seeds; meshes are data x fsdp x expert x tensor. A cell is
the largest difference of any array, relative to that array's largest magnitude; plans, generated
tokens and exported files must be the same. What differs are sums of float32 numbers, added up in
another order: 1e-6 of the largest is usual, and the condition of a matrix multiplies it where one
is inverted (repair, OBS, refit). Adam divides a gradient by its own size, so that one that is
mostly rounding may move its weight by a step of either sign, here 1e-3. Exits with 1 where a bound
is passed. Takes about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import conftest  # noqa: E402, F401, eight host devices and programs that are compiled fast
import jax  # noqa: E402

from moe_jax import apply_plan, calibrate, forward, init_params, save_hf, score  # noqa: E402
from moe_jax.config import LayerConfig, ModelConfig, MoeConfig, SharedExpert  # noqa: E402
from moe_jax.data.evaluation import EvaluationWindows, TextSize  # noqa: E402
from moe_jax.distill import TrainSettings  # noqa: E402
from moe_jax.distill.step import arranged, initial_state, make_step, result_of  # noqa: E402
from moe_jax.evaluate import evaluate  # noqa: E402
from moe_jax.kinds import GroupedQueryAttention, SoftmaxRouter, SparseMixerRouter  # noqa: E402
from moe_jax.model.generate import generate  # noqa: E402
from moe_jax.params import Model  # noqa: E402
from moe_jax.plan import Cut, LayerPlan, Plan, plan_cut  # noqa: E402
from moe_jax.processes import (  # noqa: E402
    MESH_AXES,
    make_mesh,
    mesh_of,
    on_mesh_of,
    place_batch,
    spec_tree,
)
from moe_jax.prune import refit  # noqa: E402

MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 8), (2, 2, 2, 1), (1, 2, 2, 2)]
ROWS, LENGTH, VOCAB = 8, 24, 64
BOUNDS = {"repair": 1e-3, "obs": 1e-3, "refit": 1e-3, "distil": 1e-3}
BOUND = 1e-4


def _model(family: str, moe: MoeConfig, **changes: Any) -> ModelConfig:
    facts = {
        "attention": GroupedQueryAttention(8, qk_norm="full" if family == "olmoe" else None),
        "router": SoftmaxRouter(),
    }
    layers = (LayerConfig(8, 8, moe),) * 2
    return ModelConfig(family, VOCAB, 32, layers=layers, init_std=0.3, **(facts | changes))


_OWN = (16,) * 8 + (8,) * 8 + (0,) * 2
MODELS = {
    "phimoe": _model(
        "phimoe",
        MoeConfig(16, 2, 16),
        attention=GroupedQueryAttention(8, qkv_bias=True, out_bias=True),
        router=SparseMixerRouter(),
        norm="layer",
        lm_head_bias=True,
    ),
    "olmoe": _model("olmoe", MoeConfig(16, 2, 16)),
    "shared": _model("qwen2_moe", MoeConfig(16, 2, 16, shared=SharedExpert(16, True))),
    "own widths": _model("olmoe", MoeConfig(18, 3, 16, (16, 17), _OWN, True)),
}
CUTS = {
    "prune": Cut("mone", keep_experts=8),
    "merge": Cut("m_smoe", keep_experts=8),
    "repair": Cut("slim", importance="kd_topk", expert_width=8, repair=True),
    "obs": Cut("obs", expert_width=8),
}


def transforms(model: Model, folder: Path) -> dict[str, Any]:
    """What each transform makes of a model, wherever its weights lie."""
    params, config = model
    mesh = mesh_of(params)
    rng = np.random.default_rng(0)
    batches = [
        {
            "tokens": rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
            "mask": np.arange(LENGTH) < rng.integers(LENGTH // 2, LENGTH + 1, (ROWS, 1)),
        }
        for _ in range(2)
    ]
    placed = place_batch(batches[0], mesh)
    made: dict[str, Any] = {}
    step = jax.jit(lambda p, b: forward(p, config, b["tokens"], b["mask"].astype(np.int32))[0])
    with on_mesh_of(params):
        made["forward"] = step(params, placed)
    losses = ("kd_topk", "lm", "rerouting")
    stats = calibrate(
        params, config, batches, importance=losses, second_moments=True, attention_moments=True,
        warn=False,
    )  # fmt: skip
    made["calibrate"] = (stats.layers, stats.attention, stats.stream)
    made["score"] = {
        method: score(stats, method, model=model) for method in ("mone", "reap", "obs", "energy")
    }
    made["plan"] = []
    plans = {"obs": _narrow(config, made["score"]["obs"])}
    if not config.moe(0).expert_widths:
        plans = {n: plan_cut(cut, stats, config, params=params).plan for n, cut in CUTS.items()}
    for name, plan in plans.items():
        made["plan"].append(plan.to_json())
        small_config, small = apply_plan(params, config, plan, stats)
        made[name] = small
        if name == "obs":
            cut_model = Model(small, small_config)
            made["refit"] = refit(model, cut_model, batches)
    made["distil"] = _distilled(model, cut_model, batches[0])
    made["evaluate"] = _evaluated(model, cut_model, batches)
    made["generate"] = generate(params, config, [[1, 2, 3], [4, 5]], 4)
    save_hf(folder, params, config)
    made["export"] = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return made


def _narrow(config: ModelConfig, scores: dict[int, np.ndarray]) -> Plan:
    """Eight neurons of each expert, since a cut with own widths need not leave what divides."""
    layers = {}
    for i in config.moe_layers:
        best = np.argsort(-scores[i], 1)[:, :8]
        neurons = {e: tuple(sorted(map(int, best[e]))) for e in config.moe(i).expert_ids}
        layers[i] = LayerPlan(neurons=neurons, own_widths=True, repair=True)
    return Plan(layers, "obs")


def _distilled(teacher: Model, student: Model, batch: dict[str, np.ndarray]) -> Any:
    """After a step: loss, gradient norm, the optimizer's moments and the weights."""
    settings = TrainSettings(
        learning_rate=1e-3, steps=2, warmup_steps=0, loss="kd_topk", weight_decay=0.0,
        sample_routing=False, compute_dtype="float32",
    )  # fmt: skip
    params, config = student
    mesh = mesh_of(params)
    state, frozen = initial_state(params, config, settings)
    step = make_step(config, settings, teacher.config, state if mesh else None)
    before = arranged(teacher.params, teacher.config, settings)
    text = {"tokens": batch["tokens"], "segment_ids": batch["mask"].astype(np.int32)}
    with on_mesh_of(params):
        state, metrics = step(state, frozen, before, place_batch(text, mesh))
    moments = jax.tree.leaves(state["optimizer"])
    return metrics["loss"], metrics["gradient_norm"], moments, result_of(state, frozen)


def _evaluated(model: Model, cut: Model, batches: list[dict[str, np.ndarray]]) -> list[float]:
    windows = [
        {
            "tokens": batch["tokens"][:, :-1],
            "targets": batch["tokens"][:, 1:],
            "segment_ids": np.ones((ROWS, LENGTH - 1), np.int32),
            "mask": batch["mask"][:, 1:],
        }
        for batch in batches
    ]
    scored = sum(int(window["mask"].sum()) for window in windows)
    text = EvaluationWindows({"a": TextSize(scored, scored, 8)}, windows, np.zeros(16, int))
    found = evaluate(cut.params, cut.config, text, reference=model, with_speed=False).domains["a"]
    return [found.nll, found.kl, found.top1_agreement]


def difference(one: Any, many: Any) -> float:
    """Largest difference of two trees; infinite where what must be equal is not."""
    if isinstance(one, bytes | str):
        return 0.0 if one == many else np.inf
    if isinstance(one, dict):
        assert one.keys() == many.keys()
        return max((difference(one[key], many[key]) for key in one), default=0.0)
    if isinstance(one, list | tuple):
        return max(map(difference, one, many), default=0.0)
    a, b = np.asarray(one, np.float64), np.asarray(many, np.float64)
    return float(np.abs(a - b).max(initial=0) / max(np.abs(a).max(initial=0), 1e-30))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = ["x".join(map(str, shape)) for shape in MESHES]
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--meshes", nargs="+", default=names, choices=names)
    arguments = parser.parse_args()
    broken = 0
    for name in arguments.models:
        config = MODELS[name]
        params = init_params(config, jax.random.key(0))
        with tempfile.TemporaryDirectory() as folder:
            one = transforms(Model(params, config), Path(folder) / "one")
            print(f"\n{name:10}", *(f"{transform:>9}" for transform in one), flush=True)
            for label in arguments.meshes:
                mesh = make_mesh(dict(zip(MESH_AXES, map(int, label.split("x")), strict=True)))
                sharded = Model(jax.device_put(params, spec_tree(config, mesh)), config)
                many = transforms(sharded, Path(folder) / label)
                found = {key: difference(one[key], many[key]) for key in one}
                broken += sum(found[key] > BOUNDS.get(key, BOUND) for key in found)
                print(f"{label:10}", *(f"{value:9.0e}" for value in found.values()), flush=True)
    return broken > 0


if __name__ == "__main__":
    sys.exit(main())
