"""Calibration of one layer after the other, on what the layers before it make of the text now."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.calibrate import memory
from moe_jax.calibrate.measurement import (
    Batches,
    RunningSum,
    attention_arrays,
    check_batch,
    merged_domains,
)
from moe_jax.calibrate.sums import layer_output, layer_sums
from moe_jax.config import LayerConfig, ModelConfig
from moe_jax.model.block import embed
from moe_jax.params import cast_params, layer_leaves
from moe_jax.processes import on_mesh_of
from moe_jax.statistics import Stats
from moe_jax.statistics_table import requested_bytes
from moe_jax.text import byte_size

_logger = logging.getLogger(__name__)


class LayerStream:
    """The residual stream of all calibration text before one layer, in host memory.

    Layers are measured with ``measure`` and passed with ``advance``, which may be given other
    weights: what follows is then measured on their output. Measuring and passing every layer takes
    two forward passes, and one layer's second moments live at a time.

    With ``follow_original`` the stream of the model as it was is carried along, at the cost of one
    more pass and as much memory again, and layers are also measured on the gap to it.

    Attributes:
        layer: index of the layer that the stream is before.
    """

    def __init__(
        self,
        params: dict[str, Any],
        config: ModelConfig,
        domains: Mapping[str, Batches],
        *,
        follow_original: bool = False,
        second_moment_bytes: int | None = None,
        dtype: Any = None,
        backend: str = "auto",
    ) -> None:
        """Embeds the text, after a check and a line in the log on how much memory it takes.

        Args:
            params, config: the model to measure; only its embedding is read here.
            domains: batches by name, as for ``calibrate_domains``; all of one shape.
            follow_original: measure ``hidden_gap``, too.
            second_moment_bytes: see ``plan_second_moments``, of one layer.
            dtype: of computation; None: the embedding's.
            backend: of ``ops.grouped_matmul``.

        Raises:
            ValueError: no text in a domain, token ids outside the vocabulary, a stream or second
                moments of a layer that do not fit in memory.
        """
        _check_text(domains, config.vocab_size)
        embedding = params["embed"]["embedding"]
        self._dtype = jnp.dtype(dtype or embedding.dtype)
        size, most = check_stream_memory(
            config, domains, self._dtype, second_moment_bytes, follow_original
        )
        _logger.info(
            "layer by layer: the residual stream of %s positions takes %s of host memory, second "
            "moments of a layer %s on the device",
            f"{_positions(domains):,}",
            byte_size(size),
            byte_size(most),
        )
        self.layer = 0
        self._config, self._domains, self._backend = config, domains, backend
        rows = {"embed": {"embedding": embedding.astype(self._dtype)}}
        self._states = {
            name: [np.asarray(embed(rows, config, batch["tokens"])) for batch in domain]
            for name, domain in domains.items()
        }
        # Of the model as it was, before layer ``_original_layer``; the same until a layer is cut.
        self._any_cut = False
        self._originals = (
            {name: list(states) for name, states in self._states.items()} if follow_original else {}
        )
        self._original_layer = 0

    def measure(self, weights: dict[str, Any]) -> Stats:
        """Statistics of the next layer, which has experts, of each domain and then merged.

        They are those that ``calibrate_domains`` gives with second moments, of this layer alone,
        but for the residual stream and slices. With the original's stream, and once a layer was
        measured and passed, ``hidden_gap`` [E, F + 1, D] comes on top: ``sum w^2 [h; 1] c^T`` over
        the expert's hidden activations h, where ``c`` is what its output lacks for the stream
        behind the layer to be the original's.

        Args:
            weights: of the layer, before it is cut.

        Raises:
            ValueError: the layer is dense, or NaN in the result (named).
        """
        self._config.moe(self.layer)
        weights = self._computable(weights)
        self._advance_original(weights)
        stats = merged_domains(self._measured(weights))
        stats.check_finite()
        return stats

    def _measured(self, weights: dict[str, Any]) -> Iterator[tuple[str, Stats]]:
        i, config = self.layer, self._config
        for name, domain in self._domains.items():
            total = RunningSum()
            for n, (x, batch) in enumerate(zip(self._states[name], domain, strict=True)):
                wanted = self._originals[name][n] if self._originals and self._any_cut else None
                sums = layer_sums(
                    weights, config, config.layers[i], x, batch["mask"], self._backend, wanted
                )
                total.add(({i: sums}, {i: {}}, {}), batch["mask"])
                del sums  # before those of the next batch are made
            yield name, total.stats(config, {i: weights})

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
        self._any_cut |= self._original_layer > self.layer  # it was measured
        self._advance_original(weights)
        self._pass(self._states, weights, layer or self._config.layers[self.layer])
        self.layer += 1

    def _advance_original(self, weights: dict[str, Any]) -> None:
        """Passes the next layer as it was, once."""
        if self._original_layer == self.layer:
            self._pass(self._originals, weights, self._config.layers[self.layer])
            self._original_layer += 1

    def _pass(self, states: dict[str, list], weights: dict[str, Any], layer: LayerConfig) -> None:
        for name, batches in states.items():
            for n, batch in enumerate(self._domains[name]):
                with on_mesh_of(weights):
                    y = layer_output(
                        weights, self._config, layer, batches[n], batch["mask"], self._backend
                    )
                batches[n] = np.asarray(y)

    def _computable(
        self, weights: dict[str, Any], layer: LayerConfig | None = None
    ) -> dict[str, Any]:
        layers = list(self._config.layers)
        layers[self.layer] = layer or layers[self.layer]
        config = dataclasses.replace(self._config, layers=tuple(layers))
        return cast_params(weights, layer_leaves(config, self.layer), self._dtype)


def check_stream_memory(
    config: ModelConfig,
    domains: Mapping[str, Batches],
    dtype: Any,
    bound: int | None,
    follow_original: bool,
) -> tuple[int, int]:
    """Bytes that a ``LayerStream`` with these arguments takes: of its stream, and on the device.

    Raises:
        ValueError: they do not fit.
    """
    positions = _positions(domains)
    size = positions * config.width * jnp.dtype(dtype).itemsize * (1 + follow_original)
    free = memory.free_host_bytes()
    if free is not None and size > free:
        raise ValueError(
            f"the residual stream of {positions:,} calibration tokens takes {byte_size(size)} "
            f"of host memory, of which {byte_size(free)} are available; calibrate on less text"
        )
    layers = requested_bytes(config, "second_moments")
    for i, gap in requested_bytes(config, "follow_original").items() if follow_original else ():
        layers[i] += gap
    for i, moments in layers.items():
        memory.lay_out({i: moments}, bound, memory.moment_copies(domains))
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
