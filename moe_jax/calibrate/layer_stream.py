"""Calibration of one layer after the other, on what the layers before it make of the text now."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.calibrate import memory
from moe_jax.calibrate.measurement import (
    Batches,
    SlicedSum,
    attention_arrays,
    check_batch,
    merged_domains,
)
from moe_jax.calibrate.shares import share_out
from moe_jax.calibrate.stream import Stream
from moe_jax.calibrate.sums import LayerWanted, StreamBatch, layer_sums
from moe_jax.config import LayerConfig, ModelConfig, MoeConfig
from moe_jax.files import check_space
from moe_jax.model.block import embed, layer_output
from moe_jax.params import cast_params, layer_leaves
from moe_jax.processes import on_mesh_of
from moe_jax.statistics import Stats
from moe_jax.statistics_table import requested_bytes
from moe_jax.stored import in_memory
from moe_jax.text import byte_size

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LayerMeasurement:
    """What is measured of each layer, and how.

    Attributes:
        wanted: what is summed up, such as second moments.
        second_moment_bytes: see ``plan_second_moments``, of one layer.
        slices: see ``Measurement.slices``.
        follow_original: ``hidden_gap``, too: the stream of the model as it was is carried along, at
            the cost of one more pass and as much memory again.
        dtype: of computation; None: the embedding's.
        backend: of ``ops.grouped_matmul``.
    """

    wanted: LayerWanted = LayerWanted()  # noqa: RUF009, immutable
    second_moment_bytes: int | None = None
    slices: int = 1
    follow_original: bool = False
    dtype: Any = None
    backend: str = "auto"


class LayerStream:
    """The residual stream of all calibration text before one layer, in host memory or in files.

    Layers are measured with ``measure`` and passed with ``advance``, which may be given other
    weights: what follows is then measured on their output. Measuring and passing every layer takes
    two forward passes, or one where a layer stays as it is (``measure_and_advance``), and one
    layer's second moments live at a time.

    Attributes:
        layer: index of the layer that the stream is before: the first one, or the furthest that
            files hold.
    """

    def __init__(
        self,
        params: dict[str, Any],
        config: ModelConfig,
        domains: Mapping[str, Batches],
        measurement: LayerMeasurement = LayerMeasurement(),  # noqa: B008, immutable
        *,
        folder: Path | None = None,
        keep: bool = False,
    ) -> None:
        """Embeds the text, after a check and a line in the log on how much memory it takes.

        Args:
            params, config: the model to measure; only its embedding is read here.
            domains: batches by name, as for ``calibrate_domains``; all of one shape.
            measurement: of each layer.
            folder: for files of the stream; None: it stays in host memory.
            keep: the files of earlier layers.

        Raises:
            ValueError: no text in a domain, token ids outside the vocabulary, a stream or second
                moments of a layer that do not fit in memory.
        """
        _check_text(domains, config.vocab_size)
        embedding = params["embed"]["embedding"]
        self._dtype = jnp.dtype(measurement.dtype or embedding.dtype)
        measurement = dataclasses.replace(measurement, dtype=self._dtype)
        size, most = check_stream_memory(config, domains, measurement, in_files=folder is not None)
        _logger.info(
            "layer by layer: the residual stream of %s positions takes %s of %s, second moments of "
            "a layer %s on the device",
            f"{_positions(domains):,}",
            byte_size(size),
            "host memory" if folder is None else "disk",
            byte_size(most),
        )
        self._config, self._measurement = config, measurement
        self.texts = [(name, batch) for name, domain in domains.items() for batch in domain]
        self._places = share_out([len(domain) for domain in domains.values()], measurement.slices)
        shape = (len(self.texts), *self.texts[0][1]["tokens"].shape, config.width)
        self.stream = Stream(shape, self._dtype, folder, keep)
        original = folder and folder / "original"
        self._original = (
            Stream(shape, self._dtype, original) if measurement.follow_original else None
        )
        streams = [self.stream, *([self._original] if self._original else [])]
        reached = [stream.furthest(config.num_layers) for stream in streams]
        if None in reached:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                files = config.num_layers + 1 if keep else 2
                check_space(folder, files * len(streams) * self.stream.nbytes)
            self._embed(params, streams)
            reached = [0] * len(streams)
        self.layer: int = reached[0]  # type: ignore[assignment]
        # Of the model as it was, before layer ``_original_layer``; the same until a layer is cut.
        self._original_layer: int = reached[-1]  # type: ignore[assignment]

    def _embed(self, params: dict[str, Any], streams: Sequence[Stream]) -> None:
        rows = {"embed": in_memory(params["embed"])}
        rows["embed"]["embedding"] = rows["embed"]["embedding"].astype(self._dtype)
        for stream in streams:
            with stream.writing(0) as states:
                for n, (_, batch) in enumerate(self.texts):
                    states[n] = np.asarray(embed(rows, self._config, batch["tokens"]))

    def measure(self, weights: dict[str, Any]) -> Stats:
        """Statistics of the next layer, which has experts, of each domain and then merged.

        They are those that ``calibrate_domains`` gives with second moments, of this layer alone,
        but for the residual stream. With the original's stream, and once a layer with experts was
        passed, ``hidden_gap`` [E, F + 1, D] comes on top: ``sum w^2 [h; 1] c^T`` over the expert's
        hidden activations h, where ``c`` is what its output lacks for the stream behind the layer
        to be the original's.

        Args:
            weights: of the layer, before it is cut.

        Raises:
            ValueError: the layer is dense, or NaN in the result (named).
        """
        self._config.moe(self.layer)
        weights = self._computable(weights)
        self._advance_original(weights)
        return self._statistics(weights)

    def measure_and_advance(self, weights: dict[str, Any]) -> Stats:
        """``measure``, of any layer, and ``advance`` with the same weights, in one pass."""
        weights = self._computable(weights)
        with self.stream.writing(self.layer + 1) as behind:
            stats = self._statistics(weights, behind)
        self._leave()
        return stats

    def _statistics(self, weights: dict[str, Any], behind: np.ndarray | None = None) -> Stats:
        stats = merged_domains(self._measured(weights, behind))
        stats.check_finite()
        return stats

    def _measured(
        self, weights: dict[str, Any], behind: np.ndarray | None
    ) -> Iterator[tuple[str, Stats]]:
        i, config, asked = self.layer, self._config, self._measurement
        layer = config.layers[i]
        before, goals = self.stream.before(i), None
        if self._original is not None and any(j < i for j in config.moe_layers):
            goals = self._original.before(self._original_layer)
        for (name, texts), place in zip(self.by_domain(), self._places, strict=True):
            total = SlicedSum(place.shares)
            for n, batch in texts:
                goal = None if goals is None else goals[n]
                given = StreamBatch(before[n], batch["mask"].astype(np.int32), goal)
                y, experts, attention = layer_sums(
                    weights, config, layer, given, asked.backend, asked.wanted
                )
                by_layer = {i: experts} if isinstance(layer.feed_forward, MoeConfig) else {}
                total.add((by_layer, {i: attention}, {}), batch["mask"])
                del experts, by_layer  # before those of the next batch are made
                if behind is not None:
                    behind[n] = np.asarray(y)
            stats = total.stats(config, {i: weights})
            yield name, dataclasses.replace(stats, slices=place.keys(stats.slices))

    def by_domain(self) -> Iterator[tuple[str, list[tuple[int, dict[str, Any]]]]]:
        """Name of each domain, and its batches with their numbers in the stream."""
        for name, group in groupby(enumerate(self.texts), lambda item: item[1][0]):
            yield name, [(n, batch) for n, (_, batch) in group]

    def attention(self, weights: dict[str, Any]) -> dict[str, np.ndarray]:
        """What weights alone tell of the next layer's attention, with or without experts."""
        return attention_arrays(self._config, self._computable(weights), self.layer, {})

    def advance(self, weights: dict[str, Any], layer: LayerConfig | None = None) -> None:
        """Passes the next layer.

        Args:
            weights: of the layer as it is from now on.
            layer: what they are of; None: as in the model.
        """
        weights = self._computable(weights, layer)
        self._advance_original(weights)
        self._pass(self.stream, weights, layer or self._config.layers[self.layer])
        self._leave()

    def _leave(self) -> None:
        self.stream.drop(self.layer)
        self.layer += 1

    def _advance_original(self, weights: dict[str, Any]) -> None:
        """Passes the next layer as it was, once."""
        if self._original is not None and self._original_layer == self.layer:
            self._pass(self._original, weights, self._config.layers[self.layer])
            self._original.drop(self.layer)
            self._original_layer += 1

    def _pass(self, stream: Stream, weights: dict[str, Any], layer: LayerConfig) -> None:
        before = stream.before(self.layer)
        with stream.writing(self.layer + 1) as behind:
            for n, (_, batch) in enumerate(self.texts):
                segment_ids = batch["mask"].astype(np.int32)
                with on_mesh_of(weights):
                    y = layer_output(
                        weights, self._config, layer, before[n], segment_ids,
                        self._measurement.backend,
                    )  # fmt: skip
                behind[n] = np.asarray(y)

    def _computable(
        self, weights: dict[str, Any], layer: LayerConfig | None = None
    ) -> dict[str, Any]:
        leaves = layer_leaves(self._config, layer or self.layer)
        return cast_params(weights, leaves, self._dtype)

    def remove(self) -> None:
        """Deletes the stream's files."""
        if self._original is not None:
            self._original.remove()
        self.stream.remove()


def check_stream_memory(
    config: ModelConfig,
    domains: Mapping[str, Batches],
    measurement: LayerMeasurement,
    *,
    in_files: bool = False,
) -> tuple[int, int]:
    """Bytes that a ``LayerStream`` with these arguments takes: of its stream, and on the device.

    Raises:
        ValueError: they do not fit; a stream in files takes no memory.
    """
    positions, wanted = _positions(domains), measurement.wanted
    streams = 1 + measurement.follow_original
    size = positions * config.width * jnp.dtype(measurement.dtype).itemsize * streams
    free = None if in_files else memory.free_host_bytes()
    if free is not None and size > free:
        raise ValueError(
            f"the residual stream of {positions:,} calibration tokens takes {byte_size(size)} "
            f"of host memory, of which {byte_size(free)} are available; calibrate on less text"
        )
    layers: dict[int, int] = {}
    for request, asked in (
        ("second_moments", wanted.hidden),
        ("follow_original", wanted.hidden and measurement.follow_original),
        ("shared_moments", wanted.shared),
    ):
        for i, moments in requested_bytes(config, request).items() if asked else ():
            layers[i] = layers.get(i, 0) + moments
    for i, moments in layers.items():
        memory.lay_out({i: moments}, measurement.second_moment_bytes, memory.moment_copies(domains))
    return size, 2 * max(layers.values(), default=0)


def _positions(domains: Mapping[str, Batches]) -> int:
    return sum(batch["tokens"].size for part in domains.values() for batch in part)


def _check_text(domains: Mapping[str, Batches], vocab_size: int) -> None:
    """Raises ValueError unless there is a domain, and each holds tokens of the vocabulary."""
    if not domains:
        raise ValueError("calibration needs text, got no domain")
    for name, batches in domains.items():
        for batch in batches:
            check_batch(batch, vocab_size)
        if not any(batch["mask"].any() for batch in batches):
            raise ValueError(
                "calibration needs text in every domain, got no batch or nothing but padding in "
                f"{name!r}"
            )
