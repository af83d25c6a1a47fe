"""The decoder: ``forward`` over the nested dict of weights, and a thin Flax Linen shell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.config import LayerConfig, ModelConfig, MoeConfig
from moe_jax.model.moe import moe_layer
from moe_jax.ops.attention import causal_attention
from moe_jax.ops.expert_mlp import TAPS as EXPERT_TAPS
from moe_jax.ops.norms import layer_norm, rms_norm
from moe_jax.ops.rope import apply_rope, rope_tables
from moe_jax.params import Leaf, abstract_params, leaves_with_path, path_name

# What a caller may ask ``forward`` to return beside the logits, by layer.
TAPS = (
    "layer_input",
    "mixed",
    "router_logits",
    "expert_ids",
    "weights",
    "row",
    "row_token",
    "row_weight",
    "group_sizes",
    "hidden",
    "output",
    "layer_output",
)


def forward(
    params: dict[str, Any],
    config: ModelConfig,
    tokens: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"] | None = None,
    taps: Sequence[str] = (),
    **options,
) -> tuple[Float[Array, "B S V"], dict[str, Any]]:
    """Logits of every position, and the intermediates named in ``taps``.

    ``head_logits`` after ``hidden_states``, which see for the arguments.

    Returns:
        ``(logits, aux)``: float32 logits, and ``aux["layers"][i][tap]``.

    Raises:
        ValueError: an unknown tap.
    """
    x, aux = hidden_states(params, config, tokens, segment_ids, taps, **options)
    return head_logits(head_params(params, config), config, x), aux


def hidden_states(
    params: dict[str, Any],
    config: ModelConfig,
    tokens: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"] | None = None,
    taps: Sequence[str] = (),
    *,
    neuron_masks: dict[int, Array] | None = None,
    group_masks: dict[int, Array] | None = None,
    rng=None,
    remat: bool = False,
    backend: str = "auto",
) -> tuple[Float[Array, "B S D"], dict[str, Any]]:
    """What the language-model head reads: the residual stream after the final norm.

    Args:
        params: weights, shaped as ``params.abstract_params(config)``, with ``layers`` as a list
            or, where ``layers_are_uniform``, stacked by ``stack_layers``: then one block is
            compiled and runs in ``lax.scan``. Computation runs in the dtype of the embedding,
            routers and softmaxes in float32.
        tokens: token ids.
        segment_ids: 0 marks padding; equal positive ids mark one document. Attention stays
            within a segment and positions start over with it.
        taps: names in ``TAPS``; see ``moe.moe_layer`` for their shapes. ``layer_input`` and
            ``layer_output`` are the residual stream [B, S, D], ``mixed`` [B, S, N, H] what
            attention's output projection reads.
        neuron_masks: by layer index, ``[E_kept, F]`` multipliers of the experts' hidden neurons.
        group_masks: by layer index, ``[G]`` multipliers of the outputs of each key/value head's
            query heads.
        rng: train mode (SparseMixer sampling, input jitter) when given.
        remat: keep each block's input only and compute the rest again in the backward pass.
        backend: of ``ops.grouped_matmul``.

    Returns:
        The states, and ``aux["layers"][i][tap]``.

    Raises:
        ValueError: an unknown tap, or masks with stacked layers.
    """
    unknown = set(taps) - set(TAPS)
    if unknown:
        raise ValueError(f"taps must be among {TAPS}, got {sorted(unknown)}")
    tables = position_tables(config, tokens.shape, segment_ids)

    def run_block(x, weights, i, layer, neuron_mask=None, group_mask=None):
        return block(
            weights,
            config,
            layer,
            x,
            tables,
            segment_ids,
            taps,
            neuron_mask=neuron_mask,
            group_mask=group_mask,
            rng=None if rng is None else jax.random.fold_in(rng, i),
            backend=backend,
        )

    if remat:
        run_block = jax.checkpoint(run_block, static_argnums=3)
    x = params["embed"]["embedding"][tokens]
    if isinstance(params["layers"], dict):
        if neuron_masks or group_masks:
            raise ValueError("masks go with a list of layers, got stacked ones; unstack_layers")
        count = config.num_layers
        x, stacked = jax.lax.scan(
            lambda x, item: run_block(x, *item, config.layers[0]),
            x,
            (params["layers"], jnp.arange(count)),
        )
        layers_aux = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count)]
    else:
        layers_aux = []
        for i, (layer, weights) in enumerate(zip(config.layers, params["layers"], strict=True)):
            masks = ((masks or {}).get(i) for masks in (neuron_masks, group_masks))
            with jax.named_scope(f"layer_{i}"):
                x, aux = run_block(x, weights, i, layer, *masks)
            layers_aux.append(aux)
    return norm(config, params["final_norm"], x), {"layers": layers_aux}


def block(
    weights: dict[str, Any],
    config: ModelConfig,
    layer: LayerConfig,
    x: Float[Array, "B S D"],
    tables: tuple[Array, Array],
    segment_ids: Int[Array, "B S"] | None,
    taps: Sequence[str] = (),
    *,
    neuron_mask: Float[Array, "E_kept F"] | None = None,
    group_mask: Float[Array, " G"] | None = None,
    rng=None,
    backend: str = "auto",
) -> tuple[Float[Array, "B S D"], dict[str, Array]]:
    """One decoder block: attention and feed-forward, each normed first and added to the stream."""
    aux = {"layer_input": x}
    normed = norm(config, weights["attention_norm"], x)
    aux["mixed"] = mixed_heads(
        weights["attention"], config, layer, normed, tables, segment_ids, group_mask
    )
    x = x + attention_output(weights["attention"], aux["mixed"])
    y, moe_aux = feed_forward(
        weights,
        config,
        layer,
        norm(config, weights["mlp_norm"], x),
        segment_ids,
        neuron_mask=neuron_mask,
        rng=rng,
        keep=tuple(name for name in EXPERT_TAPS if name in taps),
        backend=backend,
    )
    aux |= moe_aux | {"layer_output": x + y}
    return aux["layer_output"], {name: aux[name] for name in taps if name in aux}


def layers_are_uniform(config: ModelConfig) -> bool:
    """Whether all layers share shapes and options, so that they can be stacked."""
    return len(set(config.layers)) == 1


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """``params`` with its list of layers as one layer whose leaves are ``[L, ...]``."""
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])
    return {**params, "layers": layers}


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Inverse of ``stack_layers``, to the bit."""
    stacked = params["layers"]
    count = jax.tree.leaves(stacked)[0].shape[0]
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count)]
    return {**params, "layers": layers}


def position_tables(
    config: ModelConfig, shape: tuple[int, ...], segment_ids: Int[Array, "B S"] | None
) -> tuple[Float[Array, "B S H"], Float[Array, "B S H"]]:
    """What ``block`` turns queries and keys by, for tokens of shape [B, S].

    Positions are 0, 1, 2, ... within each segment.
    """
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    if segment_ids is not None:
        starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        positions = positions - jax.lax.cummax(jnp.where(starts, positions, 0), axis=1)
    return rope_tables(config.rope, positions, config.head_dim)


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
    x, kernel = saved
    gradient = gradient.astype(x.dtype)
    rows = (x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]))
    return jnp.dot(gradient, kernel.T), jnp.dot(rows[0].T, rows[1])


_to_vocabulary.defvjp(
    lambda x, kernel: (_to_vocabulary(x, kernel), (x, kernel)), _to_vocabulary_bwd
)


def mixed_heads(
    weights: dict[str, Any],
    config: ModelConfig,
    layer: LayerConfig,
    x: Float[Array, "B S D"],
    tables: tuple[Array, Array],
    segment_ids: Int[Array, "B S"] | None,
    group_mask: Float[Array, " G"] | None = None,
) -> Float[Array, "B S N H"]:
    """Each head's mixture of values; query head n reads key/value head n // (N / G).

    ``group_mask`` multiplies the outputs of each key/value head's query heads: its gradient at
    ones is a group's first-order importance, zeros are a dry run of its removal.
    """
    query, key, value = attention_inputs(weights, config, x, tables)
    mixed = causal_attention(query, key, value, segment_ids, layer.sliding_window)
    if group_mask is not None:
        by_head = jnp.repeat(group_mask, layer.num_heads // layer.num_kv_heads)
        mixed = mixed * by_head[:, None].astype(mixed.dtype)
    return mixed


def attention_inputs(
    weights: dict[str, Any],
    config: ModelConfig,
    x: Float[Array, "B S D"],
    tables: tuple[Array, Array],
) -> tuple[Float[Array, "B S N H"], Float[Array, "B S G H"], Float[Array, "B S G H"]]:
    """Query, key and value of every token, normed, clipped and rotated to their positions."""

    def project(name):
        part = weights[name]
        y = jnp.einsum("bsd,dnh->bsnh", x, part["kernel"].astype(x.dtype))
        return y + part["bias"].astype(x.dtype) if "bias" in part else y

    query, key, value = project("query"), project("key"), project("value")
    if config.qk_norm is not None:
        query = _qk_norm(config, weights["query_norm"]["scale"], query)
        key = _qk_norm(config, weights["key_norm"]["scale"], key)
    if config.clip_qkv is not None:
        query, key, value = (
            jnp.clip(a, -config.clip_qkv, config.clip_qkv) for a in (query, key, value)
        )
    return apply_rope(query, *tables), apply_rope(key, *tables), value


def attention_output(
    weights: dict[str, Any], mixed: Float[Array, "B S N H"]
) -> Float[Array, "B S D"]:
    """What attention adds to the residual stream, from each head's mixture of values."""
    y = jnp.einsum("bsnh,nhd->bsd", mixed, weights["out"]["kernel"].astype(mixed.dtype))
    return y + weights["out"]["bias"].astype(mixed.dtype) if "bias" in weights["out"] else y


def _qk_norm(config: ModelConfig, scale, x):
    if config.qk_norm == "head":
        return rms_norm(x, scale, config.norm_eps)
    flat = rms_norm(x.reshape(*x.shape[:2], -1), scale.reshape(-1), config.norm_eps)
    return flat.reshape(x.shape)


def feed_forward(
    weights: dict[str, Any],
    config: ModelConfig,
    layer: LayerConfig,
    x: Float[Array, "B S D"],
    segment_ids: Int[Array, "B S"] | None = None,
    **options,
) -> tuple[Float[Array, "B S D"], dict[str, Array]]:
    """The MoE or dense half of a block; ``options`` go to ``moe.moe_layer``."""
    if not isinstance(layer.feed_forward, MoeConfig):
        mlp = {name: kernel.astype(x.dtype) for name, kernel in weights["mlp"].items()}
        return (jax.nn.silu(x @ mlp["gate"]) * (x @ mlp["up"])) @ mlp["down"], {}
    valid = None if segment_ids is None else (segment_ids > 0).reshape(-1)
    flat = x.reshape(-1, x.shape[-1])
    y, aux = moe_layer(weights["moe"], layer.feed_forward, config.router, flat, valid, **options)
    return y.reshape(x.shape), aux


def init_params(config: ModelConfig, rng, dtype=jnp.float32) -> dict[str, Any]:
    """Random weights: normal with ``config.init_std`` for matrices, ones and zeros elsewhere."""

    def init(tree, rng):
        if isinstance(tree, Leaf):
            return init_leaf(tree, config, rng, dtype)
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        made = {
            key: init(child, jax.random.fold_in(rng, n)) for n, (key, child) in enumerate(items)
        }
        return made if isinstance(tree, dict) else list(made.values())

    return init(abstract_params(config), rng)


def init_leaf(leaf: Leaf, config: ModelConfig, rng, dtype) -> Array:
    """One freshly initialised parameter."""
    if leaf.init == "normal":
        return (config.init_std * jax.random.normal(rng, leaf.shape)).astype(dtype)
    return (jnp.ones if leaf.init == "ones" else jnp.zeros)(leaf.shape, dtype)


class MoeModel(nn.Module):
    """Linen shell: declares every leaf of the abstract tree, then calls ``forward``.

    Linen names are the leaf paths joined by dots, flat; ``shell_variables`` makes them from the
    nested dict, so that weights move between the two without a copy.
    """

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens, segment_ids=None, taps=()):
        flat = {
            path: self.param(
                path_name(path),
                lambda key, leaf=leaf: init_leaf(leaf, self.config, key, self.dtype),
            )
            for path, leaf in leaves_with_path(abstract_params(self.config))
        }
        return forward(nest(flat), self.config, tokens, segment_ids, taps)


def shell_variables(params: dict[str, Any]) -> dict[str, Any]:
    """The nested dict as variables of ``MoeModel``."""
    return {"params": {path_name(path): leaf for path, leaf in leaves_with_path(params)}}


def nest(flat: dict[tuple, Any]) -> dict[str, Any]:
    """Inverse of ``leaves_with_path``: integer path parts become list positions."""
    tree: dict = {}
    for path, leaf in flat.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf

    def as_lists(node):
        if not isinstance(node, dict):
            return node
        children = {key: as_lists(child) for key, child in node.items()}
        if children and all(isinstance(key, int) for key in children):
            return [children[key] for key in sorted(children)]
        return children

    return as_lists(tree)
