"""Packed weights: how they stand for numbers, are cut without a look at these, and are made.

FP8 is a matrix of 8-bit floats beside its scales, one for each block of rows and columns, under the
matrix's name with a suffix: ``_scale_inv`` of blocks of ``weight_block_size`` (``fp8``:
DeepSeek-V3, MiniMax-M2, Qwen3-FP8), ``_scale`` of whole rows, or of blocks
(``compressed-tensors``, ``float-quantized``).

MXFP4 is of stacked experts (``mxfp4``: gpt-oss): ``NAME_blocks`` [E, out, in / 32, 16] holds two
4-bit floats a byte, the lower bits first, and ``NAME_scales`` [E, out, in / 32] an exponent for 32
of them. They are one tensor ``NAME`` [E, in, out].

All are read as bfloat16: the product in float32 is rounded once, as the published dequantisations
do.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import ml_dtypes
import numpy as np

from moe_jax.hf.checks import list_at, object_at
from moe_jax.hf.safetensors_file import DTYPES, NAMES, PACKED, Packed, TensorInfo

# Along the last two axes of a tensor, which entries are left; None: all, in order.
Index = tuple[np.ndarray | None, np.ndarray | None]

_BFLOAT16, _FLOAT32, _FLOAT8 = DTYPES["BF16"], DTYPES["F32"], PACKED["F8_E4M3"]
_LARGEST = float(ml_dtypes.finfo(_FLOAT8).max)
_STRIP = 64  # rows that are worked on at a time, so that what is made of them stays in cache
_GROUP = 32  # numbers that share an exponent
_BLOCKS, _SCALES = "_blocks", "_scales"
_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_NUMBERS = np.concatenate([_MAGNITUDES, -_MAGNITUDES])  # that 4 bits stand for
# What names modules that are not packed, in ``quantization_config``.
MODULE_LISTS = ("modules_to_not_convert", "ignored_layers", "ignore")
_LACKING = {
    "awq": "4-bit integers with zero points",
    "gptq": "integers packed in words of 32 bits, in an order of their own",
    "bitsandbytes": "4-bit code books, or 8-bit integers with outliers",
}


class Scheme(Protocol):
    """A packed form of the last two axes of a tensor.

    Attributes:
        parts: of a model whose matrices are packed by custom, see ``params.PARTS``.
        steps: what along each axis stays together when some of it is left out.
    """

    @property
    def parts(self) -> tuple[str, ...]: ...

    @property
    def steps(self) -> tuple[int, int]: ...

    def names(self, key: str) -> tuple[str, str]:
        """Of a tensor's packed weights and of their scales."""

    def stored(self, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], np.dtype]]:
        """Shapes and dtypes of both; raises ValueError for a tensor that cannot be packed."""

    def unpack(self, weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """The numbers, in bfloat16."""

    def pack(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights and scales of finite numbers; numbers that came out of these come back."""

    def cut(self, part: np.ndarray, index: Index, scales: bool) -> np.ndarray:
        """What ``index`` leaves of the packed weights, or scales, of one matrix."""


@dataclass(frozen=True)
class Floats8:
    """FP8: matrices [out, in].

    Attributes:
        block: rows and columns that share a scale; 0 columns: all.
        suffix: of the name of scales.
    """

    block: tuple[int, int]
    suffix: str
    parts: ClassVar[tuple[str, ...]] = ("attention", "mlp", "shared", "experts")

    @property
    def steps(self) -> tuple[int, int]:
        return self.block[0], self.block[1] or 1

    def names(self, key: str) -> tuple[str, str]:
        return key, key + self.suffix

    def stored(self, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], np.dtype]]:
        if len(shape) != 2:
            raise ValueError(f"8-bit weights are matrices, got {shape}")
        yield shape, _FLOAT8
        rows, columns = self.block[0], self.block[1] or shape[1]
        yield (-(-shape[0] // rows), -(-shape[1] // columns)), _FLOAT32

    def _strips(self, size: int) -> Iterator[tuple[slice, slice]]:
        """Rows that go together, those of one block or several of one row, and their scales'."""
        rows = self.block[0]
        blocks = _STRIP if rows == 1 else 1
        for first in range(0, -(-size // rows), blocks):
            yield slice(first * rows, (first + blocks) * rows), slice(first, first + blocks)

    def _spread(self, scales: np.ndarray, columns: int) -> np.ndarray:
        """The scales of a strip, in float32, for each column or all of them."""
        scales = scales.astype(np.float32)
        return scales.repeat(self.block[1], 1)[:, :columns] if self.block[1] else scales

    def unpack(self, weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
        found = np.empty(weights.shape, _BFLOAT16)
        for strip, blocks in self._strips(len(weights)):
            spread = self._spread(scales[blocks], weights.shape[1])
            product = weights[strip].astype(np.float32) * spread
            # In 16 bits there is a rounding to the scales' own dtype before that to bfloat16.
            found[strip] = product.astype(scales.dtype) if scales.dtype == np.float16 else product
        return found

    def pack(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A block's scale is its largest magnitude over 448, the largest number of 8 bits."""
        (shape, _), (scale_shape, _) = self.stored(numbers.shape)
        weights, scales = np.empty(shape, _FLOAT8), np.empty(scale_shape, np.float32)
        starts = np.arange(0, shape[1], self.block[1] or shape[1])
        for strip, blocks in self._strips(len(numbers)):
            part = numbers[strip].astype(np.float32)
            magnitudes = np.abs(part) if self.block[0] == 1 else np.abs(part).max(0, keepdims=True)
            largest = np.maximum.reduceat(magnitudes, starts, axis=1)
            scales[blocks] = np.where(largest > 0, largest / np.float32(_LARGEST), 1)
            quotients = part / self._spread(scales[blocks], shape[1])
            weights[strip] = np.clip(quotients, -_LARGEST, _LARGEST)  # a scale may be rounded down
        return weights, scales

    def cut(self, part: np.ndarray, index: Index, scales: bool) -> np.ndarray:
        for axis, (kept, step) in enumerate(zip(index, self.block, strict=True)):
            if kept is not None and not scales:
                part = part.take(kept, axis)
            elif kept is not None and step:
                part = part.take(kept[::step] // step, axis)
        return part


@dataclass(frozen=True)
class Floats4:
    """MXFP4: stacked matrices [E, in, out]."""

    parts: ClassVar[tuple[str, ...]] = ("experts",)
    steps: ClassVar[tuple[int, int]] = (_GROUP, 1)

    def names(self, key: str) -> tuple[str, str]:
        return key + _BLOCKS, key + _SCALES

    def stored(self, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], np.dtype]]:
        if len(shape) != 3 or shape[1] % _GROUP:
            raise ValueError(
                f"4-bit weights are stacked matrices whose inputs are multiples of {_GROUP}, got "
                f"{shape}"
            )
        groups = (shape[0], shape[2], shape[1] // _GROUP)
        yield (*groups, _GROUP // 2), PACKED["U8"]
        yield groups, PACKED["U8"]

    def unpack(self, weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
        index = scales[..., None].astype(np.uint16) << 8 | weights
        found = _pairs().take(index).view(_BFLOAT16)
        return found.reshape(*weights.shape[:-2], -1).swapaxes(-1, -2)

    def pack(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A group's exponent is that of its largest magnitude, less 2, or one more.

        With the first, 6 times the power of two is the largest number there is, and what is above
        becomes that; the second reaches it, in coarser steps. The smaller squared error decides.
        """
        (shape, _), (scale_shape, _) = self.stored(numbers.shape)
        weights, scales = np.empty(shape, np.uint8), np.empty(scale_shape, np.uint8)
        for e, matrix in enumerate(numbers):
            for start in range(0, matrix.shape[1], _STRIP):
                strip = slice(start, start + _STRIP)
                groups = matrix[:, strip].T.astype(np.float32).reshape(-1, shape[2], _GROUP)
                weights[e, strip], scales[e, strip] = _packed_groups(groups)
        return weights, scales

    def cut(self, part: np.ndarray, index: Index, scales: bool) -> np.ndarray:
        inputs, outputs = index
        part = part if outputs is None else part.take(outputs, 0)
        return part if inputs is None else part.take(inputs[::_GROUP] // _GROUP, 1)


def _packed_groups(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two numbers a byte [..., 16], and exponents, of numbers [..., 32]."""
    low = np.clip(np.frexp(np.abs(groups).max(-1))[1] - 3, -127, 127)
    found = []
    for exponents in (low, low + 1):
        scaled = np.ldexp(groups, -exponents[..., None])
        codes = np.clip(scaled, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
        found.append((codes, np.square(_NUMBERS[codes] - scaled).sum(-1)))
    (codes, error), (others, other_error) = found
    coarser = 4 * other_error < error  # in units of which one is two of the other
    codes = np.where(coarser[..., None], others, codes)
    return codes[..., ::2] | codes[..., 1::2] << 4, (low + coarser + 127).astype(np.uint8)


@functools.cache
def _pairs() -> np.ndarray:
    """The two numbers, as one of 32 bits, that a byte stands for: [exponents x bytes]."""
    both = np.stack([np.tile(_NUMBERS, 16), np.repeat(_NUMBERS, 16)], -1)
    with np.errstate(invalid="ignore", over="ignore"):  # infinity is reported with a name
        scales = np.ldexp(np.float32(1), np.arange(256) - 127)
        return (scales[:, None, None] * both).astype(_BFLOAT16).view(np.uint32).reshape(-1)


def in_steps(scheme: Scheme, index: Index, shape: tuple[int, ...]) -> bool:
    """Whether what ``index`` leaves of a tensor's last two axes are whole blocks of it."""
    along = zip(index, scheme.steps, shape[-2:], strict=True)
    return all(kept is None or _whole_blocks(kept, step, size) for kept, step, size in along)


def _whole_blocks(kept: np.ndarray, step: int, size: int) -> bool:
    if (kept < 0).any():  # zeros, which no block of the source stands for
        return False
    if step == 1:
        return True
    starts = kept[::step] // step * step
    blocks = [np.arange(start, min(start + step, size)) for start in starts]
    return np.array_equal(np.concatenate(blocks), kept)


def scheme_of(hf: Mapping[str, Any], where: object) -> Scheme | None:
    """How the weights of a checkpoint are packed, by its ``quantization_config``; None: not at all.

    Args:
        hf: parsed ``config.json``.
        where: it is, for messages.

    Raises:
        ValueError: a scheme that is not read, by name.
    """
    found = object_at(hf, "quantization_config")
    method, block = found.get("quant_method"), list_at(found, "weight_block_size", int)
    if not found:
        return None
    if method == "fp8" and len(block) == 2 and min(block) >= 1:
        return Floats8((block[0], block[1]), "_scale_inv")
    if method == "mxfp4":
        return Floats4()
    lacking = _LACKING.get(str(method), f"weight_block_size {block}")
    if method == "compressed-tensors":
        scheme, lacking = _compressed(found)
        if scheme is not None:
            return scheme
    raise ValueError(
        f"{where}: quantised weights are read as 'mxfp4', as 'fp8' with weight_block_size = [rows, "
        "columns] and as 'compressed-tensors' of 8-bit floats with a scale a channel or block, "
        f"alone, got quant_method {method!r} and {lacking}; dequantise the checkpoint first"
    )


def _compressed(found: Mapping[str, Any]) -> tuple[Scheme | None, str]:
    """The one scheme of all groups, or None and what they have instead."""
    groups = object_at(found, "config_groups")
    schemes = {
        name: tuple(
            object_at(object_at(groups, name), "weights").get(fact)
            for fact in ("num_bits", "type", "strategy", "block_structure")
        )
        for name in groups
    }
    lacking = f"format {found.get('format')!r} of {[*schemes.values()] or 'no groups'}"
    bits, kind, strategy, block = next(iter(schemes.values()), (None,) * 4)
    if len({*map(str, schemes.values())}) != 1 or (bits, kind) != (8, "float"):
        return None, lacking
    if strategy == "channel":
        return Floats8((1, 0), "_scale"), ""
    if strategy == "block" and isinstance(block, list) and len(block) == 2:
        return Floats8((int(block[0]), int(block[1])), "_scale"), ""
    return None, lacking


def unpacked(infos: Mapping[str, TensorInfo], scheme: Scheme | None) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint as its model has them: packed ones with their scales in one.

    Args:
        infos: of all tensors, from headers.
        scheme: from ``scheme_of``.

    Raises:
        ValueError: packed weights without scales, or scales whose shape does not follow from the
            blocks; named.
    """
    found = dict(infos)
    if isinstance(scheme, Floats8):
        found = _of_blocks(found, scheme)
    elif isinstance(scheme, Floats4):
        found = _of_groups(found, scheme)
    for key, info in found.items():
        if info.dtype not in NAMES:
            name = next(name for name, dtype in PACKED.items() if dtype == info.dtype)
            raise ValueError(
                f"{info.file}: dtype of {key} must be one of {sorted(DTYPES)}, got {name!r}; "
                "quantised weights must be dequantised first, or have scales that "
                "quantization_config describes"
            )
    return found


def would_be_packed(info: TensorInfo, scheme: Scheme) -> TensorInfo:
    """A tensor whose shape is known, as if it were packed."""
    names, stored = scheme.names(info.key), scheme.stored(info.shape)
    weights, scales = (
        TensorInfo(name, info.file, dtype, shape, 0)
        for name, (shape, dtype) in zip(names, stored, strict=True)
    )
    packed = Packed(weights, scales, scheme)
    return TensorInfo(info.key, info.file, _BFLOAT16, info.shape, 0, packed)


def left_out(hf: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether ``quantization_config`` says of a module, by name, that it is not packed."""
    found = object_at(hf, "quantization_config")
    patterns = [str(entry) for name in MODULE_LISTS for entry in found.get(name) or ()]
    # As transformers has it: the end of a name, or an expression for its beginning.
    ends = tuple(patterns)
    begins = [re.compile(rf"(?:{pattern.removeprefix('re:')})(?=\.|$)") for pattern in patterns]
    return lambda module: module.endswith(ends) or any(b.match(module) for b in begins)


def _of_blocks(infos: dict[str, TensorInfo], scheme: Floats8) -> dict[str, TensorInfo]:
    found = {}
    for key, info in infos.items():
        scales = infos.get(key + scheme.suffix)
        if scales is None:
            if not key.endswith(scheme.suffix):
                found[key] = info
            continue
        is_packed = info.dtype == _FLOAT8 and len(info.shape) == 2 and scales.dtype in NAMES
        wanted = [shape for shape, _ in scheme.stored(info.shape)][1] if is_packed else None
        if scales.shape != wanted:
            raise ValueError(
                f"{scales.file}: {scales.key} must be {wanted} scales of blocks {scheme.block} of "
                f"an 8-bit matrix, got {scales.shape} beside {info.dtype} {info.shape}"
            )
        packed = Packed(info, scales, scheme)
        found[key] = TensorInfo(key, info.file, _BFLOAT16, info.shape, info.start, packed)
    return found


def _of_groups(infos: dict[str, TensorInfo], scheme: Floats4) -> dict[str, TensorInfo]:
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
        packed = Packed(info, scales, scheme)
        found[name] = TensorInfo(name, info.file, _BFLOAT16, whole, info.start, packed)
    return found
