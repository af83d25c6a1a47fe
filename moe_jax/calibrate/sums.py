"""Jitted accumulators of one forward pass: what a batch adds to the statistics."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.calibrate.gradients import ByLayer
from moe_jax.config import ModelConfig
from moe_jax.model import forward
from moe_jax.ops.grouped_matmul import grouped_outer
from moe_jax.ops.grouped_moments import grouped_moments, merge_moments

_TAPS = (
    "layer_input", "layer_output", "router_logits", "expert_ids", "weights", "row", "row_weight",
    "group_sizes", "hidden", "output",
)  # fmt: skip
_EXACT = jax.lax.Precision.HIGHEST

# Sums over experts by layer, over groups by layer, and over the residual stream.
State = tuple[ByLayer, ByLayer, dict[str, Array]]


@functools.partial(jax.jit, static_argnames=("config", "backend", "second_moments"))
def forward_sums(
    params, config: ModelConfig, batch, backend, second_moments: tuple[int, ...] = ()
) -> tuple[ByLayer, dict[str, Array]]:
    """What a batch adds to the statistics of the experts, by layer, and of the stream.

    ``second_moments`` names the layers whose ``hidden_gram`` is wanted.
    """
    segment_ids = batch["mask"].astype(jnp.int32)
    _, aux = forward(params, config, batch["tokens"], segment_ids, _TAPS, backend=backend)
    valid = segment_ids.reshape(-1) > 0
    layers = aux["layers"]
    experts = {
        i: _expert_sums(layers[i], config.moe(i).num_experts, valid) for i in config.moe_layers
    }
    for i in second_moments:
        experts[i]["hidden_gram"] = _hidden_gram(layers[i])
    states = jnp.stack([*(layer["layer_input"] for layer in layers), layers[-1]["layer_output"]])
    states = states.reshape(len(layers) + 1, valid.size, -1)
    return experts, {"angular_distance": _angular_distances(states, valid)}


@functools.partial(jax.jit, static_argnames=("config", "backend", "layers"))
def second_moment_sums(
    params, config: ModelConfig, batch, backend, layers: tuple[int, ...]
) -> ByLayer:
    """What a batch adds to ``hidden_gram`` of some layers alone; no later layer is computed."""
    segment_ids = batch["mask"].astype(jnp.int32)
    taps = ("row_weight", "group_sizes", "hidden")
    _, aux = forward(params, config, batch["tokens"], segment_ids, taps, backend=backend)
    return {i: {"hidden_gram": _hidden_gram(aux["layers"][i])} for i in layers}


def _expert_sums(aux: dict[str, Array], num_experts: int, valid) -> dict[str, Array]:
    """Sums over one batch; arrays about outputs and neurons run over stored experts."""
    chosen = jax.nn.one_hot(aux["expert_ids"], num_experts, dtype=jnp.float32)
    chosen = jnp.where(valid[:, None, None], chosen, 0)
    token_expert = chosen.sum(1)
    logits = jnp.where(valid[:, None], aux["router_logits"], 0)
    soft = jnp.where(valid[:, None], jax.nn.softmax(logits, -1), 0)
    sizes, row_weight = aux["group_sizes"], aux["row_weight"].astype(jnp.float32)
    output = aux["output"].astype(jnp.float32)
    norm = jnp.sqrt(jnp.square(output).sum(-1))
    gated = row_weight * norm
    norms = jnp.stack([norm, gated, jnp.square(gated)], -1)
    by_expert = grouped_outer(norms, jnp.ones_like(norms[:, :1]), sizes)[..., 0]
    outputs, neurons = grouped_moments((output, aux["hidden"]), sizes, row_weight)
    return {
        "count": token_expert.sum(0).astype(jnp.int32),
        "routing_mass": jnp.einsum("tk,tke->e", aux["weights"], chosen, precision=_EXACT),
        "soft_count": soft.sum(0),
        "coactivation": jnp.dot(token_expert.T, token_expert, precision=_EXACT).astype(jnp.int32),
        "router_gram": jnp.dot(logits.T, logits, precision=_EXACT),
        "output_gram": _output_gram(
            (output * row_weight[:, None])[aux["row"]], aux["expert_ids"], num_experts
        ),
        "stored_count": sizes,
        "output_mean": outputs.mean,
        "output_m2": outputs.m2,
        "output_norm": by_expert[:, 0],
        "gated_norm": by_expert[:, 1],
        "gated_square": by_expert[:, 2],
        "gated_output": outputs.weighted,
        "neuron_mean": neurons.mean,
        "neuron_m2": neurons.m2,
    }


def _hidden_gram(aux: dict[str, Array]) -> Float[Array, "E F1 F1"]:
    """``sum g^2 [h; 1][h; 1]^T`` over each stored expert's rows.

    Float32, but in blocks: products of up to a few hundred rows are summed by the matrix unit, then
    blocks, then batches, so that the error grows with the number of batches and not of tokens.
    """
    hidden, weight = aux["hidden"].astype(jnp.float32), aux["row_weight"].astype(jnp.float32)
    rows = jnp.pad(hidden, ((0, 0), (0, 1)), constant_values=1) * weight[:, None]
    return grouped_outer(rows, rows, aux["group_sizes"])


def _output_gram(
    gated: Float[Array, "T K D"], ids: Int[Array, "T K"], num_experts: int
) -> Float[Array, "E E"]:
    """Sum over tokens of the inner products of their weighted outputs; of novices it is 0."""
    products = jnp.einsum("tkd,tld->tkl", gated, gated, precision=_EXACT)
    zeros = jnp.zeros((num_experts, num_experts), jnp.float32)
    return zeros.at[ids[:, :, None], ids[:, None, :]].add(products, mode="promise_in_bounds")


def _angular_distances(
    states: Float[Array, "L1 T D"], valid: Bool[Array, " T"]
) -> Float[Array, "L1 L1"]:
    """Sum over tokens of ``arccos(cosine) / pi`` between the stream at any two depths.

    Rounding may take a cosine past 1, where arccos has no value: it is clipped.
    """
    states = states.astype(jnp.float32)
    length = jnp.sqrt(jnp.square(states).sum(-1, keepdims=True))
    unit = states / jnp.maximum(length, jnp.finfo(jnp.float32).tiny)
    cosine = jnp.einsum("itd,jtd->tij", unit, unit, precision=_EXACT)
    angle = jnp.arccos(jnp.clip(cosine, -1, 1)) / jnp.pi
    same = jnp.eye(states.shape[0], dtype=bool)
    return jnp.where(valid[:, None, None] & ~same, angle, 0).sum(0)


@jax.jit
def copied(state: State) -> State:
    """The same in buffers of its own."""
    return jax.tree.map(jnp.copy, state)


@functools.partial(jax.jit, donate_argnums=0)
def merge_states(a: State, b: State) -> State:
    """Adds sums and joins moments, of experts, of attention and of the stream."""
    experts = {i: _merge_layer(a[0][i], b[0][i]) for i in a[0]}
    return experts, *(jax.tree.map(jnp.add, x, y) for x, y in zip(a[1:], b[1:], strict=True))


def _merge_layer(old: dict[str, Array], new: dict[str, Array]) -> dict[str, Array]:
    moments = {f"{kind}_{part}" for kind in ("output", "neuron") for part in ("mean", "m2")}
    merged = {name: old[name] + new[name] for name in old if name not in moments}
    if "stored_count" not in old:  # second moments alone
        return merged
    counts = (old["stored_count"].astype(jnp.float32), new["stored_count"].astype(jnp.float32))
    for kind in ("output", "neuron"):
        mean, m2 = f"{kind}_mean", f"{kind}_m2"
        if mean not in old:  # slices keep nothing of neurons
            continue
        merged[mean], merged[m2] = merge_moments(
            counts[0], old[mean], old[m2], counts[1], new[mean], new[m2]
        )
    return merged
