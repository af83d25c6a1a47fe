"""Where every tensor of a source went in an export, and whether what stayed arrived as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.hf import folder as folders
from moe_jax.hf.families import find_family
from moe_jax.hf.further_layers import read_further, renumbered, with_further
from moe_jax.hf.names import Piece, tied_head
from moe_jax.hf.reader import further_tensors, open_hf, read_pieces, stored_leaves
from moe_jax.hf.safetensors_file import TensorInfo, TensorReader
from moe_jax.lineage import Lineage, Origin, gathered
from moe_jax.params import abstract_params, leaves_with_path
from moe_jax.stored import StoredLeaf

_CHUNK = 1 << 26  # bytes that are compared at a time
# What may become of a tensor, in the order in which a report tells it.
OUTCOMES = ("kept", "sliced", "changed", "replaced", "removed", "carried", "left out")


@dataclass(frozen=True)
class Account:
    """What became of a source's tensors.

    Attributes:
        outcomes: tensor -> ``kept`` (all of it, as it was), ``sliced`` (a part, as it was),
            ``changed`` (repaired, refitted, merged, trained or packed again), ``replaced`` (its
            expert became a constant), ``removed``, ``carried`` (beside the model, as it was) or
            ``left out``.
        made: tensors of the export that the source has no counterpart of.
        compared_bytes: read in memory and found equal to the source's.
    """

    outcomes: Mapping[str, str]
    made: tuple[str, ...]
    compared_bytes: int

    def counts(self) -> dict[str, int]:
        """Tensors by outcome; those that were made are counted beside."""
        found = Counter(self.outcomes.values())
        told = {name: found[name] for name in OUTCOMES if found[name]}
        return told | ({"made": len(self.made)} if self.made else {})


def check_export(
    path: str | Path,
    source: str | Path,
    lineage: Lineage,
    params: Mapping[str, Any] | None = None,
    dtype: Any = None,
) -> Account:
    """Reads an export again and holds it, tensor by tensor, against its source and the weights.

    All are read leaf by leaf. What the lineage does not call new must be the source's numbers to
    the bit, once both are read as ``dtype``; the headers must be what ``config.json`` describes,
    and that must be the lineage's architecture.

    Args:
        params: what was exported; None: the source alone is looked at.
        dtype: in which the model was computed; None: as stored.

    Raises:
        ValueError: they differ; the message names the tensor.
    """
    after, before = _read(Path(path), dtype), _read(folders.find_folder(source), dtype)
    for found, wanted in ((after, lineage.config), (before, lineage.source)):
        if found.config != wanted:
            raise ValueError(f"{found.folder}: config.json describes another model than the run's")
    was_cut = after.config != before.config
    if was_cut and further_tensors(folders.read_config_file(after.folder), after.infos):
        after, before = after.longer(dtype), before.longer(dtype)
        lineage = with_further(lineage, before.config)
    exported = dict(leaves_with_path(params)) if params is not None else {}
    keys = {(piece.path, piece.row): piece.key for piece in after.pieces}
    axes = {p: leaf.axes for p, leaf in leaves_with_path(abstract_params(before.config))}
    uses: dict[tuple[tuple, int | None], str] = {}
    made: set[str] = set()
    compared = 0
    for place, leaf in after.leaves.items():
        origins = lineage.origins(place)
        live = exported.get(place)
        live = live if live is None or isinstance(live, StoredLeaf) else np.asarray(live)
        rows = [None] if (place, None) in keys else range(len(origins))
        for row, origin in zip(rows, origins, strict=True):
            info = after.infos[keys[place, row]]
            outcome = "made" if origin is None else _outcome(origin, axes[origin.path])
            sliced = outcome == "sliced"
            for window in _windows(leaf, row, sliced):
                now = leaf.read(window)
                if live is not None and info.packed is None:
                    part = live.read(window) if isinstance(live, StoredLeaf) else live[window]
                    as_read = part.astype(info.dtype).astype(now.dtype)
                    _check_same(as_read, now, after.folder, info.key)
                if origin is None or outcome == "changed":
                    continue
                was = gathered(before.part(origin, window, sliced), axes[origin.path], origin)
                now = now if origin.row is None else now[0]
                if info.packed is not None and sliced and not _same(was, now):
                    outcome = "changed"  # packed again: no whole blocks were left
                else:
                    _check_same(was, now, after.folder, info.key)
                    compared += was.nbytes
            if origin is None:
                made.add(info.key)
            else:
                uses[origin.path, origin.row] = outcome
    outcomes = _of_model(before, lineage, uses)
    if (head := before.tied_head()) is not None:
        embedding = next(piece for piece in before.pieces if piece.path == head.path)
        written = head.key in after.infos
        outcomes[head.key] = outcomes[embedding.key] if written else "left out"
    outcomes |= _beside(before, after, outcomes)
    return Account(outcomes, tuple(sorted(made)), compared)


def _windows(leaf: StoredLeaf, row: int | None, whole: bool) -> Iterator[tuple[slice, ...]]:
    """What is read of a leaf at a time: a row of it, or the whole, or so many bytes."""
    rest = [slice(None)] * (leaf.ndim - 1)
    first, last = (0, leaf.shape[0]) if row is None else (row, row + 1)
    step = last if whole else max(1, _CHUNK * leaf.shape[0] // leaf.nbytes)
    for start in range(first, last, step):
        yield (slice(start, min(start + step, last)), *rest)


class _Read(NamedTuple):
    """A checkpoint, from its headers."""

    folder: Path
    config: ModelConfig
    pieces: list[Piece]
    infos: dict[str, TensorInfo]
    leaves: dict[tuple, StoredLeaf]

    def part(self, origin: Origin, window: tuple[slice, ...], sliced: bool) -> np.ndarray:
        """What a window of a leaf comes from: its row, or as much of the source's, or all of it."""
        leaf = self.leaves[origin.path]
        if origin.row is not None:
            window = (slice(origin.row, origin.row + 1), *window[1:])
        elif sliced:
            window = (slice(None),) * leaf.ndim
        return leaf.read(window)

    def tied_head(self) -> Piece | None:
        """The output head that is stored though it is the embedding, as reading it has checked."""
        row = find_family(self.config.family)
        head = tied_head(row, self.config, row.default_layout)
        return head if head is not None and head.key in self.infos else None

    def longer(self, dtype: Any) -> _Read:
        """With the layers for further tokens behind the last one."""
        further = read_further(self.config, folders.read_config_file(self.folder), self.infos)
        target = None if dtype is None else np.dtype(dtype)
        leaves = stored_leaves(further.config, further.pieces, self.infos, target)
        pieces = [*self.pieces, *further.pieces]
        return self._replace(config=further.config, pieces=pieces, leaves=self.leaves | leaves)


def _read(folder: Path, dtype: Any) -> _Read:
    config, pieces, infos = read_pieces(folder)
    return _Read(folder, config, pieces, infos, dict(leaves_with_path(open_hf(folder, dtype)[1])))


def _check_same(wanted: np.ndarray, found: np.ndarray, folder: Path, key: str) -> None:
    if not _same(wanted, found):
        raise ValueError(
            f"{folder}: {key} must hold the numbers that were to be written, and does not: the "
            "export is damaged"
        )


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    bits = [np.ascontiguousarray(array).view(np.uint8) for array in (one, other)]
    return one.dtype == other.dtype and np.array_equal(bits[0], bits[1])


def _outcome(origin: Origin, axes: tuple[str, ...]) -> str:
    if origin.new:
        return "changed"
    return "sliced" if origin.kept.keys() & {*axes} else "kept"


def _of_model(
    source: _Read, lineage: Lineage, uses: Mapping[tuple[tuple, int | None], str]
) -> dict[str, str]:
    """By tensor of the source's model, what became of its pieces together."""
    constants = {
        (layer.source, layer.rows[e].source)
        for i, layer in enumerate(lineage.layers)
        if layer.rows
        for e in lineage.config.moe(i).novice_ids
    }
    found: dict[str, set[str]] = {}
    for piece in source.pieces:
        use = uses.get((piece.path, piece.row)) or uses.get((piece.path, None))
        found.setdefault(piece.key, set()).add(use or _gone(lineage, piece, constants))
    return {key: _together(outcomes) for key, outcomes in found.items()}


def _gone(lineage: Lineage, piece: Piece, constants: Collection[tuple[int, int]]) -> str:
    """Of a piece that nothing was made of: whether a constant stands in the place of its expert."""
    if piece.row is None or "experts" not in piece.path:
        return "removed"
    moe = lineage.source.moe(piece.path[1])
    bucket = next((part for part in piece.path[2:] if isinstance(part, int)), None)
    owners = moe.expert_ids if bucket is None else moe.buckets[bucket].expert_ids
    return "replaced" if (piece.path[1], owners[piece.row]) in constants else "removed"


def _together(outcomes: set[str]) -> str:
    """Of a tensor whose pieces went different ways."""
    if len(outcomes) == 1:
        return outcomes.pop()
    return "changed" if "changed" in outcomes else "sliced"


def _beside(source: _Read, export: _Read, model: Collection[str]) -> dict[str, str]:
    """Tensors beside the model that was cut: layers for further tokens, what a text model is in."""
    found, reader = {}, TensorReader()
    for given, written in (
        (source.infos, export.infos),
        (folders.tensors_beside(source.folder), folders.tensors_beside(export.folder)),
    ):
        for key in given.keys() - model:
            new_key = renumbered(key, export.config.num_layers - source.config.num_layers)
            found[key] = "carried" if new_key in written else "left out"
            if new_key in written:
                arrays = [reader.read(info) for info in (given[key], written[new_key])]
                _check_same(arrays[0], arrays[1], export.folder, new_key)
                reader.release_pages()
    return found
