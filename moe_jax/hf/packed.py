"""Packed weights: FP8 with a scale for each block of a matrix, dequantised while they are read.

A matrix in 8 bits stands beside its scales, as float32 numbers for blocks of ``weight_block_size``
rows and columns under the matrix's name with ``_scale_inv`` (DeepSeek-V3, MiniMax-M2, Qwen3-FP8).
It is read as bfloat16: the product in float32, rounded once, as the published dequantisation does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.hf.checks import list_at, object_at
from moe_jax.hf.safetensors_file import DTYPES, NAMES, PACKED, TensorInfo

_SUFFIX = "_scale_inv"


def unpacked(
    infos: Mapping[str, TensorInfo], hf: Mapping[str, Any], folder: Path
) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint as its model has them: packed ones with their scales in one.

    Args:
        infos: of all tensors, from headers.
        hf: parsed ``config.json``, whose ``quantization_config`` names the scheme.
        folder: for messages.

    Raises:
        ValueError: a scheme that is not read, 8-bit weights without scales, or scales whose shape
            does not follow from the blocks; named.
    """
    scheme = object_at(hf, "quantization_config")
    block = _block(scheme, folder) if scheme else None
    found = {}
    for key, info in infos.items():
        scale = infos.get(key + _SUFFIX)
        if block is not None and scale is not None:
            found[key] = _with_scales(info, scale, block)
        elif block is None or not key.endswith(_SUFFIX):
            found[key] = info
    for key, info in found.items():
        if info.dtype not in NAMES:
            name = next(name for name, dtype in PACKED.items() if dtype == info.dtype)
            raise ValueError(
                f"{info.file}: dtype of {key} must be one of {sorted(DTYPES)}, got {name!r}; "
                "quantised weights must be dequantised first, or have scales that "
                "quantization_config describes"
            )
    return found


def _block(scheme: Mapping[str, Any], folder: Path) -> tuple[int, int]:
    method, block = scheme.get("quant_method"), list_at(scheme, "weight_block_size", int)
    if method != "fp8" or len(block) != 2 or min(block) < 1:
        raise ValueError(
            f"{folder}: quantised weights are read as 'fp8' with weight_block_size = [rows, "
            f"columns] alone, got quant_method {method!r} and weight_block_size {block}; "
            "dequantise the checkpoint first"
        )
    return block[0], block[1]


def _with_scales(info: TensorInfo, scale: TensorInfo, block: tuple[int, int]) -> TensorInfo:
    wanted = tuple(-(-size // step) for size, step in zip(info.shape, block, strict=False))
    if info.dtype not in PACKED.values() or len(info.shape) != 2 or scale.shape != wanted:
        raise ValueError(
            f"{scale.file}: {scale.key} must be {wanted} scales of blocks {block} of an 8-bit "
            f"matrix, got {scale.shape} beside {info.dtype} {info.shape}"
        )
    return dataclasses.replace(
        info, dtype=DTYPES["BF16"], stored=info.dtype, scale=scale, block=block
    )
