"""The files of weights of an export: planned from shapes, written tensor by tensor."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moe_jax.hf import folder as folders
from moe_jax.hf.names import Piece, without_bucket
from moe_jax.hf.packed import Scheme
from moe_jax.hf.safetensors_file import TensorReader, all_finite, write_file
from moe_jax.params import path_name
from moe_jax.processes import gather

Item = TypeVar("Item")


@dataclass(frozen=True)
class Tensor:
    """A tensor of an export.

    Attributes:
        pieces: of the leaves that it is made of.
        copied: reads it from the source instead.
        scheme: packs what the pieces make: two tensors, its weights and its scales, are written.
    """

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[Piece, ...] = ()
    copied: Callable[[TensorReader], np.ndarray] | None = None
    scheme: Scheme | None = None

    @property
    def header(self) -> list[tuple[str, tuple[int, ...], np.dtype]]:
        """Names, shapes and dtypes of what is written; scales, which are wider, first."""
        if self.scheme is None:
            return [(self.key, self.shape, self.dtype)]
        stored = zip(self.scheme.names(self.key), self.scheme.stored(self.shape), strict=True)
        return [(name, *facts) for name, facts in stored][::-1]

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in self.header)


@dataclass
class PackingError:
    """What packing lost, as tensors are packed: squared errors and numbers, summed by kind."""

    sums: dict[str, np.ndarray] = field(default_factory=lambda: defaultdict(lambda: np.zeros(2)))
    worst: tuple[float, str] = (0.0, "")

    def add(self, tensor: Tensor, numbers: np.ndarray, packed: Sequence[np.ndarray]) -> None:
        assert tensor.scheme is not None  # nothing else was packed
        sums = np.zeros(2)
        stacked = numbers.ndim > 2  # one matrix at a time
        for exact, *parts in (
            zip(numbers, *packed, strict=True) if stacked else [(numbers, *packed)]
        ):
            found = tensor.scheme.unpack(*parts)
            for row, other in zip(exact, found, strict=True):
                wanted = row.astype(np.float64)
                sums += [np.square(other - wanted).sum(), np.square(wanted).sum()]
        path = without_bucket(tensor.pieces[0].path)
        kind = path_name(path[2:] if path[0] == "layers" else path)
        self.sums[kind] += sums
        self.worst = max(self.worst, (_relative(sums), tensor.key))

    def facts(self) -> dict[str, float]:
        """Relative errors by kind of leaf: Frobenius norms, of all tensors of the kind."""
        return {kind: _relative(sums) for kind, sums in self.sums.items()}


def _relative(sums: np.ndarray) -> float:
    return float(np.sqrt(sums[0] / sums[1])) if sums[1] else 0.0


def plan_shards(tensors: list[Tensor], max_bytes: float) -> list[list[Tensor]]:
    """Consecutive tensors of at most ``max_bytes`` together, or a single larger one.

    What would leave those behind it unaligned comes last within a file, wider dtypes first.
    """
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return [sorted(shard, key=_behind) for shard in shards]


def _behind(tensor: Tensor) -> tuple[bool, int]:
    return tensor.nbytes % 4 != 0, -max(dtype.itemsize for *_, dtype in tensor.header)


def write_shards(
    folder: Path, shards: list[list[Tensor]], leaves: Mapping[tuple, Any], error: PackingError
) -> None:
    """Writes the files, and the index that many have."""
    count = len(shards)
    weight_map = {}
    arrays = chain.from_iterable(made_ahead(assembled(shards, leaves, error)))
    for i, shard in enumerate(shards):
        name = folders.SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        header = [entry for tensor in shard for entry in tensor.header]
        write_file(folder / name, header, islice(arrays, len(header)))
        weight_map.update({key: name for key, *_ in header})
    if count > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / folders.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def assembled(
    shards: list[list[Tensor]], leaves: Mapping[tuple, Any], error: PackingError
) -> Iterator[Sequence[np.ndarray]]:
    """What is written of each tensor, one by one.

    A leaf is fetched to the host once, and kept until its last use.
    """
    tensors = [tensor for shard in shards for tensor in shard]
    uses = Counter(piece.path for tensor in tensors for piece in tensor.pieces)
    host: dict[tuple, np.ndarray] = {}
    reader = TensorReader()
    for tensor in tensors:
        if tensor.copied is not None:
            yield [tensor.copied(reader)]
            reader.release_pages()
            continue
        array = np.zeros(tensor.shape, tensor.dtype)  # of novices no piece may be left
        for piece in tensor.pieces:
            if piece.path not in host:
                host[piece.path] = gather(leaves[piece.path])
            piece.write(host[piece.path], array)
            uses[piece.path] -= 1
            if not uses[piece.path]:
                del host[piece.path]
        if not all_finite(array):
            raise ValueError(f"weights must be finite, got NaN or infinity in {tensor.key}")
        if tensor.scheme is None:
            yield [array]
            continue
        packed = tensor.scheme.pack(array)
        error.add(tensor, array, packed)
        del array  # before the next one is made
        yield packed[::-1]


def made_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Passes items on, of which each is made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
