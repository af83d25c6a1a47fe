"""The safetensors format: strict headers, memory-mapped tensors, streamed writing.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes,
C-contiguous and little-endian, at the offsets that the header gives. The format is read here
without its library so that damage is found, and named, before any weight is touched, and so that
a shard is written tensor by tensor.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from moe_jax.hf.packed import Scheme

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Read only where scales say what they stand for, see ``hf.packed``.
PACKED: dict[str, np.dtype] = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "U8": np.dtype(np.uint8),
}

_STORED = NAMES | {dtype: name for name, dtype in PACKED.items()}

# What to do about dtypes that are neither of these nor a packed form of weights.
_REMEDIES = {
    "F64": "convert it to 32 bits or fewer",
    "C64": "complex numbers are no weights of a model",
    **dict.fromkeys(
        ("BOOL", "I16", "U16", "I32", "U32", "I64", "U64"),
        "integers are no weights of a model, unless it is quantised and must be dequantised first",
    ),
}

# Bits that are all ones in NaN and infinity, and in nothing else.
_EXPONENT = {
    "F32": (np.uint32, 0x7F800000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
}
_BLOCK = 1 << 18
_WRITTEN_BEHIND = 1 << 26
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        dtype, shape: of what it is read as.
        start: counts from the beginning of the file.
        packed: of what it is made, if it is no tensor there; see ``hf.packed``.
    """

    key: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    packed: Packed | None = None

    @property
    def nbytes(self) -> int:
        """As it is read."""
        return math.prod(self.shape) * self.dtype.itemsize


class Packed(NamedTuple):
    """Packed weights.

    Attributes:
        weights, scales: tensors.
        scheme: says what their arrays, or one entry of both, stand for.
    """

    weights: TensorInfo
    scales: TensorInfo
    scheme: Scheme


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensors of one file, validated; no weight is read.

    Raises:
        ValueError: anything that is not a well-formed file of unquantised floating-point
            tensors; the message names the file and the tensor.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(
                f"{file}: header length must be at most {max(size - 8, 0)} bytes, got {length}; "
                "the file is truncated or not safetensors"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except ValueError as error:
        raise ValueError(f"{file}: header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{file}: header must be a JSON object, got {type(header).__name__}")
    header.pop("__metadata__", None)
    data = 8 + length
    infos = [_tensor(file, key, entry, data) for key, entry in header.items()]
    _check_offsets(file, infos, data, size)
    return {info.key: info for info in infos}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [key for key, _ in pairs]
        repeated = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"{repeated!r} occurs more than once")
    return result


def _tensor(file: Path, key: str, entry: Any, data: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: malformed entry of {key}: {entry!r}") from error
    known = DTYPES | PACKED
    if dtype not in known:
        raise ValueError(
            f"{file}: dtype of {key} must be one of {sorted(DTYPES)}, got {dtype!r}; "
            + _REMEDIES.get(str(dtype), "quantised weights must be dequantised first")
        )
    numbers = (*shape, begin, end)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
        raise ValueError(f"{file}: malformed entry of {key}: {entry!r}")
    info = TensorInfo(key, file, known[dtype], shape, data + begin)
    if end - begin != info.nbytes:
        raise ValueError(
            f"{file}: {key} must span {info.nbytes} bytes ({dtype} {list(shape)}), "
            f"got {end - begin}"
        )
    return info


def _check_offsets(file: Path, infos: list[TensorInfo], data: int, size: int) -> None:
    position = data
    for info in sorted(infos, key=lambda info: (info.start, info.nbytes)):
        if info.start != position:
            what = "overlaps the tensor before it" if info.start < position else "leaves a hole"
            raise ValueError(f"{file}: {info.key} at byte {info.start} {what}")
        position += info.nbytes
        if position > size:
            raise ValueError(
                f"{file}: {info.key} must end within the file, whose size is {size}, "
                f"got {position}; the file is truncated"
            )
    if position != size:
        raise ValueError(f"{file}: {size - position} bytes after the last tensor")


class TensorReader:
    """Memory-mapped tensors of several files, opened on first use."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def read(self, info: TensorInfo, entry: int | None = None) -> np.ndarray:
        """A tensor: a read-only view of the file, or packed weights dequantised.

        Args:
            entry: index into its first axis; None: all of it.
        """
        if info.packed is not None:
            weights, scales, scheme = info.packed
            return scheme.unpack(self.read(weights, entry), self.read(scales, entry))
        if info.nbytes == 0:
            return np.zeros(info.shape, info.dtype)
        count = math.prod(info.shape)
        flat = np.frombuffer(self._mapped(info.file), info.dtype, count, info.start)
        whole = flat.reshape(info.shape)
        return whole if entry is None else whole[entry]

    def prefetch(self, info: TensorInfo) -> None:
        """Asks the operating system to read a tensor's bytes ahead, and returns at once."""
        if info.packed is not None:
            for part in info.packed[:2]:
                self.prefetch(part)
        elif info.nbytes and hasattr(mmap, "MADV_WILLNEED"):
            start = info.start - info.start % mmap.PAGESIZE
            length = info.start + info.nbytes - start
            self._mapped(info.file).madvise(mmap.MADV_WILLNEED, start, length)

    def _mapped(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as stream:
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]

    def release_pages(self) -> None:
        """Lets the operating system drop the pages read so far from this process."""
        for mapped in self._maps.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)


def all_finite(array: np.ndarray) -> bool:
    """Whether a contiguous array in one of ``DTYPES`` holds neither NaN nor infinity."""
    word, exponent = _EXPONENT[NAMES[array.dtype]]
    flat = array.reshape(-1).view(word)
    # Block by block, so that what is made of a block stays in the processor's cache.
    blocks = (flat[i : i + _BLOCK] for i in range(0, flat.size, _BLOCK))
    return not any(((block & exponent) == exponent).any() for block in blocks)


def write_file(
    path: Path,
    tensors: list[tuple[str, tuple[int, ...], np.dtype]],
    arrays: Iterable[np.ndarray] | Iterator[np.ndarray],
) -> None:
    """Writes one file, and syncs it; ``arrays`` yields one array per entry of ``tensors``."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key, shape, dtype in tensors:
        end = position + math.prod(shape) * dtype.itemsize
        header[key] = {
            "dtype": _STORED[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    sent = 0
    with path.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for (key, shape, dtype), array in zip(tensors, arrays, strict=True):
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{key} must be {dtype} {shape}, got {array.dtype} {array.shape}")
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            if hasattr(os, "posix_fadvise") and stream.tell() - sent > _WRITTEN_BEHIND:
                # The disk begins now, rather than when all has been handed over.
                stream.flush()
                sent = stream.tell()
                os.posix_fadvise(stream.fileno(), 0, sent, os.POSIX_FADV_DONTNEED)
        stream.flush()
        os.fsync(stream.fileno())
