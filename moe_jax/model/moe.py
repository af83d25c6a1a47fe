"""The Mixture-of-Experts layer: experts, novices, and the shared expert beside them.

Tokens are sorted by expert, so that each expert's tokens are consecutive rows; padding and tokens
on novices go behind the last expert, where no matrix product sees them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import Clamp, MoeConfig
from moe_jax.kinds import RouterConfig
from moe_jax.model.options import BlockOptions
from moe_jax.model.router import route
from moe_jax.ops.expert_mlp import TAPS as EXPERT_TAPS
from moe_jax.ops.expert_mlp import expert_mlp
from moe_jax.ops.expert_parallel import devices_of_experts, sharded_experts
from moe_jax.ops.expert_rows import Experts, gated_product, rows_of_groups
from moe_jax.ops.grouped_matmul import of_rows


def moe_layer(
    params: dict[str, Any],
    moe: MoeConfig,
    router: RouterConfig,
    x: Float[Array, "T D"],
    valid: Bool[Array, " T"] | None = None,
    options: BlockOptions = BlockOptions(taps=EXPERT_TAPS),  # noqa: B008, immutable
) -> tuple[Float[Array, "T D"], dict[str, Array]]:
    """Routes each token to K experts and adds their weighted outputs.

    Args:
        params: ``router.kernel [D, E]``, perhaps ``router.{bias,correction} [E]``;
            ``experts.{gate,up} [E_kept, D, F]``, ``experts.down [E_kept, F, D]``, perhaps
            ``experts.{gate_bias,up_bias} [E_kept, F]``, or a list of these, one of each of
            ``moe.buckets``, where experts differ in width;
            ``expert_bias [E_kept, D]`` and ``novices.constant [E_novice, D]`` if there are any.
        valid: False for padding, which reaches no expert and comes back zero.
        options: ``hidden`` and ``output`` cost memory traffic and are made if its taps name them.

    Returns:
        The output, without the shared expert's, and what calibration needs: ``router_logits
        [T, E]``, ``expert_ids [T, K]``, ``weights [T, K]``, and, for the T*K rows sorted by
        expert, ``row_token``, ``row_weight``, ``hidden [T*K, F]`` (zeros past an expert's own
        width), ``output [T*K, D]`` (before weighting) and ``group_sizes [E_kept]``; ``row
        [T, K]`` is where each of a token's slots lies among them.
    """
    rng = options.rng
    if rng is not None and router.input_jitter > 0:
        jitter_key, rng = jax.random.split(rng)
        low, high = 1 - router.input_jitter, 1 + router.input_jitter
        x = x * jax.random.uniform(jitter_key, x.shape, x.dtype, low, high)
    with jax.named_scope("router"):
        # Always float32: bfloat16 logits tie often, and then pick other experts.
        kernel = params["router"]["kernel"].astype(jnp.float32)
        logits = jnp.dot(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
        if router.logit_bias:
            logits = logits + params["router"]["bias"].astype(jnp.float32)
        correction = params["router"].get("correction")
        ids, weights = route(logits, moe.experts_per_token, router, rng, correction)
    used = weights if valid is None else jnp.where(valid[:, None], weights, 0)
    with jax.named_scope("experts"):
        groups = stored_index(moe, ids, valid)
        rows = rows_of_groups(groups, len(moe.expert_ids))
        buckets = params["experts"] if moe.expert_widths else [params["experts"]]
        buckets = jax.tree.map(lambda matrices: matrices.astype(x.dtype), buckets)
        experts = tuple(Experts(**bucket) for bucket in buckets)
        keep = tuple(name for name in EXPERT_TAPS if name in options.taps)
        run: dict[str, Any] = {"clamp": moe.clamp, "backend": options.backend}
        mesh = devices_of_experts()
        taps: dict[str, Array] = {}
        if mesh is None or keep or options.neuron_mask is not None:
            y, taps = expert_mlp(x, used, experts, rows, options.neuron_mask, keep=keep, **run)
        else:
            y = sharded_experts(x, used, experts, groups, mesh, **run)
    if moe.expert_bias:
        with jax.named_scope("expert_bias"):
            bias = params["expert_bias"].astype(jnp.float32)
            y = y + _constants(bias, moe.expert_ids, ids, used).astype(x.dtype)
            if "output" in taps:
                by_row = of_rows(bias, rows.group_sizes, rows.order.shape[0])
                taps["output"] = taps["output"] + by_row.astype(x.dtype)
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


def shared_expert(
    weights: dict[str, Any], x: Float[Array, "*N D"]
) -> tuple[Float[Array, "*N D"], Float[Array, "*N U"]]:
    """What a shared expert adds for every token: all of its output, or a sigmoid's share of it.

    Returns:
        The output, and the hidden activations times that share, in which it is linear.
    """
    hidden = gated_hidden(weights, x)
    y = hidden @ weights["down"].astype(x.dtype)
    if "output_gate" not in weights:
        return y, hidden
    gate = jax.nn.sigmoid(x @ weights["output_gate"]["kernel"].astype(x.dtype))[..., None]
    return gate * y, gate * hidden


def gated_hidden(
    weights: dict[str, Any], x: Float[Array, "*N D"], clamp: Clamp | None = None
) -> Float[Array, "*N F"]:
    """``silu(gate(x)) * up(x)``: the hidden activations of a gated feed-forward network.

    Args:
        weights: ``gate`` and ``up`` [D, F], perhaps ``gate_bias`` and ``up_bias`` [F].
        clamp: of an expert that clamps.
    """

    def product(name: str) -> Array:
        y, bias = x @ weights[name].astype(x.dtype), weights.get(f"{name}_bias")
        return y if bias is None else y + bias.astype(x.dtype)

    return gated_product(product("gate"), product("up"), clamp)


def stored_index(moe: MoeConfig, ids, valid) -> Int[Array, "T K"]:
    """Where each slot's expert is stored; past the last for novices and padding."""
    stored = np.full(moe.num_experts, len(moe.expert_ids), np.int32)
    stored[list(moe.expert_ids)] = np.arange(len(moe.expert_ids), dtype=np.int32)
    group = jnp.asarray(stored)[ids]
    return group if valid is None else jnp.where(valid[:, None], group, len(moe.expert_ids))


def _constants(constants, owners: tuple[int, ...], ids, weights):
    """Sum over each token's slots of routing weight times the constant of the slot's expert."""
    hit = ids[:, :, None] == jnp.asarray(owners)
    by_owner = jnp.where(hit, weights[:, :, None], 0).sum(1)
    return jnp.dot(by_owner, constants)
