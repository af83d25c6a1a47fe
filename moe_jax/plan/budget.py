"""The largest cut whose model fits a budget, from configurations alone."""

from __future__ import annotations

import bisect
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_jax.config import ModelConfig
from moe_jax.params import ITEM_BYTES, count_params
from moe_jax.plan.cut import Cut
from moe_jax.plan.schema import LayerPlan, Plan
from moe_jax.plan.validate import planned_config

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """What a model may be at most.

    Attributes:
        name: ``total_params``, ``active_params`` (see ``params.ParameterCount``) or
            ``total_bytes``, of all weights.
        limit: in parameters or bytes.
        item_bytes: of one parameter; 1 counts parameters.
    """

    name: str
    limit: int
    item_bytes: int = 1

    def size(self, config: ModelConfig) -> int:
        """What ``config`` takes of it."""
        counts = count_params(config)
        return self.item_bytes * (counts.active if self.name == "active_params" else counts.total)


def find_budget(cut: Cut) -> Budget | None:
    """The budget among the sizes of a ``Cut``; None if it has another size.

    Raises:
        ValueError: bytes without a ``dtype`` that says how many a parameter takes.
    """
    for name in ("total_params", "active_params"):
        if (limit := getattr(cut, name)) is not None:
            return Budget(name, limit)
    if cut.total_bytes is None:
        return None
    return Budget("total_bytes", cut.total_bytes, item_bytes(cut.dtype))


def item_bytes(dtype: str | None) -> int:
    """Bytes of one parameter; raises ValueError for a ``dtype`` that weights do not have."""
    if dtype not in ITEM_BYTES:
        raise ValueError(f"dtype must be one of {tuple(ITEM_BYTES)}, got {dtype!r}")
    return ITEM_BYTES[dtype]


def largest_that_fits(
    budget: Budget,
    config: ModelConfig,
    sizes: Sequence[int],
    layers_of: Callable[[int], dict[int, LayerPlan]],
) -> int:
    """The largest of ``sizes`` whose plan leaves a model within the budget.

    Found by bisection, from about ``log2(len(sizes))`` configurations. Where a larger size keeps
    all that a smaller one does, it is the largest one. Otherwise (own widths, of which some are
    given up) one that leaves a little more may fit, too.

    Args:
        sizes: ascending.
        layers_of: from a size to the layers of a plan of that size, or of any other one that
            leaves the same shapes.

    Raises:
        ValueError: the smallest size exceeds the budget.
    """

    @functools.cache
    def measured(size: int) -> int:
        return budget.size(planned_config(config, Plan(layers_of(size))))

    fitting = bisect.bisect_right(sizes, budget.limit, key=measured)
    if not fitting:
        raise ValueError(
            f"{budget.name} must be at least {measured(sizes[0]):,}, what the smallest plan that "
            f"the other settings allow leaves, got {budget.limit:,}"
        )
    if fitting == len(sizes):
        _logger.warning(
            "%s = %s is no bound: the largest plan that the other settings allow leaves %s",
            budget.name,
            f"{budget.limit:,}",
            f"{measured(sizes[-1]):,}",
        )
    return sizes[fitting - 1]
