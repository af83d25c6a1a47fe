"""Weights on a mesh: same logits as on one device, and errors before any weight is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import forward, init_params
from moe_jax.config import LayerConfig, ModelConfig, MoeConfig, RouterConfig
from moe_jax.params import Leaf, abstract_params, leaves_with_path
from moe_jax.processes import MESH_AXES, leaf_shardings, make_mesh, spec_tree

CONFIG = ModelConfig(
    family="olmoe",
    vocab_size=64,
    width=16,
    head_dim=8,
    layers=(LayerConfig(4, 2, MoeConfig(8, 2, 8)),),
    router=RouterConfig(renormalize=True),
    qk_norm="full",
    init_std=0.3,
)


def test_axes_left_out_have_size_one():
    mesh = make_mesh({"expert": 4})
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "expert": 4, "tensor": 1}


def test_minus_one_takes_the_remaining_devices():
    assert make_mesh({"fsdp": 2, "tensor": -1}).shape["tensor"] == jax.device_count() // 2
    assert make_mesh().shape["data"] == jax.device_count()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"model": 2}, "model"),
        ({"fsdp": 0}, "positive"),
        ({"fsdp": -1, "tensor": -1}, "at most one"),
        ({"fsdp": 64}, "64"),
        ({"fsdp": 3, "tensor": -1}, "divide"),
    ],
)
def test_impossible_mesh(shape, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(shape)


def test_rules():
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    leaves = {
        "gate": Leaf((8, 16, 8), "EDF", "experts"),
        "constant": Leaf((3, 16), "CD", "novices"),
    }
    found = leaf_shardings(leaves, mesh)
    assert found["gate"].spec == PartitionSpec("expert", "fsdp", "tensor")
    assert found["constant"].spec == PartitionSpec(None, "fsdp")


def test_spec_tree_is_shaped_as_the_weights():
    specs = spec_tree(CONFIG, make_mesh({"expert": 2}))
    paths = [path for path, _ in leaves_with_path(abstract_params(CONFIG))]
    assert [path for path, _ in leaves_with_path(specs)] == paths
    assert all(isinstance(leaf, NamedSharding) for leaf in jax.tree.leaves(specs))


def test_dimension_that_does_not_divide_names_leaf_axes_and_numbers():
    mesh = make_mesh({"tensor": 4})
    with pytest.raises(
        ValueError, match=r"layers\.0\.attention\.key\.kernel: axis G \(.*'tensor'.* 2 "
    ):
        spec_tree(CONFIG, mesh)
    leaves = {"bias": Leaf((12,), "E", "experts")}
    with pytest.raises(ValueError, match=r"axis E .*'expert'.*12 over 8 devices, remainder 4"):
        leaf_shardings(leaves, make_mesh({"expert": 8}))


@pytest.mark.parametrize(
    "shape",
    [
        {"data": 2, "expert": 4},
        {"fsdp": 2, "expert": 2, "tensor": 2},
        {"data": 4, "tensor": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("split_tokens", [True, False], ids=["tokens split", "tokens whole"])
def test_sharded_forward_equals_one_device(shape, split_tokens):
    params = init_params(CONFIG, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 16), 1, CONFIG.vocab_size)
    segment_ids = jnp.ones_like(tokens).at[0, 10:].set(0).at[1, 7:].set(2)
    step = jax.jit(lambda params, tokens, ids: forward(params, CONFIG, tokens, ids)[0])
    expected = np.asarray(step(params, tokens, segment_ids))
    mesh = make_mesh(shape)
    sharded = jax.device_put(params, spec_tree(CONFIG, mesh))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    if split_tokens:
        tokens, segment_ids = jax.device_put((tokens, segment_ids), rows)
    got = step(sharded, tokens, segment_ids)
    assert len(got.sharding.device_set) == mesh.size
    np.testing.assert_allclose(got, expected, atol=1e-5)
