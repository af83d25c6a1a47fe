"""Packed weights, dequantised while they are read: FP8 with scales of blocks, and MXFP4.

FP8: a matrix in 8 bits stands beside its scales, as float32 numbers for blocks of
``weight_block_size`` rows and columns under the matrix's name with ``_scale_inv`` (DeepSeek-V3,
MiniMax-M2, Qwen3-FP8). The product in float32 is rounded once, as the published dequantisation
does.

MXFP4: of stacked experts, ``NAME_blocks`` [E, out, in / 32, 16] holds two 4-bit numbers a byte, the
lower bits first, and ``NAME_scales`` [E, out, in / 32] an exponent for 32 of them (gpt-oss). They
are one tensor ``NAME`` [E, in, out].

Both are read as bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.hf.checks import list_at, object_at
from moe_jax.hf.safetensors_file import DTYPES, NAMES, PACKED, Packed, TensorInfo

_SUFFIX = "_scale_inv"
_BLOCKS, _SCALES = "_blocks", "_scales"
_BFLOAT16 = DTYPES["BF16"]
_GROUP = 32  # numbers that share an exponent
_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def unpacked(
    infos: Mapping[str, TensorInfo], hf: Mapping[str, Any], folder: Path
) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint as its model has them: packed ones with their scales in one.

    Args:
        infos: of all tensors, from headers.
        hf: parsed ``config.json``, whose ``quantization_config`` names the scheme.
        folder: for messages.

    Raises:
        ValueError: a scheme that is not read, packed weights without scales, or scales whose shape
            does not follow from the blocks; named.
    """
    found = dict(infos)
    if scheme := object_at(hf, "quantization_config"):
        method, block = scheme.get("quant_method"), list_at(scheme, "weight_block_size", int)
        if method == "fp8" and len(block) == 2 and min(block) >= 1:
            found = _of_blocks(found, (block[0], block[1]))
        elif method == "mxfp4":
            found = _of_groups(found)
        else:
            raise ValueError(
                f"{folder}: quantised weights are read as 'mxfp4', or as 'fp8' with "
                f"weight_block_size = [rows, columns], alone, got quant_method {method!r} and "
                f"weight_block_size {block}; dequantise the checkpoint first"
            )
    for key, info in found.items():
        if info.dtype not in NAMES:
            name = next(name for name, dtype in PACKED.items() if dtype == info.dtype)
            raise ValueError(
                f"{info.file}: dtype of {key} must be one of {sorted(DTYPES)}, got {name!r}; "
                "quantised weights must be dequantised first, or have scales that "
                "quantization_config describes"
            )
    return found


def _of_blocks(infos: dict[str, TensorInfo], block: tuple[int, int]) -> dict[str, TensorInfo]:
    unpack = functools.partial(_from_blocks, block=block)
    found = {}
    for key, info in infos.items():
        scales = infos.get(key + _SUFFIX)
        if scales is None:
            if not key.endswith(_SUFFIX):
                found[key] = info
            continue
        wanted = tuple(-(-size // step) for size, step in zip(info.shape, block, strict=False))
        is_packed = info.dtype == PACKED["F8_E4M3"] and len(info.shape) == 2
        if not is_packed or scales.shape != wanted:
            raise ValueError(
                f"{scales.file}: {scales.key} must be {wanted} scales of blocks {block} of an "
                f"8-bit matrix, got {scales.shape} beside {info.dtype} {info.shape}"
            )
        packed = Packed(info, scales, unpack)
        found[key] = TensorInfo(key, info.file, _BFLOAT16, info.shape, info.start, packed)
    return found


def _of_groups(infos: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    found = dict(infos)
    for key, info in infos.items():
        name = key.removesuffix(_BLOCKS)
        scales = infos.get(name + _SCALES)
        if name == key or scales is None:
            continue
        *shape, size = info.shape
        is_packed = {info.dtype, scales.dtype} == {PACKED["U8"]} and len(shape) == 3
        if not is_packed or 2 * size != _GROUP or list(scales.shape) != shape or name in infos:
            raise ValueError(
                f"{info.file}: {key} and {scales.key} alone must be bytes [E, out, in / {_GROUP}, "
                f"{_GROUP // 2}] and [E, out, in / {_GROUP}], got {info.dtype} {info.shape} and "
                f"{scales.dtype} {scales.shape}"
            )
        del found[key], found[scales.key]
        whole = (shape[0], shape[2] * _GROUP, shape[1])
        packed = Packed(info, scales, _from_groups)
        found[name] = TensorInfo(name, info.file, _BFLOAT16, whole, info.start, packed)
    return found


def _from_blocks(packed: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """The weights of an 8-bit matrix [out, in] with the scales of its blocks."""
    found = np.empty(packed.shape, _BFLOAT16)
    rows, columns = block
    for i, of_strip in enumerate(scales.astype(np.float32)):
        strip = slice(i * rows, (i + 1) * rows)
        by_column = np.repeat(of_strip, columns)[: packed.shape[1]]
        found[strip] = packed[strip].astype(np.float32) * by_column
    return found


def _from_groups(blocks: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """The weights [..., in, out] of 4-bit numbers [..., out, in / 32, 16] and their exponents."""
    index = exponents[..., None].astype(np.uint16) << 8 | blocks
    found = _pairs().take(index).view(_BFLOAT16)
    return found.reshape(*blocks.shape[:-2], -1).swapaxes(-1, -2)


@functools.cache
def _pairs() -> np.ndarray:
    """The two numbers, as one of 32 bits, that a byte stands for: [exponents x bytes]."""
    numbers = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
    both = np.stack([np.tile(numbers, 16), np.repeat(numbers, 16)], -1)
    with np.errstate(invalid="ignore", over="ignore"):  # infinity is reported with a name
        scales = np.ldexp(np.float32(1), np.arange(256) - 127)
        return (scales[:, None, None] * both).astype(_BFLOAT16).view(np.uint32).reshape(-1)
