"""Calibration of a model that need not fit in memory: one layer at a time, from disk.

The residual stream of the text goes forward through one layer after the other, each read once, and
stays on disk before every one of them. Gradients go the way back: the head's is taken once, and
each layer, read again, turns that behind it into that before it. What a layer is measured to be is
written as soon as it is known, so that a walk that was killed goes on where it was, to the same
bits.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from moe_jax.calibrate.gradients import head_gradients, layer_gradients, layer_pulls
from moe_jax.calibrate.layer_stream import LayerMeasurement, LayerStream
from moe_jax.calibrate.measurement import Batches, Measurement, SlicedSum, warn_unreached
from moe_jax.calibrate.shares import share_out
from moe_jax.calibrate.stream import Stream
from moe_jax.calibrate.sums import LayerWanted, stream_sums
from moe_jax.config import ModelConfig, MoeConfig
from moe_jax.files import replacing_file
from moe_jax.metrics import progress_bar
from moe_jax.params import cast_params, layer_leaves
from moe_jax.processes import gather
from moe_jax.statistics import Stats, joined
from moe_jax.statistics_table import spread, statistic
from moe_jax.stored import in_memory, in_turn

_logger = logging.getLogger(__name__)
# Losses whose gradient at the head is that of the model's own predictions.
_LOSSES = ("lm", "kd_topk", "rerouting")


def calibrate_layerwise(
    params: dict[str, Any],
    config: ModelConfig,
    domains: Mapping[str, Batches],
    measurement: Measurement,
    *,
    save_as: str | Path,
    digest: str,
    dtype: Any = None,
) -> Stats:
    """``calibrate_domains`` with one layer in memory at a time, equal up to rounding.

    Args:
        params: on disk (see ``stored``) or in memory.
        config: of the model.
        domains: batches by name.
        measurement: what is measured; the teacher is the model itself.
        save_as, digest: see ``calibrate_domains``. Beside it lie, while this runs, the stream
            before every layer (``layers x positions x D`` numbers) and each layer's statistics;
            and second moments of all layers for good, which the result maps into memory.
        dtype: of computation; None: the embedding's.

    Raises:
        OSError: there is no room on the disk.
        ValueError: see ``check_losses`` and ``calibrate_domains``.
    """
    teacher = measurement.teacher
    check_losses(measurement.importance, teacher is None or teacher[0] is params)
    measurement.check(params, config)
    path = Path(save_as).expanduser()
    files = _Files(path, digest)
    folder = path.with_name(f"{path.name}.streams-{digest[:16]}")
    for other in path.parent.glob(f"{path.name}.streams-*"):
        if other != folder or files.load() is not None:
            shutil.rmtree(other)
    if (done := files.load()) is not None:
        _logger.info("statistics taken from %s", path)
        return done
    asked = LayerMeasurement(
        LayerWanted(
            hidden=bool(measurement.second_moments),
            mixed=measurement.attention_moments,
            shared=measurement.shared_moments,
        ),
        measurement.second_moment_bytes,
        measurement.slices,
        dtype=dtype,
        backend=measurement.backend,
    )
    stream = LayerStream(params, config, domains, asked, folder=folder / "forward", keep=True)
    walk = _Walk(in_turn(params), config, stream, measurement, files, folder)
    result = files.save(joined([*walk.forward(), walk.distances(), *walk.backward()]))
    shutil.rmtree(folder)
    for name in walk.parts:
        files.remove(name)
    warn_unreached(result)
    return result


def check_losses(losses: Sequence[str], own_teacher: bool) -> None:
    """Raises ValueError for gradients that take a whole model at once, or two."""
    unknown = sorted(set(losses) - set(_LOSSES))
    if unknown:
        raise ValueError(
            f"layer by layer, losses must be among {_LOSSES}, got {unknown}: it samples its routes "
            "anew in every layer; calibration.mode 'whole' takes it"
        )
    if "kd_topk" in losses and not own_teacher:
        raise ValueError(
            "layer by layer, the model is its own teacher: kd_topk of another one takes both in "
            "memory; use lm"
        )


@dataclasses.dataclass
class _Walk:
    """Both ways through a model; each step leaves a file and is skipped where it is there."""

    params: dict[str, Any]
    config: ModelConfig
    stream: LayerStream
    measurement: Measurement
    files: _Files
    folder: Path
    parts: list[str] = dataclasses.field(default_factory=list)

    def forward(self) -> Iterator[Stats]:
        """Statistics of every layer, first to last."""
        count, stream = self.config.num_layers, self.stream
        reached = stream.layer
        with progress_bar(count, "calibrate layer by layer", "layer") as bar:
            for i in range(count):
                self.parts.append(f"layer-{i}")
                stats = self.files.load(self.parts[-1]) if i < reached else None
                if stats is None:
                    stream.layer = i  # the stream before every layer is kept
                    stats = stream.measure_and_advance(self.params["layers"][i])
                    stats = self.files.save(stats, self.parts[-1])
                bar.update()
                yield stats

    def distances(self) -> Stats:
        """What the residual stream's depths are to each other."""
        count = self.config.num_layers + 1
        total = np.zeros((count, count))
        states = [self.stream.stream.before(i) for i in range(count)]
        for n, (_, batch) in enumerate(self.stream.texts):
            for row, mask in enumerate(batch["mask"]):
                depths = [state[n, row] for state in states]
                total += np.asarray(stream_sums(depths, mask)["angular_distance"])
        return Stats({}, 0, 0, 0, stream={"angular_distance": total.astype(np.float32)})

    def backward(self) -> Iterator[Stats]:
        """Sums of gradients of every loss asked for, last layer to first."""
        asked = set(self.measurement.importance)
        if asked & {"lm", "rerouting"}:
            yield from self._backward("lm", asked & {"lm", "rerouting"})
        if "kd_topk" in asked:
            yield from self._backward("kd_topk", {"kd_topk"})

    def _backward(self, loss: str, asked: set[str]) -> Iterator[Stats]:
        count = self.config.num_layers
        self.parts += [f"{loss}-{i}" for i in range(count)]
        if len(done := self._done(loss, range(count))) == count:
            yield from done.values()
            return
        states = self.stream.stream.before(count)
        gradient = Stream(states.shape, states.dtype, self.folder / loss)
        start = next((i for i in range(count + 1) if gradient.has(i)), None)
        done = {} if start is None else {i: done[i] for i in range(start, count) if i in done}
        if start is None or len(done) < count - start:
            start, done = count, {}
            self._at_head(loss, states, gradient)
        yield from done.values()
        with progress_bar(count, f"gradients of {loss} layer by layer", "layer") as bar:
            bar.update(count - start)
            for i in range(start - 1, -1, -1):
                with gradient.writing(i) as before:
                    stats = self._layer(i, loss, asked, gradient.before(i + 1), before)
                    stats.check_finite()
                    self.files.save(stats, f"{loss}-{i}")
                gradient.drop(i + 1)
                bar.update()
                yield stats
        gradient.remove()

    def _done(self, loss: str, layers: Sequence[int]) -> dict[int, Stats]:
        found = {i: self.files.load(f"{loss}-{i}") for i in layers}
        return {i: stats for i, stats in found.items() if stats is not None}

    def _at_head(self, loss: Any, states: np.ndarray, gradient: Stream) -> None:
        names = ("final_norm", "lm_head", *(["embed"] if self.config.tied_embeddings else []))
        head = in_memory({name: self.params[name] for name in names if name in self.params})
        with gradient.writing(self.config.num_layers) as behind:
            texts = tqdm(self.stream.texts, f"gradients of {loss} at the head", leave=False)
            for n, (_, batch) in enumerate(texts):
                behind[n] = np.asarray(
                    head_gradients(
                        head, self.config, states[n], batch, loss, self.measurement.top_k
                    )
                )

    def _layer(
        self, i: int, loss: str, asked: set[str], behind: np.ndarray, before: np.ndarray
    ) -> Stats:
        """Sums of one layer, over all text; ``before`` is filled with the gradient before it."""
        config, backend, layer = self.config, self.measurement.backend, self.config.layers[i]
        states = self.stream.stream.before(i)
        weights = self.params["layers"][i]
        weights = cast_params(weights, layer_leaves(config, i), jnp.dtype(states.dtype))
        domains = list(self.stream.by_domain())
        places = share_out([len(texts) for _, texts in domains], self.measurement.slices)
        parts = []
        for (_, texts), place in zip(domains, places, strict=True):
            total = SlicedSum(place.shares)
            for n, batch in texts:
                given = (weights, config, layer, states[n], behind[n], batch["mask"], backend)
                stream, experts, groups = layer_gradients(*given)
                before[n] = np.asarray(stream)
                sums = {f"{loss}.{name}": array for name, array in experts.items()}
                attention = {f"{loss}.{name}": array for name, array in groups.items()}
                if loss not in asked:  # for rerouting alone
                    sums, attention = {}, {}
                if "rerouting" in asked and isinstance(layer.feed_forward, MoeConfig):
                    sums |= layer_pulls(*given)
                by_layer = {i: sums} if isinstance(layer.feed_forward, MoeConfig) else {}
                total.add((by_layer, {i: attention}, {}), batch["mask"])
            parts.append(_of_gradients(total, config, place))
        return reduce(lambda a, b: a.merge(b), parts)


def _of_gradients(total: SlicedSum, config: ModelConfig, place: Any) -> Stats:
    """What batches add up to where no weights are needed, with slices."""
    whole = total.whole
    experts, attention, _ = whole.sums
    layers = {i: spread(gather(arrays), config, i) for i, arrays in experts.items()}
    for i, rows in whole.rows.items():
        layers[i] |= {name: np.concatenate(found) for name, found in rows.items()}
    slices = {(0, n): s.slice(config) for n, s in enumerate(total.shares) if s.state}
    return Stats(
        layers, whole.tokens, whole.sequences, whole.batches, {}, gather(attention),
        slices=place.keys(slices),
    )  # fmt: skip


class _Files:
    """Statistics of parts of a model, and of all of it, beside each other on disk.

    Arrays that are measured on request are large: each has a file of its own, which is mapped into
    memory rather than read.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self._path, self._digest = path, digest

    def save(self, stats: Stats, name: str = "") -> Stats:
        """Writes them, and gives them back with large arrays mapped."""
        mapped = []
        for part in ("layers", "attention"):
            for i, arrays in getattr(stats, part).items():
                for key in _large(arrays, part):
                    file = self._file(part, i, key)
                    mapped.append([part, i, key])
                    if not isinstance(arrays[key].base, np.memmap):
                        with replacing_file(file) as temporary, temporary.open("wb") as stream:
                            np.save(stream, arrays[key])
        light = dataclasses.replace(
            stats,
            layers={i: _light(arrays, "layers") for i, arrays in stats.layers.items()},
            attention={i: _light(arrays, "attention") for i, arrays in stats.attention.items()},
            facts={"digest": self._digest, **stats.facts, "mapped": mapped},
        )
        light.save(self._named(name))
        return self._mapped(light)

    def load(self, name: str = "") -> Stats | None:
        """What was saved under a name; None if there is no such thing."""
        stats = Stats.load_if_same(self._named(name), self._digest)
        return None if stats is None else self._mapped(stats)

    def remove(self, name: str) -> None:
        Stats.remove(self._named(name))

    def _named(self, name: str) -> Path:
        return self._path.with_name(f"{self._path.name}.{name}") if name else self._path

    def _mapped(self, stats: Stats) -> Stats:
        for part, i, key in stats.facts.get("mapped", ()):
            array = np.load(self._file(part, i, key), mmap_mode="r")
            getattr(stats, part)[i][key] = np.asarray(array)
        return stats

    def _file(self, part: str, i: int, key: str) -> Path:
        return self._path.with_name(f"{self._path.name}.{part}-{i}-{key}.npy")


def _large(arrays: Mapping[str, Any], part: str) -> list[str]:
    return [name for name in arrays if statistic(name, part).request]


def _light(arrays: Mapping[str, Any], part: str) -> dict[str, Any]:
    large = _large(arrays, part)
    return {name: array for name, array in arrays.items() if name not in large}
