"""From a plan that deletes experts to one that merges them into those that stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax.config import ModelConfig, MoeConfig
from moe_jax.params import expert_leaves, stack_experts
from moe_jax.plan.groups import (
    check_capacity,
    check_clusters,
    clusters,
    join_nearest,
    join_salient_first,
)
from moe_jax.plan.recipes import MergeRecipe
from moe_jax.plan.schema import LayerPlan, Merge, Plan
from moe_jax.statistics import Stats

Layer = Mapping[str, np.ndarray]


def merge_plan(
    plan: Plan,
    stats: Stats,
    config: ModelConfig,
    scores: Mapping[int, np.ndarray],
    recipe: MergeRecipe,
    params: dict[str, Any] | None = None,
) -> Plan:
    """Merges the experts that ``plan`` deletes; every layer keeps as many as before.

    Args:
        plan: from ``make_plan(..., replacement="delete")``. Which experts stay is its choice too,
            unless ``recipe.grouping`` is ``clusters``. Novices that it deletes stay deleted;
            novices never join a group.
        stats: of the model.
        config: the model's.
        scores: of the recipe's criterion, by layer: ``[E]``.
        recipe: who joins whom, and how they are merged.
        params: the model's weights, needed for ``similarity="weights"`` alone.

    Raises:
        ValueError: statistics without what the recipe needs, groups too small for all experts,
            negative scores as weights, or clusters of a plan that keeps equally many experts of
            each group of ids.
    """
    if recipe.grouping == "clusters":
        check_clusters(plan.settings.get("scope", "layer"))
    layers = {}
    for i, layer in plan.layers.items():
        moe = config.layers[i].feed_forward
        if not isinstance(moe, MoeConfig) or not layer.deleted:
            layers[i] = layer
            continue
        leaves = expert_leaves(config, i)
        products = _inner_products(recipe, stats.layers[i], i, moe, params, leaves)
        layers[i] = _merge_layer(layer, i, moe, stats.layers[i], scores[i], recipe, products)
    settings = {**plan.settings, "replacement": "merge", **dataclasses.asdict(recipe)}
    return dataclasses.replace(plan, layers=layers, settings=settings)


def _merge_layer(
    layer: LayerPlan,
    i: int,
    moe: MoeConfig,
    arrays: Layer,
    scores: np.ndarray,
    recipe: MergeRecipe,
    products: list[np.ndarray],
) -> LayerPlan:
    """Positions among the experts with neurons, which is what groups hold, become ids."""
    ids = np.array(moe.expert_ids)
    kept = np.flatnonzero(~np.isin(ids, layer.deleted)).tolist()
    ranks = scores[ids]
    try:
        if recipe.grouping == "clusters":
            groups = clusters(_distance(products[0]), len(kept), ranks)
        else:
            check_capacity(len(kept), len(ids), recipe.cap)
            similarity = np.mean([_cosine(one) for one in products], axis=0)
            cap = recipe.cap or len(ids)
            groups = (
                join_nearest(kept, similarity, cap)
                if recipe.grouping == "nearest"
                else join_salient_first(kept, similarity, ranks, cap)
            )
        values = {"frequency": arrays["count"][ids], "score": ranks, "uniform": np.ones(len(ids))}
        shares = [_shares(values[recipe.weights], group) for group in groups]
    except ValueError as error:
        raise ValueError(f"layer {i}: {error}") from error
    merges = [
        Merge(int(ids[first]), tuple(ids[rest].tolist()), share)
        for (first, *rest), share in zip(groups, shares, strict=True)
        if rest
    ]
    return dataclasses.replace(
        layer,
        deleted=tuple(e for e in layer.deleted if e in moe.novice_ids),
        merges=tuple(sorted(merges, key=lambda merge: merge.kept)),
        merge_align=recipe.align,
        merge_router=recipe.router,
    )


def _shares(values: np.ndarray, group: list[int]) -> tuple[float, ...]:
    """Shares that sum to one; if all values are zero, the first expert stays as it is."""
    chosen = np.asarray(values, np.float64)[group]
    if (chosen < 0).any():
        raise ValueError(f"merge weights must be 0 or more, got {chosen.min()}")
    total = chosen.sum()
    return tuple((chosen / total).tolist()) if total else (1.0,) + (0.0,) * (len(group) - 1)


def _inner_products(
    recipe: MergeRecipe,
    arrays: Layer,
    i: int,
    moe: MoeConfig,
    params: dict[str, Any] | None,
    leaves: Any,
) -> list[Float[np.ndarray, "E_kept E_kept"]]:
    """Of the vectors that stand for the experts; all similarities follow from them."""
    if recipe.similarity == "weights":
        if params is None:
            raise ValueError("similarity 'weights' needs the model's params, got none")
        experts = stack_experts(params["layers"][i]["moe"]["experts"], leaves)
        return [np.asarray(_weight_products(experts), np.float64)]
    sources = {
        "router": ("router_gram",),
        "output": ("output_mean",),
        "output_and_router": ("gated_output", "router_gram"),
    }[recipe.similarity]
    missing = [name for name in sources if name not in arrays]
    if missing:
        raise ValueError(
            f"similarity {recipe.similarity!r} needs {missing} of layer {i}, which these "
            "statistics lack; calibrate again"
        )
    ids = list(moe.expert_ids)
    products = []
    for name in sources:
        values = np.asarray(arrays[name], np.float64)[ids]
        products.append(values[:, ids] if name == "router_gram" else values @ values.T)
    return products


@jax.jit
def _weight_products(experts: dict[str, Array]) -> Float[Array, "E_kept E_kept"]:
    products = [
        jnp.einsum(
            "eab,gab->eg",
            leaf,
            leaf,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        for leaf in experts.values()
    ]
    return jnp.stack(products).sum(0)


def _cosine(products: np.ndarray) -> np.ndarray:
    """Zero where a vector is zero: nothing is known of an expert that no token reached."""
    norms = np.sqrt(np.maximum(np.diag(products), 0))
    scale = np.outer(norms, norms)
    return np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)


def _distance(products: np.ndarray) -> np.ndarray:
    """Euclidean: ``||a - b||^2 = a.a + b.b - 2 a.b``."""
    squares = np.diag(products)
    distance = np.sqrt(np.maximum(squares[:, None] + squares - 2 * products, 0))
    np.fill_diagonal(distance, 0)
    return distance
