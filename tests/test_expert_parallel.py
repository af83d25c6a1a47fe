"""Experts on their own devices against all of them on one: output, gradient, what is sent."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_config

from moe_jax import init_params
from moe_jax.config import LayerConfig, MoeConfig
from moe_jax.model import BlockOptions
from moe_jax.model.moe import moe_layer
from moe_jax.processes import make_mesh, on_mesh_of, spec_tree

UNIFORM = MoeConfig(8, 2, 8)
# Buckets of four and two experts, with constants, beside two novices.
BUCKETS = MoeConfig(8, 3, 8, (2, 5), (8, 4, 0, 8, 4, 0, 8, 8), True)


@pytest.mark.parametrize(
    ("shape", "moe", "tokens"),
    [
        ({"data": 2, "expert": 4}, UNIFORM, 48),
        ({"data": 2, "expert": 2, "tensor": 2}, BUCKETS, 47),  # which data does not divide
    ],
    ids=["uniform", "buckets"],
)
def test_experts_on_their_devices_equal_all_on_one(shape, moe, tokens):
    """To float32 rounding: a token's K outputs and a weight's rows are added in another order."""
    config = tiny_config("olmoe", vocab_size=64, layers=(LayerConfig(2, 2, moe),))
    params = init_params(config, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (tokens, config.width))
    valid = jnp.arange(tokens) % 5 > 0

    @jax.jit
    def step(layer, x):
        def total(layer, x):
            y, _ = moe_layer(layer, moe, config.router, x, valid, BlockOptions())
            return (jnp.sin(y) * jnp.arange(y.shape[1])).sum(), y

        return jax.value_and_grad(total, (0, 1), has_aux=True)(layer, x)

    expected = step(params["layers"][0]["moe"], x)
    mesh = make_mesh(shape)
    layer = jax.device_put(params, spec_tree(config, mesh))["layers"][0]["moe"]
    with on_mesh_of(layer):
        compiled = step.lower(layer, x).compile()
    for ours, theirs in zip(
        jax.tree.leaves(compiled(layer, x)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    # Weights [E, D, F] stay where they are; without the mesh in sight XLA gathers them.
    assert not re.search(r"\[\d+,\d+,\d+\]\S* all-gather\(", compiled.as_text())
