"""What second moments take in memory, known from the configuration, and how that is made to fit."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from moe_jax.config import ModelConfig

_logger = logging.getLogger(__name__)
_MEMINFO = Path("/proc/meminfo")
_ITEM = 4  # bytes of a float32


@dataclass(frozen=True)
class MomentPlan:
    """Which second moments are measured, in how many passes over the text.

    Attributes:
        by_layer: bytes of each layer's second moments.
        passes: the layers that each pass sums up, ascending; empty if there are none.
        bound: bytes that a pass may take on the device; None if what is free is not known.
        experts: layers whose hidden activations are measured.
        attention: layers whose mixed heads are measured.
    """

    by_layer: dict[int, int]
    passes: tuple[tuple[int, ...], ...]
    bound: int | None = None
    experts: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()

    def of_pass(self, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Layers whose hidden activations, and whose mixed heads, pass ``n`` sums up."""
        layers = self.passes[n] if self.passes else ()
        experts, attention = (
            tuple(i for i in layers if i in of) for of in (self.experts, self.attention)
        )
        return experts, attention

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
        each = " to ".join(byte_text(size) for size in sizes[:: max(len(sizes) - 1, 1)])
        number, most = len(self.passes), max(map(len, self.passes), default=0)
        layers = "one layer" if most == 1 else f"{most} layers"
        passes = "one pass over the text"
        if number > 1:
            passes = f"{number} passes over the text for at most {layers} each"
        bound = "" if self.bound is None else f" of at most {byte_text(self.bound)}"
        return (
            f"second moments: {each} a layer, {byte_text(self.total)} for {len(self.by_layer)} "
            f"layers in host memory; {passes}, {byte_text(self.on_device)}{bound} on the device"
        )


def second_moment_bytes(config: ModelConfig) -> dict[int, int]:
    """By layer with experts, bytes of ``hidden_gram`` Float32[E, F + 1, F + 1]: 4 E (F + 1)^2.

    16 experts of 6,400 neurons take 2.6 GB.
    """
    return {
        i: _ITEM * config.moe(i).num_experts * (config.moe(i).expert_width + 1) ** 2
        for i in config.moe_layers
    }


def attention_moment_bytes(config: ModelConfig) -> dict[int, int]:
    """By layer, bytes of ``mixed_gram`` Float32[N H + 1, N H + 1]: 67 MB for 32 heads of 128."""
    return {
        i: _ITEM * (layer.num_heads * config.head_dim + 1) ** 2
        for i, layer in enumerate(config.layers)
    }


def plan_second_moments(
    config: ModelConfig,
    layers: bool | Sequence[int] = True,
    bound: int | None = None,
    copies: int = 1,
    attention: bool = False,
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

    Raises:
        ValueError: layers without experts, a bound below 1, or bytes that do not fit (named, with
            the bound and what to do).
    """
    wanted = _layers_of(layers, config)
    sizes = second_moment_bytes(config)
    mixed = attention_moment_bytes(config) if attention else {}
    by_layer = {
        i: mixed.get(i, 0) + (sizes[i] if i in wanted else 0) for i in sorted({*mixed, *wanted})
    }
    passes, bound = lay_out(by_layer, bound, copies)
    return MomentPlan(by_layer, passes, bound, wanted, tuple(mixed))


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
    host = free_host_bytes()
    need = copies * sum(by_layer.values())
    if host is not None and need > host:
        twice = " (twice while domains are merged)" if copies > 1 else ""
        raise ValueError(
            f"second moments of {len(by_layer)} layers take {byte_text(need)} in host "
            f"memory{twice}, of which {byte_text(host)} are available; use the sequential mode, "
            "which holds one layer's at a time, or measure fewer layers"
        )
    bound = _free_for_a_pass(host, need) if bound is None else bound
    return _passes(by_layer, bound), bound


def log_second_moments(plan: MomentPlan) -> None:
    """One line before the work starts; nothing if there are none."""
    if plan.passes:
        _logger.info("%s", plan)


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


def byte_text(size: int) -> str:
    """Three digits, such as ``430 kB``, ``2.62 GB``."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= 0.9995 * unit:
            decimals = max(0, 2 - int(math.log10(max(size / unit, 1))))
            return f"{size / unit:,.{decimals}f} {name}"
    return f"{size} bytes"


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


def _passes(by_layer: dict[int, int], bound: int | None) -> tuple[tuple[int, ...], ...]:
    """Consecutive layers together, as many as fit."""
    passes: list[list[int]] = []
    held = 0
    for i, size in by_layer.items():
        if bound is not None and 2 * size > bound:
            raise ValueError(
                f"second moments of layer {i} take {byte_text(2 * size)} on the device (their sum "
                f"and a batch's), which must be at most second_moment_bytes = {byte_text(bound)}; "
                "raise it or free memory (by default it is half of what is free)"
            )
        if passes and (bound is None or held + 2 * size <= bound):
            passes[-1].append(i)
            held += 2 * size
        else:
            passes.append([i])
            held = 2 * size
    return tuple(map(tuple, passes))
