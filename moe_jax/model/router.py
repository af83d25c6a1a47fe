"""Routers: router logits to expert ids and weights, exactly as each family uses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.kinds import RouterConfig, SigmoidRouter, SoftmaxRouter, SparseMixerRouter

# Share of non-argmax samples whose weight enters at full scale, and the scale of the others:
# Heun's third-order estimator as in the Phi-MoE modelling code (0.3333 rather than 1/3).
_HEUN_FULL_PROBABILITY = 0.25
_HEUN_SMALL = 0.3333


def route(
    logits: Float[Array, "T E"],
    experts_per_token: int,
    router: RouterConfig,
    rng=None,
    correction: Float[Array, " E"] | None = None,
) -> tuple[Int[Array, "T K"], Float[Array, "T K"]]:
    """Expert ids and weights of every token.

    Args:
        correction: what is added to scores where experts are chosen, if the router has it.
        rng: train mode when given (SparseMixer then samples); eval mode when None.

    Raises:
        ValueError: nothing here computes a router of that kind.
    """
    if router.kind not in ROUTES:
        raise ValueError(f"router kind must be one of {sorted(ROUTES)}, got {router.kind!r}")
    return ROUTES[router.kind](logits, experts_per_token, router, rng, correction)


def share_logits(logits: Float[Array, "*T E"], router: RouterConfig) -> Float[Array, "*T E"]:
    """Logits whose softmax are the router's scores divided by their sum: what routers share out."""
    return jax.nn.log_sigmoid(logits) if isinstance(router, SigmoidRouter) else logits


def _softmax(logits, k, router: SoftmaxRouter, rng, correction):
    del rng  # its jitter is applied to the layer's input
    return _top_k(jax.nn.softmax(logits, -1), k, router, correction)


def _sigmoid(logits, k, router: SigmoidRouter, rng, correction):
    del rng
    return _top_k(jax.nn.sigmoid(logits), k, router, correction)


def _top_k(scores, k, router: SoftmaxRouter | SigmoidRouter, correction):
    choice = scores if correction is None else scores + correction.astype(scores.dtype)
    if router.groups > 1:
        choice = _in_best_groups(choice, router)
    # XLA spells top-k as a sort and a slice, and recognises it only while no slice of the result
    # has been merged with that one; without the barrier a CPU sorts all E (ten times slower).
    # One barrier each: a barrier over the pair aborts XLA's CPU compiler on sharded weights.
    top = jax.lax.top_k(choice, k)
    weights, ids = (jax.lax.optimization_barrier(part) for part in top)
    if choice is not scores:
        weights = jnp.take_along_axis(scores, ids, -1)
    if router.renormalize:
        total = weights.sum(-1, keepdims=True)
        weights = weights / (jnp.maximum(total, router.least_sum) if router.least_sum else total)
    return ids, weights if router.scale == 1 else weights * router.scale


def _in_best_groups(choice, router: SoftmaxRouter | SigmoidRouter):
    """Scores, minus infinity for experts outside a token's best groups."""
    grouped = choice.reshape(-1, router.groups, choice.shape[-1] // router.groups)
    of_group = jax.lax.top_k(grouped, router.deciding)[0].sum(-1)
    best = jax.lax.top_k(of_group, router.chosen_groups)[1]
    chosen = (best[:, :, None] == jnp.arange(router.groups)).any(1)
    return jnp.where(chosen[:, :, None], grouped, -jnp.inf).reshape(choice.shape)


def _sparsemixer(logits, k, router: SparseMixerRouter, rng, correction):
    """K sequential draws: each among the experts close to the best one not drawn yet."""
    del correction  # it has none
    slots = []
    candidates = logits
    for slot in range(k):
        top = candidates.max(-1, keepdims=True)
        fixed = jax.lax.stop_gradient(logits)
        far = (top - fixed) / jnp.maximum(jnp.abs(fixed), top) > 2 * router.jitter
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

# By kind: (logits, K, router, rng, correction) -> ids and weights.
ROUTES: Mapping[str, Callable] = {
    SoftmaxRouter.kind: _softmax,
    SigmoidRouter.kind: _sigmoid,
    SparseMixerRouter.kind: _sparsemixer,
}
