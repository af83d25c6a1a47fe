"""Where weights lie on a mesh: mesh axes, rules from logical to mesh axes, shardings of leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.config import ModelConfig
from moe_jax.params import Leaf, abstract_params, leaves_with_path, path_name

MESH_AXES = ("data", "fsdp", "expert", "tensor")

# Logical axes that are not named here are replicated.
RULES: Mapping[str, str] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "embed": "fsdp",
}


def make_mesh(shape: Mapping[str, int] | None = None) -> Mesh:
    """A mesh with the axes ``MESH_AXES``, all of them automatic.

    Args:
        shape: sizes by axis name; axes left out have size 1, and -1 (once) takes what remains of
            the devices. The first devices are used where there are more than the product of the
            sizes. None puts every device on ``data``.

    Raises:
        ValueError: an unknown axis, a size below 1, or sizes that do not fit the devices.
    """
    sizes = {"data": -1} if shape is None else dict(shape)
    unknown = sorted(set(sizes) - set(MESH_AXES))
    if unknown:
        raise ValueError(f"mesh axes must be among {MESH_AXES}, got {unknown}")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 for name, size in sizes.items() if name not in free):
        raise ValueError(f"mesh sizes must be positive, at most one of them -1, got {sizes}")
    devices = jax.device_count()
    fixed = math.prod(size for name, size in sizes.items() if name not in free)
    if fixed > devices or (free and devices % fixed):
        relation = "divide" if free else "be at most"
        raise ValueError(
            f"the product of the mesh sizes must {relation} the number of devices = {devices}, "
            f"got {fixed} from {sizes}"
        )
    sizes |= dict.fromkeys(free, devices // fixed)
    return jax.make_mesh(
        tuple(sizes.get(name, 1) for name in MESH_AXES),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
    )


def param_sharding(
    mesh: Mesh, axes: tuple[str, ...], shape: tuple[int, ...], name: str = "a parameter"
) -> NamedSharding:
    """The sharding of one leaf by ``RULES``.

    Args:
        mesh: has the axes ``MESH_AXES``.
        axes: the leaf's logical axes.
        shape: its sizes along them.
        name: for the error.

    Raises:
        ValueError: a dimension is not a multiple of its mesh axis.
    """
    spec = [RULES.get(axis) for axis in axes]
    for axis, size, mesh_axis in zip(axes, shape, spec, strict=True):
        if mesh_axis is not None and size % mesh.shape[mesh_axis]:
            parts = mesh.shape[mesh_axis]
            raise ValueError(
                f"{name}: axis {axis!r} must be a multiple of mesh axis {mesh_axis!r}, got "
                f"{size} over {parts} devices, remainder {size % parts}"
            )
    return NamedSharding(mesh, PartitionSpec(*spec))


def spec_tree(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """The sharding of every weight, shaped as ``params``.

    Raises:
        ValueError: see ``check_divisible``.
    """
    check_divisible(config, mesh)
    return jax.tree.map(
        lambda leaf: param_sharding(mesh, leaf.axes, leaf.shape),
        abstract_params(config),
        is_leaf=lambda node: isinstance(node, Leaf),
    )


def check_divisible(config: ModelConfig, mesh: Mesh) -> None:
    """Whether every weight of ``config`` can be laid out on ``mesh``; reads none.

    Raises:
        ValueError: a dimension is not a multiple of its mesh axis; names the leaf, the axes, the
            size, the number of devices and the remainder.
    """
    for path, leaf in leaves_with_path(abstract_params(config)):
        param_sharding(mesh, leaf.axes, leaf.shape, path_name(path))
