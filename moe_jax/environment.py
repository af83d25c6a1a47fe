"""Where a run happened: versions, machine, device, memory."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import sys

import jax

_PACKAGES = ("moe_jax", "jax", "jaxlib", "flax", "transformers", "numpy")


def environment() -> dict[str, str | int]:
    """Versions of the packages that numbers depend on, and the machine.

    Returns:
        One entry per package, and ``python``, ``platform``, ``device`` (kind of accelerator),
        ``device_count`` and ``backend``.
    """
    found: dict[str, str | int] = {name: _version(name) for name in _PACKAGES}
    devices = jax.devices()
    return found | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": devices[0].device_kind,
        "device_count": len(devices),
        "backend": jax.default_backend(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def peak_memory_mib() -> float:
    """Largest resident set of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
