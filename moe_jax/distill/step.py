"""The jitted training step and the state that it carries."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from moe_jax.config import ModelConfig
from moe_jax.distill.objective import objective
from moe_jax.distill.settings import TrainSettings, is_trained
from moe_jax.losses import next_token_labels
from moe_jax.model import layers_are_uniform, stack_layers, unstack_layers
from moe_jax.processes import spec_tree

# Never decayed: vectors, whatever their shape once layers are stacked.
_VECTORS = ("scale", "bias", "constant")
# Axes of the mesh that a batch is split over.
BATCH_AXES = ("data", "fsdp")


def learning_rate_schedule(settings: TrainSettings) -> optax.Schedule:
    """Linear warm-up to the peak, then cosine decay to ``final_fraction`` of it.

    The first step is the first of the warm-up, not the zero before it; without a warm-up it has
    the peak.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        settings.learning_rate,
        settings.warmup_steps,
        max(settings.steps, settings.warmup_steps + 1),
        settings.learning_rate * settings.final_fraction,
    )
    first = 1 if settings.warmup_steps else 0
    return lambda count: schedule(count + first)


def make_optimizer(settings: TrainSettings) -> optax.GradientTransformation:
    """AdamW with clipping, warm-up and cosine decay."""

    def is_decayed(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: getattr(path[-1], "key", None) not in _VECTORS, params
        )

    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            learning_rate_schedule(settings),
            settings.beta1,
            settings.beta2,
            weight_decay=settings.weight_decay,
            mask=is_decayed,
        ),
    )


def arranged(
    params: dict[str, Any], config: ModelConfig, settings: TrainSettings, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Weights as the step wants them: on the mesh, layers stacked where they are to be scanned."""
    shardings = None if mesh is None else _param_shardings(config, settings, mesh)
    if _scans(config, settings):
        return jax.jit(stack_layers, out_shardings=shardings)(params)
    return params if mesh is None else jax.device_put(params, shardings)


def _scans(config: ModelConfig, settings: TrainSettings) -> bool:
    return settings.scan_layers and layers_are_uniform(config)


def _param_shardings(config: ModelConfig, settings: TrainSettings, mesh: Mesh) -> dict[str, Any]:
    specs = spec_tree(config, mesh)
    if not _scans(config, settings):
        return specs
    stacked = jax.tree.map(
        lambda one: NamedSharding(mesh, PartitionSpec(None, *one.spec)), specs["layers"][0]
    )
    return {**specs, "layers": stacked}


def split_trained(params: dict[str, Any], settings: TrainSettings) -> tuple[Any, Any]:
    """``(trained, frozen)``: the same tree twice, with None in the place of the other's leaves."""
    parts = settings.trained_parts

    def keep(trained):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if is_trained(_names(path), parts) == trained else None, params
        )

    return keep(True), keep(False)


def join_trained(trained: Any, frozen: Any) -> dict[str, Any]:
    """Inverse of ``split_trained``."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda node: node is None
    )


def _names(path) -> tuple[Any, ...]:
    return tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path)


def initial_state(
    params: dict[str, Any], config: ModelConfig, settings: TrainSettings, mesh: Mesh | None = None
) -> tuple[dict[str, Any], Any]:
    """``(state, frozen)``: trained weights in float32 with a fresh optimizer, and the others.

    The state holds ``params``, ``optimizer``, ``step``, ``rng`` (of sampled routing; each step
    folds its number in), ``broken_step`` (the first one whose loss or gradient was not finite; 0 if
    none was) and, if asked for, ``ema``.
    """
    trained, frozen = split_trained(arranged(params, config, settings, mesh), settings)
    # Copies: the step donates its state, and the caller keeps the weights it gave.
    trained = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), trained)
    init = make_optimizer(settings).init
    shardings = None
    if mesh is not None:  # else every device would hold all moments, if only for a moment
        abstract = {"optimizer": jax.eval_shape(init, trained)}
        shardings = state_shardings(abstract, config, settings, mesh)["optimizer"]
    state = {
        "params": trained,
        "optimizer": jax.jit(init, out_shardings=shardings)(trained),
        "step": jnp.zeros((), jnp.int32),
        "rng": jax.random.key_data(jax.random.key(settings.seed)),
        "broken_step": jnp.zeros((), jnp.int32),
    }
    if settings.ema_decay:
        state["ema"] = jax.tree.map(jnp.copy, trained)
    if mesh is None:
        return state, frozen
    return jax.device_put(state, state_shardings(state, config, settings, mesh)), frozen


def state_shardings(
    state: dict[str, Any], config: ModelConfig, settings: TrainSettings, mesh: Mesh
) -> dict[str, Any]:
    """Every moment and average lies as its weight does; counters are replicated.

    Args:
        state: arrays or shapes; of it ``optimizer`` is looked at, and whether there is an ``ema``.
    """
    specs, _ = split_trained(_param_shardings(config, settings, mesh), settings)
    everywhere = NamedSharding(mesh, PartitionSpec())
    shardings = dict.fromkeys(("step", "rng", "broken_step"), everywhere)
    shardings["params"] = specs
    shardings["optimizer"] = optax.tree.map_params(
        make_optimizer(settings),
        lambda _, sharding: sharding,
        state["optimizer"],
        specs,
        transform_non_params=lambda _: everywhere,
    )
    return shardings | ({"ema": specs} if "ema" in state else {})


def result_of(state: dict[str, Any], frozen: Any) -> dict[str, Any]:
    """The weights that training gives: averaged if asked for, layers as a list."""
    params = join_trained(state.get("ema", state["params"]), frozen)
    return unstack_layers(params) if isinstance(params["layers"], dict) else params


def make_step(
    config: ModelConfig,
    settings: TrainSettings,
    teacher_config: ModelConfig | None = None,
    shardings: dict[str, Any] | None = None,
) -> Callable[..., tuple[dict[str, Any], dict[str, Array]]]:
    """The jitted ``(state, frozen, teacher, batch) -> (state, metrics)``; ``state`` is donated.

    A step whose loss or gradient is not finite leaves the weights as they are.
    """
    optimizer = make_optimizer(settings)
    schedule = learning_rate_schedule(settings)

    def gradient_of(trained, frozen, teacher, batch, rng, positions):
        def loss(trained):
            params = join_trained(trained, frozen)
            return objective(
                params, config, batch, rng, settings, positions, teacher, teacher_config
            )

        (value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        return gradient, parts | {"loss": value}

    def accumulated(trained, frozen, teacher, batch, rng, positions):
        count = settings.accumulation
        # Strided, so that rows stay where they are on a mesh.
        pieces = jax.tree.map(
            lambda leaf: jnp.moveaxis(
                leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:]), 1, 0
            ),
            batch,
        )

        def add(total, item):
            piece, i = item
            new = gradient_of(
                trained, frozen, teacher, piece, jax.random.fold_in(rng, i), positions
            )
            return jax.tree.map(jnp.add, total, new), None

        shapes = jax.eval_shape(
            gradient_of, trained, frozen, teacher, jax.tree.map(lambda p: p[0], pieces), rng,
            positions,
        )  # fmt: skip
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add, zeros, (pieces, jnp.arange(count)))[0]

    def step(state, frozen, teacher, batch):
        rng = jax.random.fold_in(jax.random.wrap_key_data(state["rng"]), state["step"])
        _, mask = next_token_labels(batch["tokens"], batch["segment_ids"])
        positions = jnp.maximum(mask.sum(), 1).astype(jnp.float32)
        run = gradient_of if settings.accumulation == 1 else accumulated
        gradient, metrics = run(state["params"], frozen, teacher, batch, rng, positions)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"], state["params"])
        number = state["step"] + 1
        new = {"params": optax.apply_updates(state["params"], updates)}
        if settings.ema_decay:
            new["ema"] = optax.incremental_update(
                new["params"], state["ema"], 1 - settings.ema_decay
            )
        new["optimizer"] = optimizer_state
        new = jax.tree.map(
            lambda fresh, old: jnp.where(finite, fresh, old), new, {k: state[k] for k in new}
        )
        was_fine = state["broken_step"] == 0
        new["broken_step"] = jnp.where(was_fine & ~finite, number, state["broken_step"])
        new |= {"step": number, "rng": state["rng"]}
        metrics |= {
            "gradient_norm": norm,
            "learning_rate": schedule(state["step"]),
            "broken_step": new["broken_step"],
        }
        return new, metrics

    outputs = {} if shardings is None else {"out_shardings": (shardings, None)}
    return functools.partial(jax.jit, donate_argnums=0, **outputs)(step)
