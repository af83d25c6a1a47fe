"""Every jitted step of the package with abstract arguments, to be lowered for any platform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import Mesh
from models import tiny_config

from moe_jax import init_params
from moe_jax.calibrate import gradients, sums, weights
from moe_jax.config import LayerConfig, ModelConfig, MoeConfig, SharedExpert
from moe_jax.distill import TrainSettings
from moe_jax.distill.step import arranged, initial_state, make_step
from moe_jax.evaluate import held_out, likelihood
from moe_jax.model.block import layer_output
from moe_jax.model.generate import _decode_step, _draw, _prefill, prefill
from moe_jax.params import expert_leaves, stack_experts
from moe_jax.plan import merge
from moe_jax.processes import mesh_of, place_batch, spec_tree
from moe_jax.prune import compensation, merging, slicing
from moe_jax.prune.refit import _read, _solve, _Text
from moe_jax.quantization import Quantization, _rounded
from moe_jax.repair import batched, group_removal_costs, removal_costs

ROWS, LENGTH = 8, 16
Step = tuple[Callable[..., Any], tuple[Any, ...]]

_EVERYTHING = MoeConfig(6, 2, 8, (4, 5), (8, 8, 4, 4, 0, 0), True, SharedExpert(8, True))
MODELS = {
    "uniform": tiny_config("phimoe", vocab_size=64),
    "everything": tiny_config("qwen2_moe", vocab_size=64, layers=(LayerConfig(2, 2, _EVERYTHING),)),
}
MESHES: dict[str, dict[str, int] | None] = {
    "one": None,
    "2x2x2": {"data": 2, "expert": 2, "tensor": 2},
}
# Steps that send tokens through routed experts.
ROUTED = {
    "calibration sums", "layer sums", "layer output", "layer gradients", "layer pulls",
    "mask gradients", "expert pulls",
    "refit: read", "evaluate", "evaluate: states", "generate: prompt", "generate", "distil",
}  # fmt: skip


def lowered(step: Step, platform: str) -> tuple[str, int]:
    """StableHLO of a step for a platform, and how many devices it is for."""
    function, arguments = step
    exported = export.export(function, platforms=[platform])(*arguments)
    return exported.mlir_module(), exported.nr_devices


def abstract(tree: Any) -> Any:
    """Shapes, and where on a mesh, in the place of arrays."""

    def shape_of(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array | np.ndarray):
            return leaf
        sharding = getattr(leaf, "sharding", None)
        named = isinstance(sharding, jax.sharding.NamedSharding)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding if named else None)

    return jax.tree.map(shape_of, tree)


def steps_of(config: ModelConfig, mesh: Mesh | None = None) -> dict[str, Step]:
    """By name, a jitted function and its arguments for a model whose first layer has experts."""
    params = init_params(config, jax.random.key(0))
    if mesh is not None:
        params = jax.device_put(params, spec_tree(config, mesh))
    tokens = np.zeros((ROWS, LENGTH), np.int32)
    batch = {"tokens": tokens, "targets": tokens, "segment_ids": tokens, "mask": tokens > 0}
    steps = {
        **_measuring(params, config, place_batch(batch, mesh)),
        **_cutting(params, config),
        **_running(params, config, place_batch(batch, mesh)),
    }
    steps["distil"] = _distillation(params, config, place_batch(batch, mesh))
    return {name: (step, abstract(arguments)) for name, (step, arguments) in steps.items()}


def _measuring(params, config: ModelConfig, batch) -> dict[str, Step]:
    objective = gradients.Objective(config, config, "kd_topk", 4, "auto")
    every = tuple(range(config.num_layers))
    wanted = sums.Wanted(True, config.moe_layers, every, config.moe_layers)
    layer, first = config.layers[0], params["layers"][0]
    stream = jnp.zeros((ROWS, LENGTH, config.width))
    ids = batch["segment_ids"]
    one_layer = (first, config, layer, stream, ids, "auto")
    stream_batch = sums.StreamBatch(stream, ids, stream)
    behind = (first, config, layer, stream, stream, batch["mask"], "auto")
    head = {name: part for name, part in params.items() if name != "layers"}
    state = jax.eval_shape(lambda p, b: sums.batch_sums(p, config, b, "auto"), params, batch)
    return {
        "calibration sums": (sums.batch_sums, (params, config, batch, "auto", wanted)),
        "merged sums": (sums.merge_states, (state, state)),
        "layer sums": (sums.layer_sums, (first, config, layer, stream_batch, "auto", wanted.of(0))),
        "layer output": (layer_output, one_layer),
        "layer gradients": (gradients.layer_gradients, behind),
        "layer pulls": (gradients.layer_pulls, behind),
        "gradient at the head": (
            gradients.head_gradients,
            (head, config, stream, batch, "lm", 4),
        ),
        "mask gradients": (
            gradients.mask_gradients,
            (params, params, batch, jax.random.key(0), objective),
        ),
        "expert pulls": (gradients.expert_pulls, (params, config, batch, "auto")),
        "group norms": (weights.group_weight_norm, (first["attention"], layer.num_kv_heads)),
    }


def _cutting(params, config: ModelConfig) -> dict[str, Step]:
    moe, layer = config.moe(0), params["layers"][0]
    stacked = {**layer["moe"]}
    stacked["experts"] = stack_experts(stacked["experts"], expert_leaves(config, 0))
    down = stacked["experts"]["down"]
    count, width, _ = down.shape
    mesh = mesh_of(down)
    own = count // (mesh.shape["expert"] if mesh else 1)
    grams = jnp.zeros((count, width, width))
    kept = jnp.ones((count, width), bool)
    out = layer["attention"]["out"]["kernel"]
    size = out.shape[0] * out.shape[1]
    by_group = out.reshape(config.layers[0].num_kv_heads, -1, config.width)
    axes = {name: leaf.axes for name, leaf in expert_leaves(config, 0).items()}
    leaves = tuple(stacked["experts"][name] for name in axes)
    stream = jnp.zeros((ROWS, LENGTH, config.width))
    text = _Text(
        stream.reshape(-1, config.width),
        stream.reshape(-1, config.width),
        jnp.zeros((ROWS * LENGTH, moe.experts_per_token), jnp.int32),
        jnp.zeros((ROWS * LENGTH, moe.experts_per_token)),
    )
    both, shapes = (layer, layer), (config.layers[0],) * 2
    some = np.arange(width // 2)
    return {
        "weight norms": (weights.expert_weight_norms, (stacked,)),
        "weight products": (merge._weight_products, (stacked["experts"],)),
        "repair": (batched._over_experts, (compensation._repaired, own, mesh, grams, down, kept)),
        "OBS": (batched._over_experts, (removal_costs, own, mesh, grams, down)),
        "OBS of heads": (group_removal_costs, (jnp.zeros((size, size)), by_group)),
        "cut": (slicing._jit_take, (down, some, 1)),
        "cut with zeros": (slicing._jit_take_or_zero, (down, some[None, :, None], 1)),
        "put": (slicing._jit_put, (down, np.arange(1), down[:1], 0)),
        "merge: overlap": (merging.neuron_overlap, (leaves, tuple(axes.values()), 0, 1)),
        "merge": (merging._weighted, (down, 0, np.arange(width), 0.5, 0, 0)),
        "refit: read": (_read, (both, (config, config), shapes, stream, stream[..., 0] > 0)),
        "refit": (_solve, (stacked, moe, text, 1e-3, 2)),
        "quantize": (_rounded, (down, (1, 2), Quantization(group_size=4))),
    }


def _running(params, config: ModelConfig, batch) -> dict[str, Step]:
    tokens, lengths = batch["tokens"], np.full(ROWS, LENGTH, np.int32)
    logits, cache = jax.eval_shape(
        lambda p, t: prefill(p, config, t, lengths, 2 * LENGTH), params, tokens
    )
    states = jnp.zeros((ROWS * LENGTH, config.width))
    return {
        "evaluate: head": (
            held_out._sums_at_head,
            (
                [params] * 2,
                (config, config),
                [jnp.zeros((ROWS, LENGTH, config.width))] * 2,
                None,
                {name: batch[name] for name in ("mask", "targets")},
            ),
        ),
        "evaluate": (held_out.evaluation_step, (params, config, batch, params, config)),
        "evaluate: states": (likelihood._states, (params, config, tokens, lengths)),
        "evaluate: scores": (likelihood._score, (params, config, states, lengths, lengths)),
        "generate: prompt": (_prefill, (params, config, tokens, lengths, 2 * LENGTH)),
        "generate": (_decode_step, (params, config, cache, lengths)),
        "generate: draw": (_draw, (logits, 1.0, 0, 0)),
    }


def _distillation(params, config: ModelConfig, batch) -> Step:
    settings = TrainSettings(steps=4, warmup_steps=1, loss="kd_topk", compute_dtype="bfloat16")
    state, frozen = initial_state(params, config, settings)
    like = state if isinstance(state["step"].sharding, jax.sharding.NamedSharding) else None
    step = make_step(config, settings, config, like)
    return step, (state, frozen, arranged(params, config, settings), batch)
