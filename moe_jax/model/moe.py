"""The Mixture-of-Experts layer: routers, experts, novices.

Tokens are sorted by expert, so that each expert's tokens are consecutive rows; padding and tokens
on novices go behind the last expert, where no matrix product sees them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import MoeConfig, RouterConfig
from moe_jax.ops.expert_mlp import TAPS as EXPERT_TAPS
from moe_jax.ops.expert_mlp import ExpertRows, Experts, expert_mlp
from moe_jax.ops.grouped_matmul import row_groups

# Share of non-argmax samples whose weight enters at full scale, and the scale of the others:
# Heun's third-order estimator as in the Phi-MoE modelling code (0.3333 rather than 1/3).
_HEUN_FULL_PROBABILITY = 0.25
_HEUN_SMALL = 0.3333


def route(
    logits: Float[Array, "T E"], experts_per_token: int, router: RouterConfig, rng=None
) -> tuple[Int[Array, "T K"], Float[Array, "T K"]]:
    """Expert ids and weights of every token, exactly as the model's family uses them.

    Args:
        logits: router logits, float32.
        experts_per_token: K.
        router: kind and constants.
        rng: train mode when given (SparseMixer then samples); eval mode when None.
    """
    if router.kind == "softmax":
        return _route_softmax(logits, experts_per_token, router.renormalize)
    return _route_sparsemixer(logits, experts_per_token, router.jitter, rng)


def _route_softmax(logits, k, renormalize):
    # XLA spells top-k as a sort and a slice, and recognises it only while no slice of the result
    # has been merged with that one; without the barrier a CPU sorts all E (ten times slower).
    # One barrier each: a barrier over the pair aborts XLA's CPU compiler on sharded weights.
    top = jax.lax.top_k(jax.nn.softmax(logits, -1), k)
    weights, ids = (jax.lax.optimization_barrier(part) for part in top)
    if renormalize:
        weights = weights / weights.sum(-1, keepdims=True)
    return ids, weights


def _route_sparsemixer(logits, k, jitter, rng):
    """K sequential draws: each among the experts close to the best one not drawn yet."""
    slots = []
    candidates = logits
    for slot in range(k):
        top = candidates.max(-1, keepdims=True)
        fixed = jax.lax.stop_gradient(logits)
        far = (top - fixed) / jnp.maximum(jnp.abs(fixed), top) > 2 * jitter
        gates = jnp.where(jax.lax.stop_gradient(far), -jnp.inf, candidates)
        probabilities = jax.nn.softmax(gates, -1)
        if rng is None:
            ids = candidates.argmax(-1)
            weight = jnp.take_along_axis(probabilities, ids[:, None], -1)[:, 0]
        else:
            sample_key, heun_key = jax.random.split(jax.random.fold_in(rng, slot))
            ids = (gates + jax.random.gumbel(sample_key, gates.shape)).argmax(-1)
            full = (ids == probabilities.argmax(-1)) | jax.random.bernoulli(
                heun_key, _HEUN_FULL_PROBABILITY, ids.shape
            )
            weight = _heun_weight(logits, probabilities, ids, jnp.where(full, 1.0, _HEUN_SMALL))
        slots.append((ids, weight))
        candidates = jnp.where(jnp.arange(logits.shape[-1]) == ids[:, None], -jnp.inf, candidates)
    ids, weights = zip(*slots, strict=True)
    return jnp.stack(ids, -1), jnp.stack(weights, -1)


@jax.custom_vjp
def _heun_weight(logits, probabilities, ids, scale):
    """``scale * p[id]``, with the gradient of the sampled gate (arXiv 2310.00811, eq. 7 on).

    The derivative ignores ``scale`` and runs straight to the logits:
    ``dp = g * p[id] * (onehot(id) - p)``.
    """
    del logits
    return scale * jnp.take_along_axis(probabilities, ids[:, None], -1)[:, 0]


def _heun_weight_fwd(logits, probabilities, ids, scale):
    return _heun_weight(logits, probabilities, ids, scale), (probabilities, ids)


def _heun_weight_bwd(saved, gradient):
    probabilities, ids = saved
    chosen = jax.nn.one_hot(ids, probabilities.shape[-1], dtype=probabilities.dtype)
    scaled = gradient * (probabilities * chosen).sum(-1)
    return scaled[:, None] * (chosen - probabilities), None, None, None


_heun_weight.defvjp(_heun_weight_fwd, _heun_weight_bwd)


def moe_layer(
    params: dict[str, Any],
    moe: MoeConfig,
    router: RouterConfig,
    x: Float[Array, "T D"],
    valid: Bool[Array, " T"] | None = None,
    *,
    neuron_mask: Float[Array, "E_kept F"] | None = None,
    rng=None,
    keep: tuple[str, ...] = EXPERT_TAPS,
    backend: str = "auto",
) -> tuple[Float[Array, "T D"], dict[str, Array]]:
    """Routes each token to K experts and adds their weighted outputs.

    Args:
        params: ``router.kernel [D, E]``; ``experts.{gate,up} [E_kept, D, F]``,
            ``experts.down [E_kept, F, D]``, or a list of these, one of each of ``moe.buckets``,
            where experts differ in width; ``expert_bias [E_kept, D]`` and
            ``novices.constant [E_novice, D]`` if there are any.
        moe: E, K, F and which experts are novices.
        router: how logits become weights.
        x: tokens.
        valid: False for padding, which reaches no expert and comes back zero.
        neuron_mask: multiplied into each expert's hidden activations. Ones leave the layer as it
            is and make its gradient the grouped Taylor importance; zeros are a dry run of
            slimming.
        rng: train mode when given.
        keep: which of ``hidden`` and ``output`` to return; each costs memory traffic.
        backend: see ``ops.grouped_matmul``.

    Returns:
        The output, and what calibration needs: ``router_logits [T, E]``, ``expert_ids [T, K]``,
        ``weights [T, K]``, and, for the T*K rows sorted by expert, ``row_token``, ``row_weight``,
        ``hidden [T*K, F]`` (zeros past an expert's own width), ``output [T*K, D]`` (before
        weighting) and ``group_sizes [E_kept]``; ``row [T, K]`` is where each of a token's slots
        lies among them.
    """
    if rng is not None and router.input_jitter > 0:
        jitter_key, rng = jax.random.split(rng)
        low, high = 1 - router.input_jitter, 1 + router.input_jitter
        x = x * jax.random.uniform(jitter_key, x.shape, x.dtype, low, high)
    with jax.named_scope("router"):
        kernel = params["router"]["kernel"].astype(jnp.float32)
        logits = jnp.dot(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
        ids, weights = route(logits, moe.experts_per_token, router, rng)
    used = weights if valid is None else jnp.where(valid[:, None], weights, 0)
    with jax.named_scope("experts"):
        rows = sort_rows(moe, ids, valid)
        buckets = params["experts"] if moe.expert_widths else [params["experts"]]
        experts = tuple(
            Experts(**{name: w.astype(x.dtype) for name, w in bucket.items()}) for bucket in buckets
        )
        y, taps = expert_mlp(x, used, experts, rows, neuron_mask, keep=keep, backend=backend)
    if moe.expert_bias:
        with jax.named_scope("expert_bias"):
            bias = params["expert_bias"].astype(jnp.float32)
            y = y + _constants(bias, moe.expert_ids, ids, used).astype(x.dtype)
            if "output" in taps:
                taps["output"] = taps["output"] + _bias_of_rows(bias, rows).astype(x.dtype)
    if moe.novice_ids:
        with jax.named_scope("novices"):
            constant = params["novices"]["constant"].astype(jnp.float32)
            y = y + _constants(constant, moe.novice_ids, ids, used).astype(x.dtype)
    aux = {
        "router_logits": logits,
        "expert_ids": ids,
        "weights": weights,
        "row": rows.position,
        "row_token": rows.token,
        "row_weight": used.reshape(-1)[rows.order],
        "group_sizes": rows.group_sizes,
    }
    return y, aux | taps


def sort_rows(moe: MoeConfig, ids, valid) -> ExpertRows:
    """The T*K (token, expert) pairs ordered by stored expert; novices and padding behind them."""
    tokens, k = ids.shape
    stored = np.full(moe.num_experts, len(moe.expert_ids), np.int32)
    stored[list(moe.expert_ids)] = np.arange(len(moe.expert_ids), dtype=np.int32)
    group = jnp.asarray(stored)[ids]
    if valid is not None:
        group = jnp.where(valid[:, None], group, len(moe.expert_ids))
    group = group.reshape(-1)
    order = jnp.argsort(group, stable=True).astype(jnp.int32)
    position = (
        jnp.zeros_like(order)
        .at[order]
        .set(jnp.arange(tokens * k, dtype=jnp.int32), unique_indices=True)
    )
    sizes = jnp.bincount(group, length=len(moe.expert_ids) + 1)[:-1].astype(jnp.int32)
    return ExpertRows(order, position.reshape(tokens, k), sizes)


def _constants(constants, owners: tuple[int, ...], ids, weights):
    """Sum over each token's slots of routing weight times the constant of the slot's expert."""
    hit = ids[:, :, None] == jnp.asarray(owners)
    by_owner = jnp.where(hit, weights[:, :, None], 0).sum(1)
    return jnp.dot(by_owner, constants)


def _bias_of_rows(bias, rows: ExpertRows):
    """The constant of the expert of each row; zeros for rows of none."""
    return jnp.pad(bias, ((0, 1), (0, 0)))[row_groups(rows.group_sizes, rows.order.shape[0])]
