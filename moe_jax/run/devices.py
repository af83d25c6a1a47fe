"""What accelerators can do, from their makers' public datasheets, and simulated ones."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from moe_jax.processes import MESH_AXES


class Device(NamedTuple):
    """A kind of accelerator.

    Attributes:
        memory: bytes.
        bandwidth: of its memory, bytes a second.
        flops: most bfloat16 operations a second in dense matrix products.
        torus: dimensions of the network between chips where ``libtpu`` can compile for one.
    """

    memory: float
    bandwidth: float
    flops: float
    torus: int = 0


# NVIDIA's datasheets of the H100 and H200 (SXM, without sparsity), and the pages on the system
# architecture of v5e, v5p and v6e in Google Cloud's documentation (one chip).
DEVICES: Mapping[str, Device] = {
    "h100": Device(80e9, 3.35e12, 989e12),
    "h200": Device(141e9, 4.8e12, 989e12),
    "v5e": Device(16e9, 819e9, 197e12, 2),
    "v5p": Device(95e9, 2765e9, 459e12, 3),
    "v6e": Device(32e9, 1640e9, 918e12, 2),
}


def parse_bytes(text: str) -> float:
    """``80GB`` or ``1.3 TB`` in bytes, of decimal units as ``text.byte_size`` writes them.

    Raises:
        ValueError: it is no such size.
    """
    found = re.fullmatch(r"([0-9.]+) *([kMGT]?)B?", text.strip(), re.IGNORECASE)
    with contextlib.suppress(ValueError):
        if found and (size := float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")):
            return size
    raise ValueError(f"a size must be a number with B, kB, MB, GB or TB, got {text!r}")


def simulated_mesh(sizes: Mapping[str, int], device: str = "") -> tuple[Mesh, str]:
    """A mesh to compile for, and what its devices are.

    Args:
        sizes: by name of ``MESH_AXES``; 1 where left out.
        device: a name in ``DEVICES``: TPUs are those of ``libtpu`` if it is installed. Any other
            mesh, and one that it has no shape for, is of this process's own devices.
    """
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    count = math.prod(shape)
    found, kind = jax.devices(), "simulated CPU devices"
    torus = DEVICES[device].torus if device else 0
    if torus:
        try:
            found, kind = _tpu_devices(device, count, torus), f"{device} as libtpu compiles for it"
        except Exception as error:  # whatever the plugin raises, or that there is none
            kind += f" (no libtpu topology: {str(error).splitlines()[0][:80]})"
    devices = np.array(found[:count]).reshape(shape)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)), kind


def _tpu_devices(device: str, count: int, torus: int) -> list[jax.Device]:
    """Chips of the squarest slice of ``count``."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or it asks a metadata server where it is
    sides = [1] * torus
    while math.prod(sides) < count:
        sides[sides.index(min(sides))] *= 2
    if math.prod(sides) != count:
        raise ValueError(f"no slice of {count} chips")
    shape = "x".join(map(str, sorted(sides)))
    return topologies.get_topology_desc(f"{device}:{shape}", "tpu").devices
