"""What second moments take in memory, known from the configuration, and how that is made to fit."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from moe_jax.calibrate.sums import Wanted
from moe_jax.config import ModelConfig
from moe_jax.processes import agree
from moe_jax.statistics_table import STATISTICS, Table, requested_bytes
from moe_jax.text import byte_size

_logger = logging.getLogger(__name__)
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class MomentPlan:
    """Which second moments are measured, in how many passes over the text.

    Attributes:
        by_layer: bytes of each layer's second moments.
        passes: the layers that each pass sums up, ascending; empty if there are none.
        bound: bytes that a pass may take on the device; None if what is free is not known.
        experts: layers whose hidden activations are measured.
        attention: layers whose mixed heads are measured.
        shared: layers whose shared expert's hidden activations are measured.
    """

    by_layer: dict[int, int]
    passes: tuple[tuple[int, ...], ...]
    bound: int | None = None
    experts: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()

    def wanted(self, n: int) -> Wanted:
        """What pass ``n`` sums up; the first one also measures all that is always measured."""
        layers = self.passes[n] if self.passes else ()
        parts = (self.experts, self.attention, self.shared)
        return Wanted(n == 0, *(tuple(i for i in layers if i in of) for of in parts))

    @property
    def total(self) -> int:
        """Bytes of all layers, which the statistics hold in host memory."""
        return sum(self.by_layer.values())

    @property
    def on_device(self) -> int:
        """Bytes of the largest pass on the device: its sums, and as much again for a batch's."""
        return 2 * max((sum(self.by_layer[i] for i in part) for part in self.passes), default=0)

    def __str__(self) -> str:
        """One line: bytes a layer and in all, and how they are laid out."""
        sizes = sorted(set(self.by_layer.values()))
        each = " to ".join(byte_size(size) for size in sizes[:: max(len(sizes) - 1, 1)])
        number, most = len(self.passes), max(map(len, self.passes), default=0)
        layers = "one layer" if most == 1 else f"{most} layers"
        passes = "one pass over the text"
        if number > 1:
            passes = f"{number} passes over the text for at most {layers} each"
        bound = "" if self.bound is None else f" of at most {byte_size(self.bound)}"
        return (
            f"second moments: {each} a layer, {byte_size(self.total)} for {len(self.by_layer)} "
            f"layers in host memory; {passes}, {byte_size(self.on_device)}{bound} on the device"
        )


def plan_second_moments(
    config: ModelConfig,
    layers: bool | Sequence[int] = True,
    bound: int | None = None,
    copies: int = 1,
    attention: bool = False,
    shared: bool = False,
    table: Table = STATISTICS,
) -> MomentPlan:
    """Lays second moments out in as few passes over the text as fit; reads no weights.

    A pass holds those of its layers twice on the device: the sum so far, and that of a batch. When
    it is done they move to host memory, where those of all layers end up. Weights sharded over
    several devices are counted as if each held all of a layer's second moments.

    Args:
        config: of the model to measure.
        layers: True for all layers with experts, False for none, or some by index.
        bound: bytes that a pass may take on the device; None: half of what is free there, or all
            if that is not known. On CPU, whose memory is the host's, what the other layers need is
            set aside first.
        copies: of all second moments that host memory must hold, see ``moment_copies``.
        attention: also those of the mixed heads, of every layer.
        shared: also those of the shared expert of every layer that has one.
        table: what each takes.

    Raises:
        ValueError: layers without experts, a bound below 1, or bytes that do not fit (named, with
            the bound and what to do).
    """
    wanted = _layers_of(layers, config)
    sizes = requested_bytes(config, "second_moments", table=table)
    mixed = requested_bytes(config, "attention_moments", "attention", table) if attention else {}
    own = requested_bytes(config, "shared_moments", table=table) if shared else {}
    of_experts = {i: sizes[i] for i in wanted}
    by_layer = {
        i: sum(part.get(i, 0) for part in (of_experts, mixed, own))
        for i in sorted({*of_experts, *mixed, *own})
    }
    passes, bound = lay_out(by_layer, bound, copies)
    return MomentPlan(by_layer, passes, bound, wanted, tuple(mixed), tuple(own))


def moment_copies(domains: Collection[Any]) -> int:
    """How often host memory holds second moments: twice while those of two domains are merged."""
    return 2 if len(domains) > 1 else 1


def lay_out(
    by_layer: dict[int, int], bound: int | None, copies: int = 1
) -> tuple[tuple[tuple[int, ...], ...], int | None]:
    """Passes, and the bound, for so many bytes by layer; see ``plan_second_moments``."""
    if bound is not None and bound < 1:
        raise ValueError(f"second_moment_bytes must be at least 1, got {bound}")
    if not by_layer:
        return (), bound
    host = agree(free_host_bytes())
    need = copies * sum(by_layer.values())
    if host is not None and need > host:
        twice = " (twice while domains are merged)" if copies > 1 else ""
        raise ValueError(
            f"second moments of {len(by_layer)} layers take {byte_size(need)} in host "
            f"memory{twice}, of which {byte_size(host)} are available; calibration.mode "
            "'layerwise' and sequential cuts hold one layer's at a time"
        )
    bound = agree(_free_for_a_pass(host, need)) if bound is None else bound
    return passes_within(by_layer, bound), bound


def layer_by_layer(mode: str, nbytes: int) -> bool:
    """Whether weights of so many bytes are to be read one layer at a time.

    Args:
        mode: ``calibration.mode``; with ``auto``, those that leave less than a fifth of what is
            free where they would lie are, and the log says so.
    """
    if mode != "auto":
        return mode == "layerwise"
    device = free_device_bytes()
    free = agree(free_host_bytes() if device is None else device)
    if free is None or nbytes <= 0.8 * free:
        return False
    _logger.info(
        "the weights take %s of the %s that are free: layer by layer, from disk",
        byte_size(nbytes),
        byte_size(free),
    )
    return True


def free_host_bytes() -> int | None:
    """Memory that can be had without swapping (Linux's MemAvailable); None if that is not known.

    Limits of a container that its kernel does not tell in ``/proc/meminfo`` are not seen.
    """
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None


def free_device_bytes() -> int | None:
    """Memory left on the device that has least; None where JAX does not tell (a CPU, say)."""
    left = []
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        left.append(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return min(left)


def _layers_of(layers: bool | Sequence[int], config: ModelConfig) -> tuple[int, ...]:
    if isinstance(layers, bool):
        return config.moe_layers if layers else ()
    unknown = sorted(set(layers) - set(config.moe_layers))
    if unknown:
        raise ValueError(f"second_moments must be among {config.moe_layers}, got {unknown}")
    return tuple(sorted(set(layers)))


def _free_for_a_pass(host: int | None, result: int) -> int | None:
    device = free_device_bytes()
    if device is not None:
        return device // 2
    if host is None:
        return None
    # The sums themselves become the result; a batch's come on top.
    return min(host // 2, 2 * (host - result)) if jax.default_backend() == "cpu" else None


def passes_within(by_layer: dict[int, int], bound: int | None) -> tuple[tuple[int, ...], ...]:
    """Consecutive layers together, as many as fit; raises ValueError if one does not."""
    passes: list[list[int]] = []
    held = 0
    for i, size in by_layer.items():
        if bound is not None and 2 * size > bound:
            raise ValueError(
                f"second moments of layer {i} take {byte_size(2 * size)} on the device (their sum "
                f"and a batch's), which must be at most second_moment_bytes = {byte_size(bound)}; "
                "raise it or free memory (by default it is half of what is free)"
            )
        if passes and (bound is None or held + 2 * size <= bound):
            passes[-1].append(i)
            held += 2 * size
        else:
            passes.append([i])
            held = 2 * size
    return tuple(map(tuple, passes))
