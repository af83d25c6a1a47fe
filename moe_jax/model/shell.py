"""Random weights, and the one place that knows Flax: a thin Linen shell over ``forward``."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from moe_jax.config import ModelConfig
from moe_jax.model.block import forward
from moe_jax.params import Leaf, abstract_params, leaves_with_path, nest, path_name


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
    """Linen shell: declares every leaf of the abstract tree by its path, then calls ``forward``.

    ``shell_variables`` makes its variables from the nested dict, without a copy.
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
