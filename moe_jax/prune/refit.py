"""Refit: what a cut leaves of a layer comes as near to the layer's own output as it can.

With features ``z`` of the cut layer, that is the hidden activations of its experts times their
routing weights, those of its shared expert, and the routing weights of its constants, the layer
adds ``W^T z`` to the residual stream, W its down-projections one below the other. What is solved is

    min_W  sum_t ||y_t - W^T z_t||^2 + ridge tr((W - W_0)^T diag(A) (W - W_0)),   A = sum_t z z^T

with y the layer's output before the cut and W_0 the weights that the cut left, both on the stream
of the model before the cut. All blocks (the shared expert, each expert, the constants) are one
system; it is solved block after block (Gauss-Seidel) on what the others leave, so that no matrix
larger than one expert's second moments is ever made. Routing is that of the cut layer: after a
removal, experts take over what they are chosen for now.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.calibrate.measurement import check_batch
from moe_jax.calibrate.stream import Stream
from moe_jax.config import LayerConfig, ModelConfig, MoeConfig
from moe_jax.metrics import progress_bar
from moe_jax.model import BlockOptions, block, position_tables
from moe_jax.model.block import FEED_FORWARD, embed
from moe_jax.model.moe import gated_hidden, shared_expert, stored_index
from moe_jax.ops.expert_rows import rows_of_groups
from moe_jax.params import Model, abstract_params, expert_leaves, split_experts, stack_experts
from moe_jax.processes import gather, on_mesh_of
from moe_jax.prune.slicing import placed_like
from moe_jax.repair.removal import RIDGE, unit_diagonal
from moe_jax.stored import in_memory, in_turn

# Block after block, three times, is the joint solution to a few thousandths of the error.
SWEEPS = 3
_ROWS = 2048  # of features that are made at a time
_EXACT = jax.lax.Precision.HIGHEST


def refit(
    original: Model,
    cut: Model,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    ridge: float = RIDGE,
    sweeps: int = SWEEPS,
) -> dict[str, Any]:
    """The cut model with new down-projections, constants and novices, by least squares.

    One pass over the text, layer by layer: its residual stream, and in turn each layer's inputs and
    what its output lacks, ``3 x tokens x D`` numbers, are held.

    Args:
        original: the model before the cut.
        cut: what the cut left of it, layer for layer.
        batches: text, ``{"tokens": Int[B, S], "mask": Bool[B, S]}``, all of one shape; a few tens
            of tokens a feature (``W``'s rows) are worth having.
        ridge: pull towards the weights that the cut left, as a share of each feature's second
            moment.
        sweeps: over all blocks of a layer.

    Returns:
        Weights shaped as ``cut.params``; what is not refitted is shared with them.

    Raises:
        ValueError: no text, another number of layers or width, or a ridge or number out of bounds.
    """
    layers = refit_in_turn(original, cut, batches, ridge=ridge, sweeps=sweeps)
    return {**cut.params, "layers": [weights for _, weights in layers]}


def refit_in_turn(
    original: Model,
    cut: Model,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    ridge: float = RIDGE,
    sweeps: int = SWEEPS,
    folder: Path | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The layers of ``refit`` with their numbers, each made when it is asked for.

    Of models on disk (see ``stored``) one layer of each is in memory at a time. With ``folder``,
    the stream lies there as a file: once a layer was taken and the next one is asked for, another
    call goes on with that.
    """
    batches = list(batches)
    _check(original, cut, batches, ridge, sweeps)
    layers = [in_turn(model.params)["layers"] for model in (original, cut)]
    stream, first = _stream(original, batches, folder)
    leaves = abstract_params(cut.config)["layers"]
    with progress_bar(cut.config.num_layers, "refit", "layer") as bar:
        bar.update(first)
        for i in range(first, cut.config.num_layers):
            weights = (layers[0][i], layers[1][i])
            shapes = (original.config.layers[i], cut.config.layers[i])
            found, before = [], stream.before(i)
            with stream.writing(i + 1) as behind:
                for n, batch in enumerate(batches):
                    with on_mesh_of(weights):
                        y, *read = _read(
                            weights, (original.config, cut.config), shapes, before[n], batch["mask"]
                        )
                    valid = np.asarray(batch["mask"]).reshape(-1)
                    found.append([array[valid] for array in gather(read)])
                    behind[n] = gather(y)
                fitted = weights[1]
                if isinstance(shapes[1].feed_forward, MoeConfig):
                    parts = zip(*found, strict=True)
                    text = _Text(*(jnp.asarray(np.concatenate(part)) for part in parts))
                    fitted = _refitted(cut.config, i, fitted, leaves[i], text, ridge, sweeps)
                del weights
                yield i, fitted
                del fitted  # before the next layers are read
            stream.drop(i)
            bar.update()
    stream.remove()


def _stream(
    original: Model, batches: Sequence[Mapping[str, np.ndarray]], folder: Path | None
) -> tuple[Stream, int]:
    """The stream of the text, and the layer that it is before."""
    part = in_memory({"embed": original.params["embed"]})
    shape = (len(batches), *np.shape(batches[0]["tokens"]), original.config.width)
    stream = Stream(shape, part["embed"]["embedding"].dtype, folder)
    first = stream.furthest(original.config.num_layers)
    if first is None:
        first = 0
        with stream.writing(0) as states:
            for n, batch in enumerate(batches):
                states[n] = gather(embed(part, original.config, batch["tokens"]))
    return stream, first


def _check(
    original: Model, cut: Model, batches: Sequence[Mapping[str, np.ndarray]], ridge, sweeps
) -> None:
    sizes = [(m.config.num_layers, m.config.width) for m in (original, cut)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            "a refit needs the layers of the model before the cut, (layers, width) "
            f"{sizes[0]}, got {sizes[1]}"
        )
    if not any(np.asarray(batch["mask"]).any() for batch in batches):
        raise ValueError("a refit needs text, got no batch or nothing but padding")
    for batch in batches:
        check_batch(batch, original.config.vocab_size)
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge must be positive and finite, got {ridge}")
    if sweeps < 1:
        raise ValueError(f"sweeps must be at least 1, got {sweeps}")


class _Text(NamedTuple):
    """Of the tokens of all text: what a layer reads, what its output lacks, how it routes."""

    x: Float[Array, "T D"]
    gap: Float[Array, "T D"]
    ids: Int[Array, "T K"]
    weights: Float[Array, "T K"]


@functools.partial(jax.jit, static_argnames=("configs", "layers"))
def _read(
    weights: tuple[Any, Any],
    configs: tuple[ModelConfig, ModelConfig],
    layers: tuple[LayerConfig, LayerConfig],
    x: Float[Array, "B S D"],
    mask,
):
    """The original's stream behind a layer, and the parts of ``_Text``, of one batch."""
    segment_ids = mask.astype(jnp.int32)
    positions = position_tables(configs[0], mask.shape, segment_ids)
    wanted = BlockOptions(("feed_forward_input", "feed_forward_output"))
    stream, aux = block(weights[0], configs[0], layers[0], x, positions, wanted)
    part = layers[1].feed_forward
    if not isinstance(part, MoeConfig):
        return (stream,)
    read = aux["feed_forward_input"]
    run = FEED_FORWARD[part.kind]
    y, taps = run(weights[1], configs[1], part, read, segment_ids, BlockOptions())
    gap = aux["feed_forward_output"].astype(jnp.float32) - y.astype(jnp.float32)
    width = x.shape[-1]
    return (
        stream,
        read.reshape(-1, width),
        gap.reshape(-1, width),
        taps["expert_ids"],
        taps["weights"],
    )


def _refitted(
    config: ModelConfig,
    i: int,
    weights: dict[str, Any],
    leaves: dict[str, Any],
    text: _Text,
    ridge: float,
    sweeps: int,
) -> dict[str, Any]:
    """One layer's weights after the refit of all its blocks."""
    moe = config.moe(i)
    stacked = {**weights["moe"]}
    stacked["experts"] = stack_experts(stacked["experts"], expert_leaves(config, i))
    fitted = _solve(stacked, moe, text, ridge, sweeps)
    fitted = jax.tree.map(
        lambda new, old: placed_like(new.astype(old.dtype), old), fitted, _linear(stacked)
    )
    new = {**stacked, **{n: fitted[n] for n in ("expert_bias", "novices") if n in fitted}}
    new["experts"] = {**stacked["experts"], "down": fitted["down"]}
    new["experts"] = split_experts(new["experts"], leaves["moe"]["experts"])
    if "shared" in fitted:
        new["shared"] = {**stacked["shared"], "down": fitted["shared"]}
    return {**weights, "moe": new}


def _linear(weights: dict[str, Any]) -> dict[str, Any]:
    """What a layer's output is linear in."""
    parts: dict[str, Any] = {n: weights[n] for n in ("expert_bias", "novices") if n in weights}
    parts["down"] = weights["experts"]["down"]
    if "shared" in weights:
        parts["shared"] = weights["shared"]["down"]
    return parts


@functools.partial(jax.jit, static_argnames=("moe", "sweeps"))
def _solve(weights: dict[str, Any], moe: MoeConfig, text: _Text, ridge, sweeps: int):
    """New ``_linear`` parts of a layer, in float32."""
    x = text.x
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), _linear(weights))
    rows = rows_of_groups(stored_index(moe, text.ids, None), len(moe.expert_ids))
    row_token = jnp.pad(rows.token, (0, _ROWS))
    row_weight = jnp.pad(text.weights.reshape(-1)[rows.order].astype(jnp.float32), (0, _ROWS))
    first = jnp.cumsum(rows.group_sizes) - rows.group_sizes
    all_tokens = jnp.pad(jnp.arange(len(x)), (0, _ROWS))

    def fit_shared(parts, gap):
        def features(at):
            token, inside = _slice(all_tokens, at), at + jnp.arange(_ROWS) < len(x)
            z = shared_expert(weights["shared"], x[token])[1].astype(jnp.float32)
            return token, jnp.where(inside[:, None], z, 0)

        new, gap = _fit(features, (0, len(x)), parts["shared"], start["shared"], gap, ridge)
        return {**parts, "shared": new}, gap

    def fit_expert(e, carry):
        parts, gap = carry
        inner = {name: part[e] for name, part in weights["experts"].items() if name != "down"}

        def features(at):
            token, weight = _slice(row_token, at), _slice(row_weight, at)
            inside = at + jnp.arange(_ROWS) < first[e] + rows.group_sizes[e]
            hidden = gated_hidden(inner, x[token], moe.clamp).astype(jnp.float32)
            if "expert_bias" in parts:
                hidden = jnp.pad(hidden, ((0, 0), (0, 1)), constant_values=1)
            return token, jnp.where(inside[:, None], hidden * weight[:, None], 0)

        def joined(tree):
            bias = [tree["expert_bias"][e][None]] if "expert_bias" in tree else []
            return jnp.concatenate([tree["down"][e], *bias])

        new, gap = _fit(
            features, (first[e], rows.group_sizes[e]), joined(parts), joined(start), gap, ridge
        )
        width = parts["down"].shape[1]
        changed = {"down": parts["down"].at[e].set(new[:width])}
        if "expert_bias" in parts:
            changed["expert_bias"] = parts["expert_bias"].at[e].set(new[width])
        return parts | changed, gap

    def fit_novices(parts, gap):
        chosen = text.ids[:, :, None] == jnp.asarray(moe.novice_ids)
        z = jnp.where(chosen, text.weights[:, :, None], 0).sum(1).astype(jnp.float32)
        z = jnp.pad(z, ((0, _ROWS), (0, 0)))
        new, gap = _fit(
            lambda at: (_slice(all_tokens, at), _slice(z, at)),
            (0, len(x)),
            parts["novices"]["constant"],
            start["novices"]["constant"],
            gap,
            ridge,
        )
        return {**parts, "novices": {"constant": new}}, gap

    def sweep(_, carry):
        if "shared" in weights:
            carry = fit_shared(*carry)
        carry = jax.lax.fori_loop(0, len(moe.expert_ids), fit_expert, carry)
        return fit_novices(*carry) if moe.novice_ids else carry

    return jax.lax.fori_loop(0, sweeps, sweep, (start, text.gap.astype(jnp.float32)))[0]


def _slice(array: Array, at) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, at, _ROWS)


def _fit(
    features: Callable[[Any], tuple[Array, Array]],
    where: tuple[Any, Any],
    now: Float[Array, "N D"],
    start: Float[Array, "N D"],
    gap: Float[Array, "T D"],
    ridge,
) -> tuple[Float[Array, "N D"], Float[Array, "T D"]]:
    """One block's weights that leave the least gap, and the gap that they leave.

    Args:
        features: from a row to the tokens and features ``[_ROWS, N]`` of it and those behind it,
            zeros past the block's rows.
        where: the block's first row, and how many there are.
        now: the weights; ``start`` those that they are pulled to.
        gap: what the layer's output lacks with ``now``.
        ridge: see ``refit``.
    """
    steps = -(-where[1] // _ROWS)

    def add(n, sums):
        gram, pull = sums
        token, z = features(where[0] + n * _ROWS)
        gram = gram + jnp.dot(z.T, z, precision=_EXACT)
        return gram, pull + jnp.dot(z.T, gap[token], precision=_EXACT)

    size = len(now)
    zeros = jnp.zeros((size, size)), jnp.zeros(now.shape)
    gram, pull = jax.lax.fori_loop(0, steps, add, zeros)
    pull = pull + ridge * jnp.diagonal(gram)[:, None] * (start - now)
    scaled, scale = unit_diagonal(gram, ridge)
    safe = jnp.where(scale > 0, scale, jnp.inf)[:, None]
    solved = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(scaled), True), pull / safe)
    change = solved / safe

    def close(n, gap):
        token, z = features(where[0] + n * _ROWS)
        return gap.at[token].add(-jnp.dot(z, change, precision=_EXACT))

    return now + change, jax.lax.fori_loop(0, steps, close, gap)
