"""Jitted accumulators over batches, and the pass that feeds them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moe_jax.calibrate.gradients import ByLayer, mask_gradients
from moe_jax.config import ModelConfig
from moe_jax.metrics import progress_bar
from moe_jax.model import forward
from moe_jax.ops.grouped_moments import grouped_moments, merge_moments
from moe_jax.scoring import IMPORTANCE_LOSSES
from moe_jax.statistics import Stats

_TAPS = (
    "expert_ids", "weights", "row_weight", "group_sizes", "hidden", "output",
)  # fmt: skip


def calibrate(
    params: dict[str, Any],
    config: ModelConfig,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    importance: Sequence[str] = (),
    teacher: tuple[dict[str, Any], ModelConfig] | None = None,
    top_k: int = 8,
    seed: int = 0,
    backend: str = "auto",
    facts: dict[str, Any] | None = None,
    description: str = "calibrate",
    warn: bool = True,
) -> Stats:
    """Statistics of every layer over ``batches``, padding left out.

    Args:
        params, config: the model to measure.
        batches: ``{"tokens": Int[B, S], "mask": Bool[B, S]}``, all of one shape.
        importance: losses whose gradients score neurons and key/value groups, among ``kd_topk``
            (the teacher's ``top_k`` probabilities against the full softmax), ``kd_full`` (with
            routing in train mode: in eval mode its gradient vanishes while the model is its own
            teacher) and ``lm``. Each costs a forward and backward pass beside the shared one.
        teacher: of the distillation losses; None: the model itself.
        seed: of sampled routing.
        backend: of ``ops.grouped_matmul``.
        facts: kept with the result.
        description: stands before the progress bar.
        warn: log the names of the experts that no token reached.

    Returns:
        Mergeable sums.

    Raises:
        ValueError: no batch, all padding, an unknown loss, token ids outside the vocabulary,
            teacher and model with different vocabularies, or NaN in the result (named).
    """
    teacher_params, teacher_config = teacher or (params, config)
    _check_importance(importance, config, teacher_config, teacher_params is params)
    state = None
    tokens = sequences = count = 0
    length = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    with progress_bar(None, description, "tok") as bar:
        for count, batch in enumerate(batches, 1):
            check_tokens(batch["tokens"], config.vocab_size)
            measured = _forward_statistics(params, config, batch, backend)
            attention: ByLayer = {i: {} for i in range(config.num_layers)}
            for loss in importance:
                rng = jax.random.fold_in(jax.random.key(seed), count)
                gradients = mask_gradients(
                    params, config, teacher_params, teacher_config, batch, rng, loss, top_k, backend
                )
                for target, by_layer in zip((measured, attention), gradients, strict=True):
                    for i, arrays in by_layer.items():
                        target[i] |= {f"{loss}.{name}": array for name, array in arrays.items()}
            new = (measured, attention)
            state = new if state is None else _merge_states(state, new)
            new_tokens = int(np.count_nonzero(batch["mask"]))
            tokens += new_tokens
            sequences += int(np.count_nonzero(batch["mask"].any(1)))
            bar.update(new_tokens)
            bar.set_postfix(batch=f"{count}/{length}" if length else str(count))
    if state is None:
        raise ValueError("calibration needs at least one batch, got none")
    if not tokens:
        raise ValueError("calibration text holds no tokens: every position is padding")
    stats = Stats(
        {i: _by_expert(config, params, i, arrays) for i, arrays in state[0].items()},
        tokens,
        sequences,
        count,
        dict(facts or {}),
        {i: _by_group(config, params, i, arrays) for i, arrays in state[1].items()},
    )
    stats.check_finite()
    if warn:
        warn_unreached(stats)
    return stats


def _check_importance(
    importance: Sequence[str], config: ModelConfig, teacher: ModelConfig, own_teacher: bool
) -> None:
    unknown = set(importance) - set(IMPORTANCE_LOSSES)
    if unknown:
        raise ValueError(f"importance must be among {IMPORTANCE_LOSSES}, got {sorted(unknown)}")
    if "kd_full" in importance and own_teacher and config.router.kind == "softmax":
        raise ValueError(
            "importance 'kd_full' is zero everywhere: the model is its own teacher and its router "
            "has no train-mode noise; use 'kd_topk', 'lm' (or the criterion 'fisher')"
        )
    if teacher.vocab_size != config.vocab_size:
        raise ValueError(
            f"teacher and model must share a vocabulary, got {teacher.vocab_size} "
            f"and {config.vocab_size} entries"
        )


def check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    """Raises ValueError if an id is outside ``[0, vocab_size)``."""
    low, high = int(np.min(tokens)), int(np.max(tokens))
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token ids must be in [0, vocab_size = {vocab_size}), got {low if low < 0 else high}"
        )


def warn_unreached(stats: Stats) -> None:
    """Logs the names of the experts that no token was routed to."""
    names = stats.unreached()
    if names:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        logging.warning("no calibration token reached %s; their scores are 0", shown)


@functools.partial(jax.jit, static_argnames=("config", "backend"))
def _forward_statistics(params, config: ModelConfig, batch, backend) -> dict[int, dict[str, Array]]:
    segment_ids = batch["mask"].astype(jnp.int32)
    _, aux = forward(params, config, batch["tokens"], segment_ids, _TAPS, backend=backend)
    valid = segment_ids.reshape(-1) > 0
    return {
        i: _layer_statistics(aux["layers"][i], config.moe(i).num_experts, valid)
        for i in config.moe_layers
    }


def _layer_statistics(aux: dict[str, Array], num_experts: int, valid) -> dict[str, Array]:
    """Sums over one batch; arrays about outputs and neurons run over stored experts."""
    chosen = jax.nn.one_hot(aux["expert_ids"], num_experts, dtype=jnp.float32)
    chosen = jnp.where(valid[:, None, None], chosen, 0)
    token_expert = chosen.sum(1)
    output, sizes = aux["output"].astype(jnp.float32), aux["group_sizes"]
    norm = jnp.sqrt(jnp.square(output).sum(-1))
    output_mean, output_m2 = grouped_moments(output, sizes)
    neuron_mean, neuron_m2 = grouped_moments(aux["hidden"], sizes)
    exact = jax.lax.Precision.HIGHEST
    # Rows lie sorted by expert, so a group's sum is a product with its (contiguous) membership.
    starts = jnp.cumsum(sizes) - sizes
    row = jnp.arange(output.shape[0])
    member = (row >= starts[:, None]) & (row < (starts + sizes)[:, None])
    norms = jnp.dot(
        member.astype(jnp.float32), jnp.stack([norm, aux["row_weight"] * norm], -1), precision=exact
    )
    return {
        "count": token_expert.sum(0).astype(jnp.int32),
        "routing_mass": jnp.einsum("tk,tke->e", aux["weights"], chosen, precision=exact),
        "coactivation": jnp.dot(token_expert.T, token_expert, precision=exact).astype(jnp.int32),
        "stored_count": sizes,
        "output_mean": output_mean,
        "output_m2": output_m2,
        "output_norm": norms[:, 0],
        "gated_norm": norms[:, 1],
        "neuron_mean": neuron_mean,
        "neuron_m2": neuron_m2,
    }


@functools.partial(jax.jit, donate_argnums=0)
def _merge_states(a: tuple[ByLayer, ByLayer], b: tuple[ByLayer, ByLayer]):
    """Adds sums and joins moments, layer by layer, of experts and of attention."""

    def merge(old, new):
        merged = {
            name: old[name] + new[name]
            for name in old
            if not name.endswith("_m2") and name not in ("output_mean", "neuron_mean")
        }
        counts = (old["stored_count"].astype(jnp.float32), new["stored_count"].astype(jnp.float32))
        for kind in ("output", "neuron"):
            mean, m2 = f"{kind}_mean", f"{kind}_m2"
            merged[mean], merged[m2] = merge_moments(
                counts[0], old[mean], old[m2], counts[1], new[mean], new[m2]
            )
        return merged

    experts = {i: merge(a[0][i], b[0][i]) for i in a[0]}
    return experts, jax.tree.map(jnp.add, a[1], b[1])


def _by_expert(config: ModelConfig, params, layer: int, arrays) -> dict[str, np.ndarray]:
    """To the host, with arrays over stored experts spread over all E router rows."""
    moe = config.moe(layer)
    ids = list(moe.expert_ids)
    weight_norm = _neuron_weight_norm(params["layers"][layer]["moe"]["experts"])
    result: dict[str, np.ndarray] = {}
    for name, array in {**arrays, "weight_norm": weight_norm}.items():
        values = np.asarray(array)
        if name == "stored_count":
            continue
        if values.dtype.kind == "i":
            values = values.astype(np.int64)
        if values.shape[0] == len(ids) < moe.num_experts:
            spread = np.zeros((moe.num_experts, *values.shape[1:]), values.dtype)
            spread[ids] = values
            values = spread
        result[name] = values
    return result


@jax.jit
def _neuron_weight_norm(experts):
    """Norm over a neuron's gate and up columns and down row, [E_kept, F]."""
    squares = sum(
        jnp.square(experts[name].astype(jnp.float32)).sum(axis)
        for name, axis in (("gate", 1), ("up", 1), ("down", 2))
    )
    return jnp.sqrt(squares)


def _by_group(config: ModelConfig, params, layer: int, arrays) -> dict[str, np.ndarray]:
    """To the host, with what the weights alone tell."""
    groups = config.layers[layer].num_kv_heads
    weight_norm = _group_weight_norm(params["layers"][layer]["attention"], groups)
    return {
        name: np.asarray(array) for name, array in {**arrays, "weight_norm": weight_norm}.items()
    }


@functools.partial(jax.jit, static_argnums=1)
def _group_weight_norm(attention, num_groups: int):
    """Norm over the projections of each group's heads, [G]; a group's heads are consecutive."""
    by_head = [
        jnp.moveaxis(leaf, -2, 0)  # [D, heads, H] or, of a bias, [heads, H]
        for name in ("query", "key", "value")
        for leaf in attention[name].values()
    ]
    squares = sum(
        jnp.square(leaf.astype(jnp.float32)).reshape(num_groups, -1).sum(1)
        for leaf in (*by_head, attention["out"]["kernel"])
    )
    return jnp.sqrt(squares)
