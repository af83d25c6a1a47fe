"""The training loop.

Without a teacher it minimises the cross-entropy of the next token: training from scratch, and the
recovery training of the MoNE paper.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.checkpoint import TrainingCheckpoints
from moe_jax.config import ModelConfig
from moe_jax.losses import balance_loss, cross_entropy, next_token_labels
from moe_jax.metrics import MetricsWriter, progress_bar
from moe_jax.model import forward


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        steps: optimizer steps in all.
        learning_rate: peak of a linear warm-up and cosine decay to ``final_fraction`` of it.
        weight_decay: of matrices; vectors (norms, biases, novices) are not decayed.
        clip_norm: largest global gradient norm.
        balance_weight: weight of the routers' load-balancing loss, per MoE layer.
        sample_routing: run routers in train mode (SparseMixer sampling, input jitter).
        compute_dtype: of activations and matrix products; weights stay float32, and routers,
            norms and softmaxes compute in float32.
        checkpoint_every, log_every: in steps.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    balance_weight: float = 0.0
    sample_routing: bool = True
    compute_dtype: str = "float32"
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"warmup_steps must be in [0, steps = {self.steps}], got {self.warmup_steps}"
            )


def make_optimizer(settings: TrainSettings) -> optax.GradientTransformation:
    """AdamW with clipping, warm-up and cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        settings.learning_rate,
        max(1, settings.warmup_steps),
        max(settings.steps, settings.warmup_steps + 1),
        settings.learning_rate * settings.final_fraction,
    )
    decayed = functools.partial(jax.tree.map, lambda leaf: leaf.ndim >= 2)
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            schedule,
            settings.beta1,
            settings.beta2,
            weight_decay=settings.weight_decay,
            mask=decayed,
        ),
    )


def cast_for_compute(params: dict[str, Any], dtype) -> dict[str, Any]:
    """Matrices in ``dtype``; routers and vectors as they are."""

    def cast(path, leaf):
        is_router = any(getattr(key, "key", None) == "router" for key in path)
        return leaf if is_router or leaf.ndim < 2 else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def language_model_loss(
    params: dict[str, Any],
    config: ModelConfig,
    batch: dict[str, jax.Array],
    rng,
    settings: TrainSettings,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean next-token cross-entropy of a batch plus the weighted balance losses.

    Args:
        batch: ``tokens`` and ``segment_ids``, Int[B, S]; segment 0 is padding.
        rng: for sampled routing; unused when ``settings.sample_routing`` is off.

    Returns:
        The loss, and metrics ``lm`` (nats per token) and ``balance`` (mean over layers).
    """
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    logits, aux = forward(
        cast_for_compute(params, settings.compute_dtype),
        config,
        tokens,
        segment_ids,
        ("router_logits", "expert_ids"),
        rng=rng if settings.sample_routing else None,
    )
    labels, mask = next_token_labels(tokens, segment_ids)
    total, count = cross_entropy(logits, labels, mask)
    lm = total / jnp.maximum(count, 1)
    valid = segment_ids.reshape(-1) > 0
    balance = [
        balance_loss(layer["router_logits"], layer["expert_ids"], valid)
        for layer in aux["layers"]
        if layer
    ]
    mean_balance = sum(balance) / max(1, len(balance))
    loss = lm + settings.balance_weight * sum(balance)
    return loss, {"lm": lm, "balance": jnp.asarray(mean_balance)}


def make_step(config: ModelConfig, settings: TrainSettings) -> Callable:
    """The jitted ``(state, batch) -> (state, metrics)``; ``state`` is donated."""
    optimizer = make_optimizer(settings)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        rng = jax.random.fold_in(jax.random.key(settings.seed), state["step"])
        gradient_of = jax.value_and_grad(language_model_loss, has_aux=True)
        (loss, metrics), gradient = gradient_of(state["params"], config, batch, rng, settings)
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"], state["params"])
        new_state = {
            "params": optax.apply_updates(state["params"], updates),
            "optimizer": optimizer_state,
            "step": state["step"] + 1,
        }
        metrics |= {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}
        return new_state, metrics

    return step


def initial_state(params: dict[str, Any], settings: TrainSettings) -> dict[str, Any]:
    """Weights in float32, a fresh optimizer, step 0."""
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)
    return {
        "params": params,
        "optimizer": make_optimizer(settings).init(params),
        "step": jnp.zeros((), jnp.int32),
    }


def train(
    params: dict[str, Any],
    config: ModelConfig,
    dataset: grain.IterDataset,
    settings: TrainSettings,
    folder: str | Path,
) -> dict[str, Any]:
    """Trains for ``settings.steps`` steps, going on from the last checkpoint in ``folder``.

    Args:
        params: start of a fresh run; a resumed one takes its checkpoint's.
        config: the model's.
        dataset: see ``data.training_dataset``; its position is part of the checkpoint.
        settings: how.
        folder: receives ``checkpoints/`` and ``metrics.jsonl``.

    Returns:
        The trained weights, float32.

    Raises:
        FloatingPointError: the loss is not finite; the last checkpoint stays.
        ValueError: the checkpoint in ``folder`` belongs to another model.
    """
    iterator = iter(dataset)
    state = initial_state(params, settings)
    with TrainingCheckpoints(Path(folder) / "checkpoints") as checkpoints:
        restored = checkpoints.restore(state)
        if restored is not None:
            state, position = restored
            iterator.set_state(position)
        start = int(state["step"])
        step_function = make_step(config, settings)
        writer = MetricsWriter(folder)
        pending: tuple[int, dict[str, jax.Array]] | None = None
        tokens_seen, since = 0, time.perf_counter()
        with progress_bar(settings.steps, "train", "step", start) as bar:
            for step in range(start + 1, settings.steps + 1):
                batch = next(iterator)
                tokens_seen += int(np.count_nonzero(batch["segment_ids"]))
                state, metrics = step_function(state, batch)
                bar.update()
                if pending is not None:
                    # The step before this one: its numbers are there without waiting.
                    values = _finite(pending[0], pending[1])
                    bar.set_postfix(loss=f"{values['loss']:.3f}")
                    elapsed = time.perf_counter() - since
                    writer.write(pending[0], tokens_per_second=tokens_seen / elapsed, **values)
                    pending, tokens_seen, since = None, 0, time.perf_counter()
                if step % settings.log_every == 0 or step == settings.steps:
                    pending = (step, metrics)
                if step % settings.checkpoint_every == 0 or step == settings.steps:
                    _finite(step, metrics)
                    checkpoints.save(step, state, iterator.get_state())
        if pending is not None:
            writer.write(pending[0], **_finite(*pending))
        writer.close()
    return state["params"]


def _finite(step: int, metrics: dict[str, jax.Array]) -> dict[str, float]:
    values = {name: float(value) for name, value in metrics.items()}
    if not np.isfinite(values["loss"]):
        raise FloatingPointError(
            f"the loss of step {step} is {values['loss']}; the checkpoint before it is kept. "
            "A lower learning rate or a longer warm-up usually helps"
        )
    return values
