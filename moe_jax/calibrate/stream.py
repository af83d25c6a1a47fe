"""Calibration of one layer after the other, on what the layers before it make of the text now."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.calibrate.measure import RunningSum, check_tokens, statistics_of_layer
from moe_jax.calibrate.memory import byte_text, free_host_bytes, plan_second_moments
from moe_jax.calibrate.sums import layer_output, layer_sums
from moe_jax.config import LayerConfig, ModelConfig
from moe_jax.statistics import Stats

Batches = list[dict[str, np.ndarray]]
_logger = logging.getLogger(__name__)


class LayerStream:
    """The residual stream of all calibration text before one layer, in host memory.

    Layers are measured with ``measure`` and passed with ``advance``, which may be given other
    weights: what follows is then measured on their output. Measuring and passing every layer takes
    two forward passes, and one layer's second moments live at a time.

    Attributes:
        layer: index of the layer that the stream is before.
    """

    def __init__(
        self,
        params: dict[str, Any],
        config: ModelConfig,
        domains: Mapping[str, Batches],
        *,
        second_moment_bytes: int | None = None,
        dtype: Any = None,
        backend: str = "auto",
    ) -> None:
        """Embeds the text, after a check and a line in the log on how much memory it takes.

        Args:
            params, config: the model to measure; only its embedding is read here.
            domains: batches by name, as for ``calibrate_domains``; all of one shape.
            second_moment_bytes: see ``plan_second_moments``, of one layer.
            dtype: of computation; None: the embedding's.
            backend: of ``ops.grouped_matmul``.

        Raises:
            ValueError: no text, token ids outside the vocabulary, a stream or second moments of a
                layer that do not fit in memory.
        """
        batches = [batch for domain in domains.values() for batch in domain]
        if not any(batch["mask"].any() for batch in batches):
            raise ValueError("calibration needs text, got no batch or nothing but padding")
        embedding = params["embed"]["embedding"]
        self._dtype = jnp.dtype(dtype or embedding.dtype)
        self._check_memory(config, domains, second_moment_bytes)
        for batch in batches:
            check_tokens(batch["tokens"], config.vocab_size)
        self.layer = 0
        self._config, self._domains, self._backend = config, domains, backend
        self._states = {
            name: [np.asarray(embedding[batch["tokens"]].astype(self._dtype)) for batch in domain]
            for name, domain in domains.items()
        }

    def _check_memory(
        self, config: ModelConfig, domains: Mapping[str, Batches], bound: int | None
    ) -> None:
        positions = sum(batch["tokens"].size for part in domains.values() for batch in part)
        size = positions * config.width * self._dtype.itemsize
        free = free_host_bytes()
        if free is not None and size > free:
            raise ValueError(
                f"the residual stream of {positions:,} calibration tokens takes {byte_text(size)} "
                f"of host memory, of which {byte_text(free)} are available; calibrate on less text"
            )
        copies = 2 if len(domains) > 1 else 1
        plans = [plan_second_moments(config, (i,), bound, copies) for i in config.moe_layers]
        most = max((plan.on_device for plan in plans), default=0)
        _logger.info(
            "layer by layer: the residual stream of %s positions takes %s of host memory, second "
            "moments of a layer %s on the device",
            f"{positions:,}",
            byte_text(size),
            byte_text(most),
        )

    def measure(self, weights: dict[str, Any]) -> Stats:
        """Statistics of the next layer, which has experts, of each domain and then merged.

        They are those that ``calibrate_domains`` gives with second moments, of this layer alone,
        but for the residual stream and slices.

        Args:
            weights: of the layer, before it is cut.

        Raises:
            ValueError: the layer is dense, or NaN in the result (named).
        """
        i, config = self.layer, self._config
        config.moe(i)
        weights = self._computable(weights)
        merged: Stats | None = None
        facts = {}
        for name, domain in self._domains.items():
            total = RunningSum()
            for x, batch in zip(self._states[name], domain, strict=True):
                sums = layer_sums(
                    weights, config, config.layers[i], x, batch["mask"], self._backend
                )
                total.add(({i: sums}, {}, {}), batch["mask"])
                del sums  # before those of the next batch are made
            stats = statistics_of_layer(config, weights, i, total)
            facts[name] = {
                "tokens": stats.tokens,
                "sequences": stats.sequences,
                "count": {str(i): stats.layers[i]["count"].tolist()},
            }
            merged = stats if merged is None else merged.merge(stats, consume=True)
        assert merged is not None
        merged.check_finite()
        return dataclasses.replace(merged, facts={"domains": facts})

    def advance(self, weights: dict[str, Any], layer: LayerConfig | None = None) -> None:
        """Passes the next layer, as it now is.

        Args:
            weights: its weights, perhaps of other shapes than the model's.
            layer: what they are of; None: as in the model.
        """
        shape = layer or self._config.layers[self.layer]
        weights = self._computable(weights)
        for name, states in self._states.items():
            for n, batch in enumerate(self._domains[name]):
                states[n] = np.asarray(
                    layer_output(
                        weights, self._config, shape, states[n], batch["mask"], self._backend
                    )
                )
        self.layer += 1

    def _computable(self, weights: dict[str, Any]) -> dict[str, Any]:
        return jax.tree.map(
            lambda leaf: leaf if leaf.dtype == self._dtype else leaf.astype(self._dtype), weights
        )
