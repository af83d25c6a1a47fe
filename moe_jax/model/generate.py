"""Generation with a cache of keys and values: the prompt once, then one token per step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.config import ModelConfig
from moe_jax.model.attention import LayerCache, next_position
from moe_jax.model.block import block, embed, final_states, head_logits, head_params, hidden_states
from moe_jax.model.options import BlockOptions
from moe_jax.params import unstack_layers
from moe_jax.processes import on_mesh_of
from moe_jax.tokens import check_token_ids

_SHORTEST = 32  # shorter prompts are padded to it
_MORE_TOKENS = 2  # looked at beside as many tokens as a stop string has bytes


class Cache(NamedTuple):
    """What attention has to remember: by layer, see ``attention.LayerCache``; C is the capacity.

    Sliding windows are masked, not cut off.
    """

    keys: list[Array]
    values: list[Array]
    lengths: Array


def prefill(
    params: dict[str, Any],
    config: ModelConfig,
    tokens: Int[Array | np.ndarray, "B S"],
    lengths: Int[Array, " B"],
    capacity: int,
) -> tuple[Float[Array, "B V"], Cache]:
    """Float32 logits of the token after each prompt, and the cache.

    Args:
        tokens: prompts, padded at the end.
        lengths: tokens of each prompt, at least 1.
        capacity: C, tokens that the cache has room for.

    Raises:
        ValueError: the prompts do not fit.
    """
    length = tokens.shape[1]
    if length > capacity:
        raise ValueError(f"capacity must be at least the prompts' {length} tokens, got {capacity}")
    segment_ids = (jnp.arange(length) < lengths[:, None]).astype(jnp.int32)
    x, aux = hidden_states(params, config, tokens, segment_ids, ("key", "value"))
    room = ((0, 0), (0, capacity - length), (0, 0), (0, 0))
    keys, values = (
        [jnp.pad(layer[name], room) for layer in aux["layers"]] for name in ("key", "value")
    )
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, 1)[:, 0]
    return head_logits(head_params(params, config), config, last), Cache(keys, values, lengths)


def decode_step(
    params: dict[str, Any], config: ModelConfig, cache: Cache, tokens: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], Cache]:
    """Float32 logits of the token after one more of every sequence, and the cache with that.

    The logits are those of ``forward`` on the whole sequence, but for one case that its caller
    must see to: a sequence that outgrows a LongRoPE model's ``original_positions`` needs all of
    its keys and values anew (``prefill``). Nor is it checked that the cache has room.
    """
    layers = params["layers"]
    if isinstance(layers, dict):
        layers = unstack_layers(params)["layers"]
    positions = next_position(config, cache.lengths)
    options = BlockOptions(taps=("key", "value"))
    x = embed(params, config, tokens[:, None])
    keys, values = [], []
    for i, (layer, weights) in enumerate(zip(config.layers, layers, strict=True)):
        before = LayerCache(cache.keys[i], cache.values[i], cache.lengths)
        with jax.named_scope(f"layer_{i}"):
            x, aux = block(weights, config, layer, x, positions, options, before)
        keys.append(aux["key"])
        values.append(aux["value"])
    x = final_states(params, config, x)[:, 0]
    logits = head_logits(head_params(params, config), config, x)
    return logits, Cache(keys, values, cache.lengths + 1)


_prefill = jax.jit(prefill, static_argnames=("config", "capacity"))
# The old cache's memory becomes the new one's.
_decode_step = jax.jit(decode_step, static_argnames="config", donate_argnames="cache")


@jax.jit
def _most_likely(logits):
    return logits.argmax(-1).astype(jnp.int32)


@jax.jit
def _draw(logits, temperature, seed, step):
    def draw(row, row_logits):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), step)
        return jax.random.categorical(key, row_logits / temperature)

    return jax.vmap(draw)(jnp.arange(logits.shape[0]), logits).astype(jnp.int32)


def generate(
    params: dict[str, Any],
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    end_tokens: Collection[int] = (),
    finished: Callable[[list[int]], bool] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continues prompts, all in one batch; what a prompt yields does not depend on the others.

    Two programs are compiled for each number of prompts, padded length (a power of two from 32)
    and ``max_new_tokens``; one more where LongRoPE's switch is crossed.

    Args:
        prompts: token ids, at least one each; lengths may differ.
        max_new_tokens: at most so many are added to each.
        end_tokens: ids after which a sequence ends.
        finished: told the new tokens of a sequence after each one, says whether it ends there
            (see ``stop_at``).
        temperature: 0 takes the most likely token; above it, tokens are drawn from
            ``softmax(logits / temperature)``.
        seed: of the draws; a prompt's number and the position follow from it.

    Returns:
        New token ids of each prompt, with the end token if there was one.

    Raises:
        ValueError: no prompt, an empty one, ids outside the vocabulary, or numbers out of range.
    """
    _check(config, prompts, max_new_tokens, temperature)
    starts = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = padded_length(int(starts.max()))
    tokens = np.zeros((len(prompts), padded + max_new_tokens), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    switch = config.rope.switch_length
    capacity = tokens.shape[1]
    made: list[list[int]] = [[] for _ in prompts]
    active = np.ones(len(prompts), bool)
    with on_mesh_of(params):
        logits, cache = _prefill(params, config, tokens[:, :padded], starts, capacity)
    for step in range(max_new_tokens):
        chosen = _draw(logits, temperature, seed, step) if temperature else _most_likely(logits)
        tokens[np.arange(len(prompts)), starts + step] = chosen
        for i in np.flatnonzero(active):
            token = int(tokens[i, starts[i] + step])
            made[i].append(token)
            ends = token in end_tokens or (finished is not None and finished(made[i]))
            active[i] = not ends
        lengths = starts + np.int32(step + 1)
        if not active.any() or step + 1 == max_new_tokens:
            break
        with on_mesh_of(params):
            if switch is not None and (active & (lengths == switch + 1)).any():
                logits, cache = _prefill(params, config, tokens, lengths, capacity)
            else:
                logits, cache = _decode_step(params, config, cache, chosen)
    return made


def padded_length(length: int) -> int:
    """The power of two, 32 or more, to which prompts of ``length`` tokens are padded."""
    return max(_SHORTEST, 1 << (length - 1).bit_length())


def stop_at(tokenizer: Any, strings: Sequence[str]) -> Callable[[list[int]], bool]:
    """A ``finished`` that ends a sequence once its text holds one of ``strings``.

    Only the last tokens are decoded each time: a string of n bytes spans at most n tokens.
    """
    strings = [string for string in strings if string]
    longest = max((len(string.encode()) for string in strings), default=0)

    def finished(tokens: list[int]) -> bool:
        text = tokenizer.decode(tokens[-(longest + _MORE_TOKENS) :], skip_special_tokens=True)
        return any(string in text for string in strings)

    return finished


def _check(config: ModelConfig, prompts, max_new_tokens: int, temperature: float) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompts must hold at least one token each, got an empty one or none")
    check_token_ids(max(max(prompt) for prompt in prompts), config.vocab_size)
    longest = max(len(prompt) for prompt in prompts)
    most = config.max_positions - longest
    if not 1 <= max_new_tokens <= most:
        raise ValueError(
            f"max_new_tokens must be in [1, {most}] with a prompt of {longest} tokens and a "
            f"context of {config.max_positions}, got {max_new_tokens}"
        )
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
