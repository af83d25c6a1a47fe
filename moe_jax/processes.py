"""Devices and processes: the mesh, what lies where on it, and what all processes do together.

This is the only module that knows how many processes there are. With one, everything that
concerns others is exact and costs nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import clusters, distributed  # the client that processes share is nowhere public
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.config import ModelConfig
from moe_jax.params import AXES, Leaf, abstract_params, leaves_with_path, path_name

MESH_AXES = ("data", "fsdp", "expert", "tensor")
# Axes that the rows of a batch are split over.
BATCH_AXES = ("data", "fsdp")

# A process that is not heard of for so many seconds is lost, and the others stop.
_LOST_AFTER = 30
_STOP = "moe_jax/stop"

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
    """A batch split over ``BATCH_AXES``.

    Args:
        batch: all its rows, the same on every process, of which each places what its devices hold.
        mesh: None leaves the batch as it is.

    Raises:
        ValueError: rows that the mesh does not divide.
    """
    if mesh is None:
        return dict(batch)
    check_rows(len(next(iter(batch.values()))), mesh)
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return {
        name: jax.make_array_from_callback(array.shape, sharding, np.asarray(array).__getitem__)
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
    process that is on its own by all of these starts nothing. Where one of the processes dies, the
    others end within a minute, with a message.

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
    launched.append(environment.get("TPU_WORKER_HOSTNAMES", "").count(",") + 1)
    if num_processes == 1 or (coordinator is None and max(launched) == 1 and not _on_pod()):
        return
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        heartbeat_timeout_seconds=_LOST_AFTER,
        shutdown_timeout_seconds=_LOST_AFTER,
    )


def _on_pod() -> bool:
    """Whether this is a virtual machine of a TPU slice that has several: its metadata tells."""
    tpu = clusters.GceTpuCluster
    return tpu.is_env_present() and tpu.get_process_count() > 1


def is_writer() -> bool:
    """Whether this process writes the files that a run has once: numbers, reports, plans."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def announce_stop() -> None:
    """Tells all processes that one of them was asked to stop, see ``on_stop``."""
    if (client := distributed.global_state.client) is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is lost
            client.key_value_set(_STOP, "", allow_overwrite=True)


@contextlib.contextmanager
def on_stop(react: Callable[[], None]) -> Iterator[None]:
    """While entered, a thread calls ``react`` once any process has called ``announce_stop``."""
    over = threading.Event()

    def wait() -> None:
        # Asked again and again, since a thread that waits in native code could not be ended.
        while not over.wait(1):
            if stop_announced():
                return react()

    thread = threading.Thread(target=wait, name="stop", daemon=True)
    if distributed.global_state.client is not None:
        thread.start()
    try:
        yield
    finally:
        over.set()


def stop_announced() -> bool:
    """Whether any process has called ``announce_stop``."""
    if (client := distributed.global_state.client) is None:
        return False
    try:
        return client.key_value_try_get(_STOP) is not None
    except jax.errors.JaxRuntimeError:  # no such key
        return False


def stop_together(seconds: int) -> None:
    """Waits, not for longer than this, for the other processes to stop as well.

    Process 0 goes last: without it, the others could not end with a status of their own.
    """
    if (client := distributed.global_state.client) is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # some are lost
            client.wait_at_barrier(_STOP, 1000 * seconds)
        if is_writer():
            time.sleep(1)


def barrier(name: str) -> None:
    """Waits until every process has come to this place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(value: Item) -> Item:
    """Process 0's value, plain JSON, on every process: for what decides which computations follow.

    Processes that disagree on one of them would wait for each other for ever.
    """
    if jax.process_count() == 1:
        return value
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(own))))
    sent = multihost_utils.broadcast_one_to_all(np.resize(own, size))
    return json.loads(np.asarray(sent).tobytes())


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


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
        spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        if spread and not leaf.is_fully_replicated:
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)
