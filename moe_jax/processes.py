"""Devices and processes: the mesh, what lies where on it, and what all processes do together.

This is the only module that knows how many processes there are. With one, everything that
concerns others is exact and costs nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.config import ModelConfig
from moe_jax.params import AXES, Leaf, abstract_params, leaves_with_path, path_name

MESH_AXES = ("data", "fsdp", "expert", "tensor")
# Axes that the rows of a batch are split over.
BATCH_AXES = ("data", "fsdp")

Number = TypeVar("Number", bool, int, float)
Item = TypeVar("Item")


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


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that weights lie on; None where they lie on one device."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    return None


def on_mesh_of(params: Any) -> AbstractContextManager[Any]:
    """Programs called within it send tokens through experts device by device.

    ``jax.set_mesh`` with the mesh that weights lie on, if they lie on one; see
    ``ops.expert_parallel``.
    """
    mesh = mesh_of(params)
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def leaf_shardings(leaves: Any, mesh: Mesh) -> Any:
    """Where every parameter of an abstract tree, or of a part of one, lies on ``mesh``.

    Raises:
        ValueError: a dimension is not a multiple of its mesh axis; names the leaf, the axes, the
            size, the number of devices and the remainder.
    """
    for path, leaf in leaves_with_path(leaves):
        for letter, size in zip(leaf.axes, leaf.shape, strict=True):
            runs_over, mesh_axis = AXES[letter]
            parts = 1 if mesh_axis is None else mesh.shape[mesh_axis]
            if size % parts:
                raise ValueError(
                    f"{path_name(path)}: axis {letter} ({runs_over}) must be a multiple of mesh "
                    f"axis {mesh_axis!r}, got {size} over {parts} devices, remainder {size % parts}"
                )

    def place(leaf: Leaf) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(AXES[letter].mesh_axis for letter in leaf.axes)))

    return jax.tree.map(place, leaves)


def spec_tree(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """Where every weight of a model lies on ``mesh``, shaped as ``params``; reads none.

    Raises:
        ValueError: see ``leaf_shardings``.
    """
    return leaf_shardings(abstract_params(config), mesh)


def place_batch(batch: Mapping[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """This process's rows of a batch as its part of the global one, split over ``BATCH_AXES``.

    Args:
        mesh: None leaves the batch as it is.

    Raises:
        ValueError: rows that the mesh does not divide.
    """
    if mesh is None:
        return dict(batch)
    rows = len(next(iter(batch.values()))) * jax.process_count()
    check_rows(rows, mesh)
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(array))
        for name, array in batch.items()
    }


def check_rows(rows: int, mesh: Mesh, name: str = "the rows of a batch") -> None:
    """Raises ValueError unless ``rows``, called ``name``, can be split over the mesh."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if rows % parts:
        raise ValueError(
            f"{name} must be a multiple of the mesh's {' x '.join(BATCH_AXES)} = {parts}, "
            f"got {rows}, remainder {rows % parts}"
        )


def initialise(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes of a run; must come before anything that touches a device.

    Arguments that are left out are taken from the environment: ``JAX_COORDINATOR_ADDRESS``,
    ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``, or what a TPU pod, SLURM or Open MPI sets. A
    process that is on its own by all of these starts nothing.

    Args:
        coordinator: ``host:port`` of process 0.
    """
    environment = os.environ
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    if num_processes is None and "JAX_NUM_PROCESSES" in environment:
        num_processes = int(environment["JAX_NUM_PROCESSES"])
    if process_id is None and "JAX_PROCESS_ID" in environment:
        process_id = int(environment["JAX_PROCESS_ID"])
    # A shell inside a SLURM allocation has SLURM_NTASKS but, outside of a step, no others to meet:
    # the number of the step's tasks is what counts.
    launched = [
        int(environment.get(name, 1)) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    ]
    pod = environment.get("TPU_WORKER_HOSTNAMES", "").count(",") + 1
    if num_processes == 1 or (coordinator is None and max(*launched, pod) == 1):
        return
    jax.distributed.initialize(coordinator, num_processes, process_id)


def is_writer() -> bool:
    """Whether this process writes the files that a run has once: numbers, reports, plans."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come to this place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(value: Number) -> Number:
    """Process 0's value, on every process: for what decides which computations follow.

    Processes that disagree on one of them would wait for each other for ever.
    """
    if jax.process_count() == 1:
        return value
    # As bytes, since JAX would cut an int64 or a float64 down to 32 bits.
    sent = np.frombuffer(np.float64(value).tobytes(), np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(sent))
    return type(value)(np.frombuffer(received.tobytes(), np.float64)[0])


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Passes on what devices compute, each item after the next one has been started."""
    rest = iter(items)
    for previous in rest:
        for item in rest:
            yield previous
            previous = item
        yield previous


def gather(tree: Any) -> Any:
    """Host arrays of everything in a tree, whole on every process."""

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)
