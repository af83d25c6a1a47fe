"""Jitted accumulators of one forward pass: what a batch adds to the statistics."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.calibrate.gradients import ByLayer
from moe_jax.config import LayerConfig, ModelConfig, MoeConfig
from moe_jax.model import BlockOptions, block, forward, position_tables
from moe_jax.ops.grouped_matmul import grouped_outer, row_groups
from moe_jax.ops.grouped_moments import grouped_moments
from moe_jax.statistics_table import SHARED, merge_arrays

_TAPS = (
    "layer_input", "layer_output", "mixed", "router_logits", "expert_ids", "weights", "row",
    "row_weight", "group_sizes", "hidden", "output", "shared_hidden",
)  # fmt: skip
_MOMENT_TAPS = ("row_weight", "group_sizes", "hidden", "mixed", "shared_hidden")
_EXACT = jax.lax.Precision.HIGHEST

# Sums over experts by layer, over groups by layer, and over the residual stream.
State = tuple[ByLayer, ByLayer, dict[str, Array]]


@dataclass(frozen=True)
class Wanted:
    """What a pass over text sums up.

    Attributes:
        always: what is measured in any case; without it, second moments alone.
        hidden, mixed, shared: layers whose second moments are wanted: of experts' hidden
            activations, of mixed heads, and of a shared expert's hidden activations.
    """

    always: bool = True
    hidden: tuple[int, ...] = ()
    mixed: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()

    def of(self, i: int) -> LayerWanted:
        """The same of layer ``i`` alone."""
        return LayerWanted(self.always, i in self.hidden, i in self.mixed, i in self.shared)


@dataclass(frozen=True)
class LayerWanted:
    """What a pass over text sums up of one layer; see ``Wanted``."""

    always: bool = True
    hidden: bool = True
    mixed: bool = False
    shared: bool = False


class StreamBatch(NamedTuple):
    """The residual stream of a batch before a layer.

    Attributes:
        x: Float[B, S, D].
        segment_ids: Int[B, S], 0 for padding.
        goal: what the stream should be behind the layer, for ``hidden_gap``; None: what it is.
    """

    x: Any
    segment_ids: Any
    goal: Any = None


ALWAYS = Wanted()


@functools.partial(jax.jit, static_argnames=("config", "backend", "wanted"))
def batch_sums(params, config: ModelConfig, batch, backend, wanted: Wanted = ALWAYS) -> State:
    """What a batch adds to the statistics; XLA leaves out what is behind the last layer wanted."""
    segment_ids = batch["mask"].astype(jnp.int32)
    taps = _TAPS if wanted.always else _MOMENT_TAPS
    _, aux = forward(params, config, batch["tokens"], segment_ids, taps, backend=backend)
    layers, valid = aux["layers"], segment_ids.reshape(-1) > 0
    experts = {
        i: measure_block(layers[i], config.moe(i), valid, wanted.of(i))
        for i in (config.moe_layers if wanted.always else sorted({*wanted.hidden, *wanted.shared}))
    }
    attention = {
        i: {"mixed_gram": _mixed_gram(layers[i]["mixed"], valid)} if i in wanted.mixed else {}
        for i in (range(config.num_layers) if wanted.always else wanted.mixed)
    }
    if not wanted.always:
        return experts, attention, {}
    states = [*(layer["layer_input"] for layer in layers), layers[-1]["layer_output"]]
    return experts, attention, stream_sums(states, valid)


@jax.jit
def stream_sums(states: list[Array], valid: Bool[Array, " T"]) -> dict[str, Array]:
    """What a batch adds to the sums over the residual stream, from it before and behind layers."""
    together = jnp.stack(states).reshape(len(states), valid.size, -1)
    return {"angular_distance": _angular_distances(together, valid)}


@functools.partial(jax.jit, static_argnames=("config", "layer", "backend", "wanted"))
def layer_sums(
    weights,
    config: ModelConfig,
    layer: LayerConfig,
    batch: StreamBatch,
    backend,
    wanted: LayerWanted,
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """``batch_sums`` of one layer, and the stream behind it.

    Returns:
        The stream; sums over experts, none of a dense layer; and those of attention.
    """
    x, segment_ids, goal = batch
    positions = position_tables(config, segment_ids.shape, segment_ids)
    options = BlockOptions((*_TAPS, "row_token"), backend)
    y, aux = block(weights, config, layer, x, positions, options)
    valid = segment_ids.reshape(-1) > 0
    attention = {"mixed_gram": _mixed_gram(aux["mixed"], valid)} if wanted.mixed else {}
    if not isinstance(layer.feed_forward, MoeConfig):
        return y, {}, attention
    sums = measure_block(aux, layer.feed_forward, valid, wanted)
    if goal is not None:
        gap = (goal - y).reshape(valid.size, -1).astype(jnp.float32) / config.residual_scale
        sums["hidden_gap"] = _hidden_gap(aux, jnp.where(valid[:, None], gap, 0))
    return y, sums, attention


def measure_block(
    aux: dict[str, Array], moe: MoeConfig, valid: Bool[Array, " T"], wanted: LayerWanted
) -> dict[str, Array]:
    """What one batch adds to the sums of a layer with experts, from the taps of its block.

    Calibration of the whole model and of one layer after the other trace this one function, so
    that the two agree to the bit.
    """
    sums = _expert_sums(aux, moe.num_experts, valid) if wanted.always else {}
    if wanted.hidden:
        sums["hidden_gram"] = _hidden_gram(aux)
    if moe.shared is None:
        return sums
    rows = aux["shared_hidden"].reshape(valid.size, -1).astype(jnp.float32)
    rows = jnp.where(valid[:, None], rows, 0)
    if wanted.always:
        sums |= _shared_sums(rows, valid)
    if wanted.shared:
        ones = jnp.concatenate([rows, valid[:, None].astype(jnp.float32)], 1)
        sums[f"{SHARED}hidden_gram"] = jnp.dot(ones.T, ones, precision=_EXACT)[None]
    return sums


def _shared_sums(
    hidden: Float[Array, "T U"], valid: Bool[Array, " T"]
) -> dict[str, Int[Array, " 1"] | Float[Array, "1 U"]]:
    """Sums over one batch about a shared expert's neurons, whose padding is zeros."""
    count = valid.sum(keepdims=True)
    mean = hidden.sum(0) / jnp.maximum(count, 1)
    deviation = jnp.where(valid[:, None], hidden - mean, 0)
    sums = {
        "count": count.astype(jnp.int32),
        "neuron_mean": mean[None],
        "neuron_m2": jnp.square(deviation).sum(0)[None],
        "gated_energy": jnp.square(hidden).sum(0)[None],
        "gated_peak": jnp.abs(hidden).max(0)[None],
    }
    return {f"{SHARED}{name}": array for name, array in sums.items()}


def _expert_sums(
    aux: dict[str, Array], num_experts: int, valid: Bool[Array, " T"]
) -> dict[str, Array]:
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
        "output_peak": _largest(norm[:, None], sizes)[:, 0],
        "gated_norm": by_expert[:, 1],
        "gated_square": by_expert[:, 2],
        "gated_output": outputs.weighted,
        "neuron_mean": neurons.mean,
        "neuron_m2": neurons.m2,
        **_gated_neurons(aux["hidden"].astype(jnp.float32), row_weight, sizes),
    }


def _gated_neurons(
    hidden: Float[Array, "M F"], weight: Float[Array, " M"], sizes: Int[Array, " E"]
) -> dict[str, Float[Array, "E F"]]:
    """Sum of squares and largest magnitude of each stored expert's gated activations."""
    gated = jnp.abs(hidden * weight[:, None])
    energy = grouped_outer(jnp.square(gated), jnp.ones_like(gated[:, :1]), sizes)[..., 0]
    return {"gated_energy": energy, "gated_peak": _largest(gated, sizes)}


def _largest(magnitudes: Float[Array, "M F"], sizes: Int[Array, " E"]) -> Float[Array, "E F"]:
    """Over each stored expert's rows; 0 for one that has none."""
    expert = row_groups(sizes, len(magnitudes))  # past the last one for rows without an expert
    peak = jax.ops.segment_max(magnitudes, expert, len(sizes), indices_are_sorted=True)
    return jnp.maximum(peak, 0)  # without rows it is the least number there is


def _hidden_gram(aux: dict[str, Array]) -> Float[Array, "E F1 F1"]:
    """``sum g^2 [h; 1][h; 1]^T`` over each stored expert's rows.

    Float32, but in blocks: products of up to a few hundred rows are summed by the matrix unit, then
    blocks, then batches, so that the error grows with the number of batches and not of tokens.
    """
    hidden, weight = aux["hidden"].astype(jnp.float32), aux["row_weight"].astype(jnp.float32)
    rows = jnp.pad(hidden, ((0, 0), (0, 1)), constant_values=1) * weight[:, None]
    return grouped_outer(rows, rows, aux["group_sizes"])


def _hidden_gap(aux: dict[str, Array], gap: Float[Array, "T D"]) -> Float[Array, "E F1 D"]:
    """``sum g^2 [h; 1] c^T`` over each stored expert's rows, ``c`` what its output lacks.

    A token's gap is shared out among its experts so that their outputs change least: each by
    ``c = g gap / sum g^2``.
    """
    hidden, weight = aux["hidden"].astype(jnp.float32), aux["row_weight"].astype(jnp.float32)
    weight = jnp.where(jnp.arange(len(weight)) < aux["group_sizes"].sum(), weight, 0)
    token = aux["row_token"]
    total = jnp.zeros(len(gap)).at[token].add(jnp.square(weight))[token]
    share = jnp.where(total > 0, weight**3 / jnp.where(total > 0, total, 1), 0)
    rows = jnp.pad(hidden, ((0, 0), (0, 1)), constant_values=1)
    return grouped_outer(rows, gap[token] * share[:, None], aux["group_sizes"])


def _mixed_gram(
    mixed: Float[Array, "B S N H"], valid: Bool[Array, " T"]
) -> Float[Array, "NH1 NH1"]:
    """``sum [m; 1][m; 1]^T`` over tokens, ``m`` the mixed heads as one vector."""
    rows = mixed.reshape(valid.size, -1).astype(jnp.float32)
    rows = jnp.where(valid[:, None], jnp.pad(rows, ((0, 0), (0, 1)), constant_values=1), 0)
    return jnp.dot(rows.T, rows, precision=_EXACT)


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
    """The sums in buffers of their own."""
    return jax.tree.map(jnp.copy, state)


@functools.partial(jax.jit, donate_argnums=0)
def merge_states(a: State, b: State) -> State:
    """Sums of two texts as those of both, by the rules of the table of statistics."""
    experts, attention = (
        {i: merge_arrays(x[i], y[i], part, jnp) for i in x}
        for part, x, y in zip(("layers", "attention"), a[:2], b[:2], strict=True)
    )
    return experts, attention, merge_arrays(a[2], b[2], "stream", jnp)
