"""Batches of rows by random access, of which each process reads its slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class BatchSource:
    """One process's slice of each batch (a grain data source).

    Attributes:
        rows: anything with ``rows[i]``.
        collate: makes a batch of what these are.
        first_row: where the first batch begins.
        num_batches: in all.
        batch_size: rows over all processes.
        process: index and count of processes.
    """

    rows: Any
    collate: Callable[[Sequence[Any]], Batch]
    first_row: int
    num_batches: int
    batch_size: int
    process: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        check_process(self.process, self.batch_size)

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> Batch:
        size = self.batch_size // self.process[1]
        start = self.first_row + index * self.batch_size + self.process[0] * size
        return self.collate([self.rows[i] for i in range(start, start + size)])

    def dataset(self) -> grain.IterDataset:
        """The batches as a stream, read ahead."""
        # Grain's defaults (16 threads, 500 elements) suit slow storage; rows are slices of local
        # files here, and the cores belong to the training step.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
        return grain.MapDataset.source(self).to_iter_dataset(options)


def check_process(process: tuple[int, int], batch_size: int) -> None:
    """Raises ValueError unless these processes can share a batch."""
    index, count = process
    if count < 1 or not 0 <= index < count:
        raise ValueError(f"process must be an index below the number of processes, got {process}")
    if batch_size < 1 or batch_size % count:
        raise ValueError(
            f"batch_size must be a positive multiple of the {count} processes, got {batch_size}"
        )
