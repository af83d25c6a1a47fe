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
from moe_jax.distill.settings import TrainSettings
from moe_jax.losses import next_token_labels
from moe_jax.params import (
    abstract_params,
    layers_are_uniform,
    leaves_like,
    stack_layers,
    stack_leaves,
    unstack_layers,
)
from moe_jax.processes import leaf_shardings, mesh_of


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


def make_optimizer(settings: TrainSettings, leaves: Any) -> optax.GradientTransformation:
    """AdamW with clipping, warm-up and cosine decay."""
    trained, _ = split_trained(leaves, leaves, settings)
    rates = jax.tree.map(lambda leaf: settings.rates.get(leaf.part, 1.0), trained)
    by_part = optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, rates))
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            learning_rate_schedule(settings),
            settings.beta1,
            settings.beta2,
            weight_decay=settings.weight_decay,
            mask=jax.tree.map(lambda leaf: leaf.decay, trained),
        ),
        *([by_part] if settings.rates else []),
    )


def scans(config: ModelConfig, settings: TrainSettings) -> bool:
    """Whether a training stacks the layers of a model."""
    return settings.scan_layers and layers_are_uniform(config)


def arranged(
    params: dict[str, Any], config: ModelConfig, settings: TrainSettings
) -> dict[str, Any]:
    """Weights as the step wants them: layers stacked where they are to be scanned."""
    mesh, leaves = mesh_of(params), abstract_params(config)
    stacks = scans(config, settings)
    if stacks:
        leaves = stack_leaves(leaves)
    shardings = None if mesh is None else leaf_shardings(leaves, mesh)
    if stacks:
        return jax.jit(stack_layers, out_shardings=shardings)(params)
    # What pruning made anew, such as constants, does not lie on the mesh yet.
    return params if mesh is None else jax.device_put(params, shardings)


def split_trained(tree: Any, leaves: Any, settings: TrainSettings) -> tuple[Any, Any]:
    """``(trained, frozen)``: the same tree twice, with None in the place of the other's leaves."""

    def keep(trained: bool) -> Any:
        return jax.tree.map(
            lambda leaf, value: value if (leaf.part in settings.trained_parts) == trained else None,
            leaves,
            tree,
        )

    return keep(True), keep(False)


def join_trained(trained: Any, frozen: Any) -> dict[str, Any]:
    """Inverse of ``split_trained``."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda node: node is None
    )


def initial_state(
    params: dict[str, Any], config: ModelConfig, settings: TrainSettings
) -> tuple[dict[str, Any], Any]:
    """``(state, frozen)``: trained weights in float32 with a fresh optimizer, and the others.

    The state holds ``params``, ``optimizer``, ``step``, ``rng`` (of sampled routing; each step
    folds its number in), ``broken_step`` (the first one whose loss or gradient was not finite; 0 if
    none was) and, if asked for, ``ema``. It lies where ``params`` do: moments and averages as their
    weights, counters everywhere.
    """
    params, mesh = arranged(params, config, settings), mesh_of(params)
    leaves = leaves_like(params, config)
    trained, frozen = split_trained(params, leaves, settings)
    # Copies: the step donates its state, and the caller keeps the weights it gave.
    trained = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), trained)
    shardings = None
    if mesh is not None:
        # Said before they are made, or every device would hold all moments for a moment.
        like = abstract_state(config, settings, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        trained = jax.device_put(trained, shardings["params"])
    init = make_optimizer(settings, leaves).init
    state = {
        "params": trained,
        "optimizer": jax.jit(init, out_shardings=shardings and shardings["optimizer"])(trained),
        "step": jnp.zeros((), jnp.int32),
        "rng": jax.random.key_data(jax.random.key(settings.seed)),
        "broken_step": jnp.zeros((), jnp.int32),
    }
    if settings.ema_decay:
        state["ema"] = jax.tree.map(jnp.copy, trained)
    return state if shardings is None else jax.device_put(state, shardings), frozen


def abstract_state(config: ModelConfig, settings: TrainSettings, mesh: Mesh | None) -> Any:
    """Shapes, dtypes and places of the state that ``initial_state`` makes, from sizes alone."""
    leaves = abstract_params(config)
    if scans(config, settings):
        leaves = stack_leaves(leaves)
    trained, _ = split_trained(leaves, leaves, settings)
    everywhere = specs = None
    if mesh is not None:
        everywhere = NamedSharding(mesh, PartitionSpec())
        specs, _ = split_trained(leaf_shardings(leaves, mesh), leaves, settings)

    def made(leaf: Any, place: Any = everywhere, dtype: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=place)

    floats = functools.partial(made, dtype=jnp.float32)
    params = jax.tree.map(floats, trained, *([] if specs is None else [specs]))
    optimizer = jax.eval_shape(make_optimizer(settings, leaves).init, params)
    places = [] if specs is None else [_moment_shardings(optimizer, specs, everywhere)]
    number = made(jnp.zeros((), jnp.int32))
    state = {
        "params": params,
        "optimizer": jax.tree.map(made, optimizer, *places),
        "step": number,
        "rng": made(jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))),
        "broken_step": number,
    }
    return state | ({"ema": params} if settings.ema_decay else {})


def _moment_shardings(optimizer_state: Any, specs: Any, everywhere: Any) -> Any:
    """Whatever is shaped as the trained weights lies as they do; the rest is replicated."""
    structure: Any = jax.tree.structure(specs)

    def is_like_weights(node: Any) -> bool:
        return bool(jax.tree.structure(node) == structure)

    return jax.tree.map(
        lambda node: specs if is_like_weights(node) else everywhere,
        optimizer_state,
        is_leaf=is_like_weights,
    )


def result_of(state: dict[str, Any], frozen: Any) -> dict[str, Any]:
    """The weights that training gives: averaged if asked for, layers as a list."""
    params = join_trained(state.get("ema", state["params"]), frozen)
    return unstack_layers(params) if isinstance(params["layers"], dict) else params


def make_step(
    config: ModelConfig,
    settings: TrainSettings,
    teacher_config: ModelConfig | None = None,
    like: dict[str, Any] | None = None,
) -> Callable[..., tuple[dict[str, Any], dict[str, Array]]]:
    """The jitted ``(state, frozen, teacher, batch) -> (state, metrics)``; ``state`` is donated.

    A step whose loss or gradient is not finite leaves the weights as they are.

    Args:
        like: a state on a mesh; those that come out lie as it does.
    """
    schedule = learning_rate_schedule(settings)

    def gradient_of(trained, frozen, teacher, batch, rng, positions):
        def loss(trained):
            params = join_trained(trained, frozen)
            live = None if teacher_config is None else (teacher, teacher_config)
            return objective(params, config, batch, rng, settings, positions, live)

        (value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        return gradient, parts | {"loss": value}

    summed_gradient = _accumulated(gradient_of, settings.accumulation)

    def step(state, frozen, teacher, batch):
        rng = jax.random.fold_in(jax.random.wrap_key_data(state["rng"]), state["step"])
        _, mask = next_token_labels(batch["tokens"], batch["segment_ids"])
        positions = jnp.maximum(mask.sum(), 1).astype(jnp.float32)
        gradient, metrics = summed_gradient(state["params"], frozen, teacher, batch, rng, positions)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        optimizer = make_optimizer(settings, leaves_like(state["params"], config))
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

    shardings = None if like is None else jax.tree.map(lambda leaf: leaf.sharding, like)
    outputs = {} if shardings is None else {"out_shardings": (shardings, None)}
    return functools.partial(jax.jit, donate_argnums=0, **outputs)(step)


def _accumulated(gradient_of: Callable[..., Any], count: int) -> Callable[..., Any]:
    """``gradient_of``, summed over ``count`` pieces of the batch, one after the other."""
    if count == 1:
        return gradient_of

    def accumulated(trained, frozen, teacher, batch, rng, positions):
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

    return accumulated
