"""What a criterion is: one function, the sums it needs, and the options it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.settings import check_bounds, check_choice, convert
from moe_jax.statistics_table import AGGREGATIONS, PASSES, axis_sizes, statistic

Layer = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Option:
    """What an option of a criterion may be: one of ``choices``, or a number within ``bounds``."""

    default: Any
    choices: tuple[Any, ...] = ()
    kind: type = float
    bounds: str = ""

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError naming the option, its bound and the value."""
        if self.choices:
            check_choice(name, value, self.choices)
        elif value is not None or self.default is not None:
            check_bounds(name, convert(value, self.kind, name), self.bounds)


class Beside(NamedTuple):
    """What a criterion may look at beside a layer's statistics.

    Attributes:
        rng: of the random criteria.
        layer: index of the layer.
        params, config: of the model that was measured; None without them.
        shared: whether the statistics are of the layer's shared expert, alone.
    """

    rng: np.random.Generator
    layer: int = 0
    params: dict[str, Any] | None = None
    config: ModelConfig | None = None
    shared: bool = False

    @property
    def model(self) -> tuple[dict[str, Any], ModelConfig]:
        """Weights and configuration, of which a criterion with ``weights`` needs both."""
        if self.params is None or self.config is None:
            raise ValueError("the criterion reads the model's weights: it needs params and config")
        return self.params, self.config


@dataclass(frozen=True)
class Criterion:
    """How one layer's experts, neurons or key/value groups are ranked. Low means redundant.

    Attributes:
        function: ``function(layer, beside, **options)``, scores ``[E]``, ``[E, F]`` or ``[G]``; of
            neurons also ``[1, U]`` of a shared expert.
        sums: names in ``statistics_table.STATISTICS`` that it reads. A name may hold an option in
            braces. Which losses and second moments calibration must measure follows from them.
        options: by name, all that it takes.
        part: of the statistics.
        weights: whether it reads the model's weights, too.
        random: whether it reads nothing but the shape of its sums.
        by_feature: whether it reads the deviation of every single feature of an output; else their
            total is enough, and slices of text are kept in fewer coordinates.
    """

    function: Callable[..., Any]
    sums: tuple[str, ...]
    options: Mapping[str, Option] = field(default_factory=dict)
    part: Literal["layers", "attention"] = "layers"
    weights: bool = False
    random: bool = False
    by_feature: bool = False

    def filled(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """All options, those that are not given at their defaults.

        Raises:
            ValueError: an option that the criterion ``name`` does not take, or a value.
        """
        if unknown := sorted(set(options) - set(self.options)):
            raise ValueError(f"options of {name} must be among {list(self.options)}, got {unknown}")
        for key, value in options.items():
            self.options[key].check(key, value)
        return {key: option.default for key, option in self.options.items()} | dict(options)

    def reads(self, options: Mapping[str, Any] | None = None) -> tuple[str, ...]:
        """Names of the arrays that it reads with these options."""
        values = {key: option.default for key, option in self.options.items()} | dict(options or {})
        return tuple(name.format(**values) for name in self.sums)

    @property
    def loss(self) -> str:
        """The loss that calibration must differentiate, or ``rerouting``; empty for none."""
        passes = (name.partition(".")[0] for name in self.sums)
        return next((one for one in passes if one in PASSES), "")

    @property
    def request(self) -> str:
        """The argument of ``calibrate`` that asks for a large array it reads; empty for none."""
        requests = (statistic(name, self.part).request for name in self.reads())
        return next(filter(None, requests), "")

    @property
    def by_text(self) -> bool:
        """Whether text decides the scores."""
        sources = {statistic(name, self.part).source for name in self.reads()}
        return not self.random and sources != {"weights"}

    def check(self, name: str, layer: Layer, beside: Beside, options: Mapping[str, Any]) -> None:
        """Raises ValueError unless a layer has the arrays, of the model's shapes if it is known."""
        for array in self.reads(options):
            if array not in layer:
                request = self.request and ("shared_moments" if beside.shared else self.request)
                again = f"importance=({self.loss!r},)" if self.loss else f"{request}=True"
                again = f"with {again}" if self.loss or request else "again"
                raise ValueError(
                    f"these statistics hold no {array}, which {name!r} needs; calibrate {again}"
                )
            if beside.config is None:
                continue
            sizes = axis_sizes(beside.config, beside.layer) | {"T": len(layer[array])}
            if beside.shared:
                sizes |= {"E": 1, "X": 1, "F": sizes["U"], "F1": sizes["U1"]}
            shape = statistic(array, self.part).shape(sizes)
            if layer[array].shape != shape:
                raise ValueError(
                    f"statistics of layer {beside.layer} must be of this model, with {array} "
                    f"{shape}, got {layer[array].shape}"
                )


def importance(
    loss: str,
    prefix: str = "",
    default: str = "batch_abs",
    part: Literal["layers", "attention"] = "layers",
) -> Criterion:
    """First-order change of a loss if a neuron, an expert or a group's heads are masked.

    Args:
        loss: in ``IMPORTANCE_LOSSES``.
        prefix: ``expert_`` for the whole expert's output.
        default: aggregation over sequences and batches, see ``statistics_table.AGGREGATIONS``.
        part: of the statistics.
    """

    def function(layer: Layer, _, aggregation: str) -> np.ndarray:
        return layer[f"{loss}.{prefix}{aggregation}"]

    options = {"aggregation": Option(default, AGGREGATIONS)}
    return Criterion(function, (f"{loss}.{prefix}{{aggregation}}",), options, part)
