"""Attention: queries, keys and values by kind, and each head's mixture of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.config import LayerConfig, ModelConfig
from moe_jax.kinds import GroupedQueryAttention, LatentAttention, YarnRope
from moe_jax.ops.attention import cached_attention, causal_attention
from moe_jax.ops.norms import rms_norm
from moe_jax.ops.rope import apply_rope, rope_tables


class Positions(NamedTuple):
    """Where the tokens of a batch stand.

    Attributes:
        cos, sin: what queries and keys are turned by.
        segment_ids: attention stays within equal ids, 0 is padding; None: one sequence a row.
    """

    cos: Float[Array, "B S R"]
    sin: Float[Array, "B S R"]
    segment_ids: Int[Array, "B S"] | None


class LayerCache(NamedTuple):
    """Keys and values of the tokens before one more of each sequence.

    Attributes:
        keys, values: at their positions, turned; what lies behind ``lengths`` is arbitrary.
        lengths: tokens of each sequence so far: the position of the next one.
    """

    keys: Float[Array, "B C G H"]
    values: Float[Array, "B C G H"]
    lengths: Int[Array, " B"]


def position_tables(
    config: ModelConfig, shape: tuple[int, ...], segment_ids: Int[Array, "B S"] | None
) -> Positions:
    """Of tokens of shape [B, S], whose positions are 0, 1, 2, ... within each segment."""
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    lengths = jnp.full_like(positions, shape[1])
    if segment_ids is not None:
        change = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = jnp.pad(change, ((0, 0), (1, 0)))
        ends = jnp.pad(change, ((0, 0), (0, 1)))
        first = jax.lax.cummax(jnp.where(starts, positions, 0), axis=1)
        last = jnp.where(ends, positions, shape[1] - 1)
        lengths = jax.lax.cummin(last, axis=1, reverse=True) - first + 1
        positions = positions - first
    return Positions(
        *rope_tables(config.rope, positions, lengths, config.attention.rope_dim), segment_ids
    )


def next_position(config: ModelConfig, lengths: Int[Array, " B"]) -> Positions:
    """Of one more token of each sequence of ``lengths`` tokens."""
    lengths = lengths[:, None]
    return Positions(
        *rope_tables(config.rope, lengths, lengths + 1, config.attention.rope_dim), None
    )


def attend(
    weights: dict[str, Any],
    config: ModelConfig,
    layer: LayerConfig,
    x: Float[Array, "B S D"],
    positions: Positions,
    cache: LayerCache | None = None,
) -> tuple[Float[Array, "B S N V"], Float[Array, "B _ G H"], Float[Array, "B _ G V"]]:
    """Each head's mixture of values, and the keys and values that it was made of.

    Query head n reads key/value head n // (N / G).

    Args:
        weights: the layer's ``attention``.
        cache: of the tokens before these, one a sequence; it comes back with them.
    """
    query, key, value = ATTENTION[config.attention.kind](weights, config, x, positions)
    extent = (layer.sliding_window, weights.get("sinks"))
    if cache is None:
        mixed = causal_attention(query, key, value, positions.segment_ids, *extent)
        return mixed, key, value
    rows = jnp.arange(x.shape[0])
    keys = cache.keys.at[rows, cache.lengths].set(key[:, 0])
    values = cache.values.at[rows, cache.lengths].set(value[:, 0])
    mixed = cached_attention(query[:, 0], keys, values, cache.lengths, *extent)
    return mixed[:, None], keys, values


def attention_output(
    weights: dict[str, Any], mixed: Float[Array, "B S N H"]
) -> Float[Array, "B S D"]:
    """What attention adds to the residual stream, from each head's mixture of values."""
    y = jnp.einsum("bsnh,nhd->bsd", mixed, weights["out"]["kernel"].astype(mixed.dtype))
    return y + weights["out"]["bias"].astype(mixed.dtype) if "bias" in weights["out"] else y


def _grouped_query(weights: dict[str, Any], config: ModelConfig, x, positions: Positions):
    """Query, key and value of every token, normed, clipped and rotated to their positions."""
    attention: Any = config.attention

    def project(name):
        part = weights[name]
        y = jnp.einsum("bsd,dnh->bsnh", x, part["kernel"].astype(x.dtype))
        return y + part["bias"].astype(x.dtype) if "bias" in part else y

    def normed(name, y):
        scale = weights[name]["scale"]
        if attention.qk_norm == "head":
            return rms_norm(y, scale, config.norm_eps)
        flat = rms_norm(y.reshape(*y.shape[:2], -1), scale.reshape(-1), config.norm_eps)
        return flat.reshape(y.shape)

    query, key, value = project("query"), project("key"), project("value")
    if attention.qk_norm is not None:
        query, key = normed("query_norm", query), normed("key_norm", key)
    if attention.clip_qkv is not None:
        bound = attention.clip_qkv
        query, key, value = (jnp.clip(a, -bound, bound) for a in (query, key, value))
    if attention.logit_scale is not None:
        query = query * (attention.logit_scale * attention.head_dim**0.5)
    turn = (positions.cos, positions.sin, attention.interleaved)
    return apply_rope(query, *turn), apply_rope(key, *turn), value


def _latent(weights: dict[str, Any], config: ModelConfig, x, positions: Positions):
    """Queries, and keys and values of every head, made of the latent vectors."""
    attention: Any = config.attention
    content, rank = attention.content_dim, attention.latent_rank

    def to_latent(name):
        y = x @ weights[name]["kernel"].astype(x.dtype)
        return y + weights[name]["bias"].astype(x.dtype) if "bias" in weights[name] else y

    def of_heads(name, y):
        return jnp.einsum("bsr,rnh->bsnh", y, weights[name]["kernel"].astype(x.dtype))

    # These norms keep torch's default epsilon, whatever the model's is.
    def normed(name, y):
        return rms_norm(y, weights[name]["scale"], _LATENT_EPS)

    if attention.query_rank is None:
        query = of_heads("query", x)
    else:
        query = of_heads("query_up", normed("query_latent_norm", to_latent("query_latent")))
    latent = to_latent("latent")
    both = of_heads("key_value", normed("latent_norm", latent[..., :rank]))
    turn = (positions.cos, positions.sin, attention.interleaved)
    shared = apply_rope(latent[:, :, None, rank:], *turn)
    shared = jnp.broadcast_to(shared, (*both.shape[:3], attention.rope_dim))
    key = jnp.concatenate([both[..., :content], shared], -1)
    query = jnp.concatenate([query[..., :content], apply_rope(query[..., content:], *turn)], -1)
    if isinstance(config.rope, YarnRope) and config.rope.logit_scale != 1:
        query = query * config.rope.logit_scale
    return query, key, both[..., content:]


_LATENT_EPS = 1e-6

# By kind: (weights, config, x, positions) -> query [B, S, N, H], key [B, S, G, H] and value
# [B, S, G, H], whose H may be another.
ATTENTION: Mapping[str, Callable] = {
    GroupedQueryAttention.kind: _grouped_query,
    LatentAttention.kind: _latent,
}
