"""Merging: published recipes, which experts join, and the plan that merges what another deletes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from moe_jax.config import ModelConfig, MoeConfig
from moe_jax.kinds import RouterConfig
from moe_jax.params import expert_leaves, stack_experts
from moe_jax.plan.schema import LayerPlan, Merge, Plan
from moe_jax.processes import gather
from moe_jax.statistics import Stats

Layer = Mapping[str, np.ndarray]
Grouping = Literal["nearest", "clusters", "salient_first"]
Similarity = Literal["router", "output", "output_and_router", "weights"]
MergeWeights = Literal["frequency", "score", "uniform"]
MergeRouter = Literal["mean", "kept"]


@dataclass(frozen=True)
class MergeRecipe:
    """How experts are grouped and merged.

    Attributes:
        criterion: ranks experts, a name in ``scoring.EXPERT_CRITERIA``: the highest stay, or the
            highest of each cluster.
        grouping: ``nearest`` and ``salient_first`` choose first who stays and then who joins whom;
            ``clusters`` is hierarchical.
        similarity: what stands for an expert: its column of ``router`` logits over all tokens; its
            mean ``output`` over its own tokens; its ``weights``; or, as ``output_and_router``, the
            mean of two cosines, of summed outputs times routing weights and of router logits.
            Compared by cosine, in ``clusters`` by Euclidean distance.
        weights: of the mean: ``frequency`` (selections), ``score`` or ``uniform``.
        align: permute neurons to those of the expert that stays, see ``prune.merge``.
        router: the merged expert's row: ``mean`` by the same weights, or ``kept``.
        cap: experts in a group at most, the one that stays among them; None: no bound.
    """

    criterion: str
    grouping: Grouping = "nearest"
    similarity: Similarity = "router"
    weights: MergeWeights = "frequency"
    align: bool = True
    router: MergeRouter = "mean"
    cap: int | None = None

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("grouping", self.grouping, get_args(Grouping)),
            ("similarity", self.similarity, get_args(Similarity)),
            ("weights", self.weights, get_args(MergeWeights)),
            ("router", self.router, get_args(MergeRouter)),
        ):
            if value not in choices:
                raise ValueError(f"merge_{name} must be one of {choices}, got {value!r}")
        if self.cap is not None and self.cap < 2:
            raise ValueError(f"merge_cap must be at least 2, got {self.cap}")
        if self.grouping == "clusters" and self.similarity == "output_and_router":
            raise ValueError(
                "merge_similarity of clusters must be 'router', 'output' or 'weights' (distances "
                "in different spaces do not add up), got 'output_and_router'"
            )
        if self.grouping == "clusters" and self.cap is not None:
            raise ValueError(f"clusters have no merge_cap, got {self.cap}")


# M-SMoE (arXiv 2310.01334): the most frequently chosen experts stay, every other one
# joins the one with the most similar router logits, neurons are aligned by their weights, and the
# mean is weighted by frequency. Here similarities run over all calibration tokens, frequencies are
# plain counts, and what is merged are the router's rows too, as a stock checkpoint wants it.
M_SMOE = MergeRecipe("frequency")

# HC-SMoE (arXiv 2410.08589): hierarchical clusters, average linkage, Euclidean distance of mean
# outputs (its tables compare router logits and weights); the mean is weighted by frequency, without
# alignment. The most frequent expert of a cluster, "dominant" there, lends place and order of
# neurons. In the paper all router rows stay, and those of a cluster point to one merged expert. A
# stock checkpoint cannot say that without storing a copy for every row, so rows are merged too.
HC_SMOE = MergeRecipe("frequency", grouping="clusters", similarity="output", align=False)

# REAM (arXiv 2604.04356 and its authors' code): experts with the highest REAP score stay with their
# router rows, take groups of at most 16 in turn, and are merged with weights in proportion to it,
# after alignment. Choices of ours, as the statistics are sums over each expert's own tokens: mean
# outputs weighted by routing are over these rather than over all tokens; alignment goes by
# weights alone, where the authors add activations; an expert with score 0 gets no weight, where
# they give it the least. They also measure each layer after those before it are merged, which
# several stages come close to.
REAM = MergeRecipe(
    "reap",
    grouping="salient_first",
    similarity="output_and_router",
    weights="score",
    router="kept",
    cap=16,
)

MERGE_RECIPES = {"m_smoe": M_SMOE, "hc_smoe": HC_SMOE, "ream": REAM}


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
        ValueError: statistics without what the recipe needs, clusters too small for all experts,
            negative scores as weights, or a plan by groups of ids with a recipe that clusters.
    """
    scope = plan.settings.get("scope", "layer")
    if recipe.grouping == "clusters" and scope == "group":
        # A cluster's expert may lie in any group, so that groups would not keep equally many.
        raise ValueError(f"clusters need a plan of scope 'layer' or 'global', got {scope!r}")
    check_recipe(recipe, config.router)
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


def check_recipe(recipe: MergeRecipe, router: RouterConfig) -> None:
    """Raises ValueError for clusters that a router with groups cannot have."""
    if recipe.grouping == "clusters" and router.groups > 1:
        raise ValueError(
            f"clusters would leave the router's {router.groups} groups unequal; merge by a recipe "
            "that joins experts to those that stay"
        )


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
        return [gather(_weight_products(experts)).astype(np.float64)]
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
        jnp.tensordot(
            leaf,
            leaf,
            (tuple(range(1, leaf.ndim)),) * 2,
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


def check_capacity(kept: int, experts: int, cap: int | None) -> None:
    """Raises ValueError if ``kept`` groups of at most ``cap`` cannot hold all experts."""
    if cap is not None and kept * cap < experts:
        raise ValueError(
            f"{kept} clusters of at most merge_cap = {cap} experts cannot hold {experts}; "
            "raise merge_cap or keep more"
        )


def join_nearest(
    kept: Sequence[int], similarity: Float[np.ndarray, "E E"], cap: int
) -> list[list[int]]:
    """Every other expert joins the most similar of ``kept`` (M-SMoE, arXiv 2310.01334).

    A group takes at most ``cap`` experts, the one that stays among them; where several want the
    last place, the most similar one gets it, and the others go to their next best.
    """
    groups = {k: [k] for k in kept}
    free = set(range(len(similarity))) - set(kept)
    for _, k, e in sorted((-similarity[k, e], k, e) for k in kept for e in free):
        if e in free and len(groups[k]) < cap:
            groups[k].append(e)
            free.remove(e)
    return list(groups.values())


def join_salient_first(
    kept: Sequence[int],
    similarity: Float[np.ndarray, "E E"],
    scores: Float[np.ndarray, " E"],
    cap: int,
) -> list[list[int]]:
    """The highest score first, each of ``kept`` takes the most similar experts that are left.

    It takes them until its group holds ``cap``, so that most of ``kept`` stay as they are and a
    few are merged with many (REAM's "pseudo-pruning", arXiv 2604.04356).
    """
    groups = {k: [k] for k in kept}
    free = set(range(len(similarity))) - set(kept)
    for k in sorted(kept, key=lambda e: (-scores[e], e)):
        groups[k] += sorted(free, key=lambda e: (-similarity[k, e], e))[: cap - 1]
        free -= set(groups[k])
    return list(groups.values())


def clusters(
    distance: Float[np.ndarray, "E E"], count: int, scores: Float[np.ndarray, " E"]
) -> list[list[int]]:
    """Agglomerative clustering, average linkage, until ``count`` groups are left.

    Of each, the expert with the highest score comes first (HC-SMoE, arXiv 2410.08589).
    """
    experts = len(distance)
    members = {e: [e] for e in range(experts)}
    if count < experts:
        # Exactly so many, which a threshold does not give where distances are equal.
        joined = linkage(squareform(distance, checks=False), "average")[: experts - count, :2]
        for step, (a, b) in enumerate(joined.astype(int).tolist()):
            members[experts + step] = members.pop(a) + members.pop(b)
    return [sorted(group, key=lambda e: (-scores[e], e)) for group in members.values()]
