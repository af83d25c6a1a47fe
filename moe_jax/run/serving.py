"""What serving engines want of sizes, said before a cut is made.

Kernels for grouped products read weights in tiles. Sizes that are no multiples of them are refused,
padded, or read out of bounds by some engine; the numbers are the strictest of vLLM's and SGLang's
kernels for 16, 8 and 4 bits at the time of writing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_jax.config import ModelConfig
from moe_jax.hf.config_export import needs_modeling_file, shared_multiple
from moe_jax.settings import setting

_TILE, _LEAST_TILE = 128, 64  # neurons of a device's part of an expert: block FP8, and Marlin
_EXPERT_TILE = 16  # experts of a layer: NVFP4


@dataclass(frozen=True)
class ServeConfig:
    """How the result will be served, for warnings about sizes; nothing else follows from it."""

    tensor_parallel: int = setting(0, "Devices that share each expert; 0: not told.", bounds=">= 0")
    expert_parallel: int = setting(
        0, "Devices that share a layer's experts; 0: not told.", bounds=">= 0"
    )


def serving_warnings(config: ModelConfig, serve: ServeConfig) -> list[str]:
    """What an engine would stumble over, with the setting that cures it; empty if nothing is told.

    Args:
        config: of the result.
    """
    if not (serve.tensor_parallel or serve.expert_parallel) or not config.moe_layers:
        return []
    shards, ways = max(serve.tensor_parallel, 1), max(serve.expert_parallel, 1)
    moes = [config.moe(i) for i in config.moe_layers]
    found = []
    if needs_modeling_file(config):
        why = shared_multiple(config) or (
            "Experts that are constants, or that differ in number or width, need the shipped "
            "modelling file and transformers."
        )
        found.append(f"No serving engine reads it as it is. {why}")
    widths = {("Expert", moe.expert_width) for moe in moes}
    widths |= {("Shared expert's", moe.shared.width) for moe in moes if moe.shared}
    for whose, width in sorted(widths):
        part = width / shards
        if width % (_LEAST_TILE * shards):
            found.append(
                f"{whose} width {width} leaves {part:g} neurons on each of {shards} devices, no "
                f"multiple of {_LEAST_TILE}: 4-bit kernels refuse it; set round_to = "
                f"{_LEAST_TILE * shards}."
            )
        elif width % (_TILE * shards):
            found.append(
                f"{whose} width {width} leaves {part:g} neurons on each of {shards} devices, no "
                f"multiple of {_TILE}: FP8 in blocks refuses it; set round_to = {_TILE * shards}."
            )
    step = math.lcm(_EXPERT_TILE, ways)
    for count in sorted({moe.num_experts for moe in moes}):
        if count % ways:
            found.append(
                f"{count} experts do not divide over {ways} devices; set align_experts = {step}."
            )
        elif count % _EXPERT_TILE:
            found.append(
                f"{count} experts are no multiple of {_EXPERT_TILE}, past which NVFP4 kernels "
                f"read; set align_experts = {step}."
            )
    return found


def serving_command(config: ModelConfig, serve: ServeConfig) -> str:
    """What serves a result, started in its folder, on the devices that are told.

    vLLM knows the stock classes of all families; what needs the shipped modelling file is served by
    transformers alone.
    """
    if needs_modeling_file(config):
        return "transformers serve . --trust-remote-code"
    devices = max(serve.tensor_parallel, serve.expert_parallel)
    shared = f" --tensor-parallel-size {devices}" if devices > 1 else ""
    apart = " --enable-expert-parallel" if serve.expert_parallel > 1 else ""
    return f"vllm serve .{shared}{apart}"
