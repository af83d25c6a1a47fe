"""The decoder block, and ``forward``: all blocks of a model between embedding and logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.config import DenseConfig, LayerConfig, ModelConfig, MoeConfig
from moe_jax.model.attention import LayerCache, Positions, attend, attention_output, position_tables
from moe_jax.model.moe import gated_hidden, moe_layer, shared_expert
from moe_jax.model.options import TAPS, BlockOptions, ForwardOptions
from moe_jax.ops.norms import layer_norm, rms_norm
from moe_jax.tokens import token_ids


def forward(
    params: dict[str, Any],
    config: ModelConfig,
    tokens: Int[Array | np.ndarray, "B S"],
    segment_ids: Int[Array | np.ndarray, "B S"] | None = None,
    taps: Sequence[str] = (),
    **options: Any,
) -> tuple[Float[Array, "B S V"], dict[str, Any]]:
    """Float32 logits of every position, and the intermediates ``aux["layers"][i][tap]``.

    Arguments and errors are those of ``hidden_states``.
    """
    x, aux = hidden_states(params, config, tokens, segment_ids, taps, **options)
    return head_logits(head_params(params, config), config, x), aux


def hidden_states(
    params: dict[str, Any],
    config: ModelConfig,
    tokens: Int[Array | np.ndarray, "B S"],
    segment_ids: Int[Array | np.ndarray, "B S"] | None = None,
    taps: Sequence[str] = (),
    **options: Any,
) -> tuple[Float[Array, "B S D"], dict[str, Any]]:
    """What the language-model head reads: the residual stream after the final norm.

    Args:
        params: weights, shaped as ``params.abstract_params(config)``, with ``layers`` as a list
            or, where ``layers_are_uniform``, stacked by ``stack_layers``: then one block is
            compiled and runs in ``lax.scan``. Computation runs in the dtype of the embedding,
            routers and softmaxes in float32.
        tokens: token ids. They are checked where they are known; inside ``jax.jit`` they are not.
        segment_ids: 0 marks padding; equal positive ids mark one document. Attention stays
            within a segment and positions start over with it.
        taps: names in ``TAPS``, see ``options``; what a layer does not have is left out.
        options: fields of ``options.ForwardOptions``.

    Returns:
        The states, and ``aux["layers"][i][tap]``.

    Raises:
        ValueError: an unknown tap, masks with stacked layers, or ids outside the vocabulary.
    """
    run = ForwardOptions(**options)
    unknown = set(taps) - set(TAPS)
    if unknown:
        raise ValueError(f"taps must be among {TAPS}, got {sorted(unknown)}")
    tokens = token_ids("tokens", tokens, config.vocab_size)
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    positions = position_tables(config, tokens.shape, segment_ids)

    def run_block(x, weights, layer, options):
        return block(weights, config, layer, x, positions, options)

    if run.remat:
        run_block = jax.checkpoint(run_block, static_argnums=2)
    x = embed(params, config, tokens)
    if isinstance(params["layers"], dict):
        if run.by_layer:
            raise ValueError(
                "masks and offsets go with a list of layers, got stacked ones; unstack_layers"
            )
        count = config.num_layers
        x, stacked = jax.lax.scan(
            lambda x, item: run_block(
                x, item[0], config.layers[0], run.of_layer(item[1], tuple(taps))
            ),
            x,
            (params["layers"], jnp.arange(count)),
        )
        layers_aux = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count)]
    else:
        layers_aux = []
        for i, (layer, weights) in enumerate(zip(config.layers, params["layers"], strict=True)):
            with jax.named_scope(f"layer_{i}"):
                x, aux = run_block(x, weights, layer, run.of_layer(i, tuple(taps)))
            layers_aux.append(aux)
    return final_states(params, config, x), {"layers": layers_aux}


def embed(
    params: dict[str, Any], config: ModelConfig, tokens: Int[Array | np.ndarray, "*N"]
) -> Float[Array, "*N D"]:
    """The residual stream before the first layer."""
    x = params["embed"]["embedding"][tokens]
    return x if config.embedding_scale == 1 else x * config.embedding_scale


def final_states(
    params: dict[str, Any], config: ModelConfig, x: Float[Array, "*N D"]
) -> Float[Array, "*N D"]:
    """What the head reads, from the stream behind the last layer."""
    x = norm(config, params["final_norm"], x)
    # The divisor of the logits, here so that whatever multiplies by the head has it.
    return x if config.logit_divisor == 1 else x / config.logit_divisor


def block(
    weights: dict[str, Any],
    config: ModelConfig,
    layer: LayerConfig,
    x: Float[Array, "B S D"],
    positions: Positions,
    options: BlockOptions = BlockOptions(),  # noqa: B008, immutable
    cache: LayerCache | None = None,
) -> tuple[Float[Array, "B S D"], dict[str, Array]]:
    """One decoder block: attention and feed-forward, each normed first and added to the stream.

    Args:
        weights, config, layer: one of the model's layers.
        cache: of earlier tokens, with one token a sequence in ``x``; the taps ``key`` and
            ``value`` are then the cache with that token.

    Returns:
        The residual stream behind it, and the taps.
    """
    aux = {"layer_input": x}
    normed = norm(config, weights["attention_norm"], x)
    mixed, aux["key"], aux["value"] = attend(
        weights["attention"], config, layer, normed, positions, cache
    )
    if options.group_mask is not None:
        by_head = jnp.repeat(options.group_mask, layer.num_heads // layer.num_kv_heads)
        mixed = mixed * by_head[:, None].astype(mixed.dtype)
    aux["mixed"] = mixed
    y = attention_output(weights["attention"], mixed)
    x = _added(config, x, y, options.attention_offset)
    aux["feed_forward_input"] = normed = norm(config, weights["mlp_norm"], x)
    part = layer.feed_forward
    run = FEED_FORWARD[part.kind]
    y, feed_forward_aux = run(weights, config, part, normed, positions.segment_ids, options)
    aux |= feed_forward_aux | {"feed_forward_output": y}
    aux["layer_output"] = _added(config, x, y, options.feed_forward_offset)
    return aux["layer_output"], {name: aux[name] for name in options.taps if name in aux}


@functools.partial(jax.jit, static_argnames=("config", "layer", "backend"))
def layer_output(
    weights,
    config: ModelConfig,
    layer: LayerConfig,
    x: Float[Array, "B S D"],
    segment_ids: Int[Array, "B S"],
    backend: str = "auto",
) -> Float[Array, "B S D"]:
    """The residual stream behind one layer, from that before it."""
    positions = position_tables(config, segment_ids.shape, segment_ids)
    return block(weights, config, layer, x, positions, BlockOptions(backend=backend))[0]


def _added(config: ModelConfig, x: Array, y: Array, offset: Array | None) -> Array:
    """The stream with what a part adds to it, and an offset."""
    x = x + (y if config.residual_scale == 1 else y * config.residual_scale)
    return x if offset is None else x + offset.astype(x.dtype)


def _dense(weights, config: ModelConfig, part: DenseConfig, x, segment_ids, options):
    del config, part, segment_ids, options
    hidden = gated_hidden(weights["mlp"], x)
    return hidden @ weights["mlp"]["down"].astype(x.dtype), {"hidden": hidden}


def _mixture(weights, config: ModelConfig, moe: MoeConfig, x, segment_ids, options):
    """Routed experts and, added to their sum and in no tap of theirs, the shared expert."""
    valid = None if segment_ids is None else (segment_ids > 0).reshape(-1)
    flat = x.reshape(-1, x.shape[-1])
    y, aux = moe_layer(weights["moe"], moe, config.router, flat, valid, options)
    y = y.reshape(x.shape)
    if moe.shared is not None:
        with jax.named_scope("shared_expert"):
            shared, aux["shared_hidden"] = shared_expert(weights["moe"]["shared"], x)
            y = y + shared
    return y, aux


# By kind: (weights, config, feed-forward part, x, segment_ids, options) -> output and taps.
FEED_FORWARD: Mapping[str, Callable] = {DenseConfig.kind: _dense, MoeConfig.kind: _mixture}


def norm(
    config: ModelConfig, weights: dict[str, Array], x: Float[Array, "*N D"]
) -> Float[Array, "*N D"]:
    """The model's layer or RMS norm."""
    if config.norm == "layer":
        return layer_norm(x, weights["scale"], weights["bias"], config.norm_eps)
    return rms_norm(x, weights["scale"], config.norm_eps)


def head_params(params: dict[str, Any], config: ModelConfig) -> dict[str, Array]:
    """The weights that ``head_logits`` reads: ``kernel [D, V]`` and perhaps ``bias [V]``."""
    head = dict(params.get("lm_head", {}))
    if config.tied_embeddings:
        head["kernel"] = params["embed"]["embedding"].T
    return head


def head_logits(
    head: dict[str, Array], config: ModelConfig, x: Float[Array, "*N D"]
) -> Float[Array, "*N V"]:
    """Float32 logits of final hidden states."""
    with jax.named_scope("lm_head"):
        logits = _to_vocabulary(x, head["kernel"].astype(x.dtype))
        if config.lm_head_bias:
            logits = logits + head["bias"].astype(jnp.float32)
    return logits


@jax.custom_vjp
def _to_vocabulary(x, kernel):
    """``x @ kernel`` in float32; its gradient's products run in ``x.dtype`` like all others."""
    return jnp.dot(x, kernel, preferred_element_type=jnp.float32)


def _to_vocabulary_bwd(saved, gradient):
    # Left to itself, autodiff would run both products in float32, at twice the time and memory
    # of the largest matrix of the model.
    x, kernel = saved
    gradient = gradient.astype(x.dtype)
    rows = (x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]))
    return jnp.dot(gradient, kernel.T), jnp.dot(rows[0].T, rows[1])


_to_vocabulary.defvjp(
    lambda x, kernel: (_to_vocabulary(x, kernel), (x, kernel)), _to_vocabulary_bwd
)
