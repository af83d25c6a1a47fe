"""Calibration statistics: mergeable sums of every layer, and their files."""

from __future__ import annotations

import dataclasses
import json
import logging
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.files import replacing_file, write_json
from moe_jax.processes import agree, is_writer
from moe_jax.statistics_table import (
    STATISTICS,
    Table,
    axis_sizes,
    merge_arrays,
    per_token,
    row_name,
    statistic,
)

_logger = logging.getLogger(__name__)
_FORMAT = 5
_ABOUT = "about"
_PARTS = ("layers", "attention")
_STREAM = "stream"
_SLICES = "slices"
# What reading an incomplete or altered archive raises.
_DAMAGE = (
    AttributeError, EOFError, IndexError, KeyError, NotImplementedError, TypeError, ValueError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip

Layers = dict[int, dict[str, np.ndarray]]
# Stratum and share.
SliceKey = tuple[int, int]


@dataclass(frozen=True)
class Stats:
    """What calibration text tells about every expert and key/value group.

    Attributes:
        layers: by index of a layer with experts, arrays named in ``STATISTICS["layers"]``.
        tokens, sequences, batches: how much text, padding left out.
        facts: where it came from: hashes, settings.
        attention: by layer index, those without experts too, arrays over the G key/value heads,
            each with its query heads, named in ``STATISTICS["attention"]``.
        stream: arrays of the residual stream, named in ``STATISTICS["stream"]``.
        slices: disjoint shares of the text by stratum and share, which together are all of it;
            empty where the text was not shared out. The shares of a stratum are alike: dealt out
            of the same domains. Each holds what ``sliced`` leaves of its layers.
    """

    layers: Layers
    tokens: int
    sequences: int
    batches: int
    facts: dict[str, Any] = field(default_factory=dict)
    attention: Layers = field(default_factory=dict)
    stream: dict[str, np.ndarray] = field(default_factory=dict)
    slices: dict[SliceKey, Stats] = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array but those of slices, by the name it has on disk, in one order."""
        return {
            f"{part}/{i}/{name}": array
            for part in _PARTS
            for i, layer in sorted(getattr(self, part).items())
            for name, array in sorted(layer.items())
        } | {f"{_STREAM}/{name}": array for name, array in self.stream.items()}

    def _shapes_apart_from_text(self, table: Table) -> dict[str, tuple[int, ...]]:
        shapes = {name: array.shape for name, array in self.arrays().items()}
        for i, layer in self.layers.items():
            for name in layer:
                if per_token(name, table=table):
                    key = f"layers/{i}/{name}"
                    shapes[key] = shapes[key][1:]
        return shapes

    def unreached(self) -> list[str]:
        """Names of the experts that no token was routed to, such as ``layer 3 expert 17``."""
        return [
            f"layer {i} expert {e}"
            for i, layer in sorted(self.layers.items())
            for e in np.flatnonzero(layer.get("count", np.ones(1)) == 0)
        ]

    def merge(self, other: Stats, consume: bool = False, table: Table = STATISTICS) -> Stats:
        """Statistics of both texts together, as if read in one pass (up to rounding).

        With ``consume``, both give up each layer's arrays as it is merged, and hold no layers
        afterwards: memory for two, not three, of statistics with second moments is needed.

        Raises:
            ValueError: they belong to models of different shape or to different settings.
        """
        mine, theirs = (stats._shapes_apart_from_text(table) for stats in (self, other))
        if mine != theirs:
            different = sorted(set(mine.items()) ^ set(theirs.items()))
            raise ValueError(f"statistics do not fit together; first difference: {different[0]}")
        layers: Layers = {}
        for i in list(self.layers):
            layers[i] = merge_arrays(self.layers[i], other.layers[i], table=table)
            if consume:
                del self.layers[i], other.layers[i]
        return Stats(
            layers,
            self.tokens + other.tokens,
            self.sequences + other.sequences,
            self.batches + other.batches,
            {"merged": [self.facts, other.facts]},
            {
                i: merge_arrays(arrays, other.attention[i], "attention", table=table)
                for i, arrays in self.attention.items()
            },
            merge_arrays(self.stream, other.stream, _STREAM, table=table),
            _merge_slices(self.slices, other.slices, table),
        )

    def check_model(self, config: ModelConfig, table: Table = STATISTICS) -> None:
        """Raises ValueError naming the layer and array if these are of a model of other shape."""
        for part, layers in (("layers", config.moe_layers), ("attention", config.layers)):
            expected = list(layers) if part == "layers" else list(range(len(layers)))
            found = getattr(self, part)
            if sorted(found) != expected:
                raise ValueError(
                    f"statistics are of another model: {part} must be {expected}, "
                    f"got {sorted(found)}"
                )
            for i, arrays in found.items():
                rows, sizes = list(table[part]), axis_sizes(config, i) | {"T": self.tokens}
                for name in sorted(arrays, key=lambda name: rows.index(row_name(name))):
                    shape = statistic(name, part, table).shape(sizes)
                    if arrays[name].shape != shape:
                        raise ValueError(
                            f"statistics are of another model: {name} of layer {i} must be "
                            f"{list(shape)}, got {list(arrays[name].shape)}"
                        )

    def without_requested(self, table: Table = STATISTICS) -> Stats:
        """Without the large arrays of layers that were measured on request alone."""
        light = {
            i: {n: array for n, array in layer.items() if not statistic(n, table=table).request}
            for i, layer in self.layers.items()
        }
        return dataclasses.replace(self, layers=light)

    def save(self, path: str | Path) -> None:
        """Writes ``path.json``, for reading, and then ``path.npz``, which holds all of it.

        Each appears whole or not at all; statistics are there once the second one is.

        Raises:
            OSError: a file cannot be written, for lack of space say.
        """
        about = {
            "format": _FORMAT,
            "tokens": self.tokens,
            "sequences": self.sequences,
            "batches": self.batches,
            "unreached": self.unreached(),
            "facts": self.facts,
            _SLICES: [[*key, s.tokens, s.sequences, s.batches] for key, s in self.slices.items()],
        }
        write_json(statistics_file(path, ".json"), about)
        arrays = {**self.arrays(), _ABOUT: np.frombuffer(json.dumps(about).encode(), np.uint8)}
        for i in self.layers if self.slices else ():
            for name in next(iter(self.slices.values())).layers[i]:
                # Side by side: a file of few large arrays is smaller and read faster.
                parts = [part.layers[i][name] for part in self.slices.values()]
                arrays[f"{_SLICES}/{i}/{name}"] = np.stack(parts)
        with (
            replacing_file(statistics_file(path, ".npz")) as temporary,
            open(temporary, "wb") as file,
        ):
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> Stats:
        """Reads what ``save`` wrote, from ``path.npz``.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a damaged file, another format, or an array with NaN (named).
        """
        file = statistics_file(path, ".npz")
        try:
            with np.load(file, allow_pickle=False) as arrays:
                about = json.loads(arrays[_ABOUT].tobytes())
                if about["format"] != _FORMAT:
                    raise ValueError(f"format must be {_FORMAT}, got {about['format']!r}")
                found = {key: arrays[key] for key in arrays.files if key != _ABOUT}
            stacked = _by_layer(_take(found, f"{_SLICES}/"))
            slices: dict[SliceKey, Stats] = {}
            for n, (stratum, share, *counts) in enumerate(about[_SLICES]):
                own = {
                    i: {name: sums[n] for name, sums in layer.items()}
                    for i, layer in stacked.items()
                }
                slices[stratum, share] = cls(own, *counts)
            layers, attention = (_by_layer(_take(found, f"{part}/")) for part in _PARTS)
            stats = cls(
                layers,
                about["tokens"],
                about["sequences"],
                about["batches"],
                dict(about["facts"]),
                attention,
                _take(found, f"{_STREAM}/"),
                slices,
            )
            if found:
                raise ValueError(f"unknown array {next(iter(found))!r}")
        except _DAMAGE as error:
            raise ValueError(f"{file} holds no usable statistics: {error}") from error
        stats.check_finite()
        return stats

    @classmethod
    def load_if_same(cls, path: str | Path, digest: str) -> Stats | None:
        """What ``save`` wrote with this ``digest`` among its facts; None if there is no such thing.

        Damaged files are logged and count as absent. Of many processes, one decides.
        """
        stats = cls._same(path, digest) if is_writer() else None
        if not agree(stats is not None):
            return None
        return stats or cls.load(path)

    @classmethod
    def _same(cls, path: str | Path, digest: str) -> Stats | None:
        if not statistics_file(path, ".npz").exists():
            return None
        try:
            stats = cls.load(path)
        except (OSError, ValueError) as error:
            _logger.warning("calibrating again: %s", error)
            return None
        return stats if stats.facts.get("digest") == digest else None

    @staticmethod
    def remove(path: str | Path) -> None:
        """Deletes what ``save`` wrote, if it is there."""
        for suffix in (".npz", ".json"):
            statistics_file(path, suffix).unlink(missing_ok=True)

    def check_finite(self) -> None:
        """Raises ValueError naming the first array that holds a NaN or an infinity."""
        for slice_ in self.slices.values():
            slice_.check_finite()
        for key, array in self.arrays().items():
            if not np.isfinite(array).all():
                part, _, name = key.partition("/")
                where = "statistics"
                if part in _PARTS:
                    i, _, name = name.partition("/")
                    where += f" of layer {i}"
                prefix = "" if part == "layers" else f"{part} "
                raise ValueError(f"{where}: {prefix}{name} holds a NaN or infinity")


def joined(parts: Sequence[Stats]) -> Stats:
    """Statistics of parts of a model, of the same text, as those of the model.

    Parts without text of their own are arrays alone; ``facts["domains"]`` holds the routing of all
    layers.
    """
    first = next((part for part in parts if part.tokens), parts[0])
    domains: dict[str, Any] = {}
    layers: Layers = {}
    attention: Layers = {}
    stream: dict[str, np.ndarray] = {}
    slices: dict[SliceKey, Stats] = {}
    for part in parts:
        for target, source in ((layers, part.layers), (attention, part.attention)):
            for i, arrays in source.items():
                target[i] = target.get(i, {}) | arrays
        stream |= part.stream
        for key, own in part.slices.items():
            slices[key] = joined([slices[key], own]) if key in slices else own
        for name, facts in part.facts.get("domains", {}).items():
            told = domains.setdefault(name, {**facts, "count": {}})
            told["count"] |= facts["count"]
    facts = {"domains": domains} if domains else {}
    return Stats(
        dict(sorted(layers.items())), first.tokens, first.sequences, first.batches, facts,
        dict(sorted(attention.items())), stream, slices,
    )  # fmt: skip


def _take(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Removes those whose names begin with ``prefix``; returns them by the rest of the name."""
    names = [name for name in arrays if name.startswith(prefix)]
    return {name.removeprefix(prefix): arrays.pop(name) for name in names}


def _by_layer(arrays: Mapping[str, np.ndarray]) -> Layers:
    layers: Layers = {}
    for key, array in arrays.items():
        i, name = key.split("/", 1)
        layers.setdefault(int(i), {})[name] = array
    return layers


def _merge_slices(
    a: Mapping[SliceKey, Stats], b: Mapping[SliceKey, Stats], table: Table
) -> dict[SliceKey, Stats]:
    """Shares of both texts; none if one was not shared out: they would not be all of the text."""
    if not a or not b:
        return {}
    merged = dict(a)
    for key, part in b.items():
        both = merged[key].merge(part, table=table) if key in merged else part
        merged[key] = dataclasses.replace(both, facts={})
    return dict(sorted(merged.items()))


def statistics_file(path: str | Path, suffix: str) -> Path:
    """``path`` with a suffix of ours; dots in its name are no suffixes."""
    path = Path(path).expanduser()
    name = path.name.removesuffix(".npz").removesuffix(".json")
    return path.with_name(name + suffix)
