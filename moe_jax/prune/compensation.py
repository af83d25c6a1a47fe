"""What stays makes up for what goes: constants and repaired projections, from statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax.config import LayerConfig, MoeConfig
from moe_jax.plan import LayerPlan
from moe_jax.processes import gather
from moe_jax.prune.slicing import placed_like, stacked, take
from moe_jax.repair import over_experts, repaired_down
from moe_jax.statistics import Layers, Stats
from moe_jax.statistics_table import SHARED

_NEEDS = {
    "hidden_gram": "repair needs statistics with second moments; pass stats from "
    "calibrate(..., second_moments=True)",
    "mixed_gram": "repair of attention needs statistics with its second moments; pass stats from "
    "calibrate(..., attention_moments=True)",
    "shared_hidden_gram": "repair of a shared expert needs statistics with its second moments; "
    "pass stats from calibrate(..., shared_moments=True)",
}


@dataclass(frozen=True)
class LayerStatistics:
    """Arrays of one layer's statistics, checked against the layer that is pruned."""

    layer: int
    stats: Stats | None

    def experts(self, name: str, moe: MoeConfig, *shape: int) -> np.ndarray:
        """``[E, *shape]``, of all router rows; see ``_array`` for errors."""
        layers = self.stats.layers if self.stats else None
        return self._array(layers, name, (moe.num_experts, *shape))

    def shared(self, name: str, *shape: int) -> np.ndarray:
        """``[*shape]``, of the layer's shared expert; see ``_array`` for errors."""
        layers = self.stats.layers if self.stats else None
        return self._array(layers, f"{SHARED}{name}", (1, *shape))[0]

    def attention(self, name: str, *shape: int) -> np.ndarray:
        """``[*shape]``, of the layer's attention; see ``_array`` for errors."""
        return self._array(self.stats.attention if self.stats else None, name, shape)

    def gaps(self) -> np.ndarray | None:
        """What pulls experts towards the original's stream, [E, F + 1, D]; None if not measured."""
        return self.stats.layers.get(self.layer, {}).get("hidden_gap") if self.stats else None

    def _array(self, layers: Layers | None, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Raises ValueError if there is no such array, or if it is of another model."""
        arrays = (layers or {}).get(self.layer, {})
        if name not in arrays:
            need = _NEEDS.get(name, "constants take means of outputs from statistics; pass stats")
            raise ValueError(f"plan layer {self.layer}: {need} (there is no {name})")
        if arrays[name].shape != shape:
            raise ValueError(
                f"statistics of layer {self.layer} must be of this model, with {name} {shape}, got "
                f"{arrays[name].shape}"
            )
        return arrays[name]


class Moments(NamedTuple):
    """Second moments that repair of experts takes.

    Attributes:
        grams: of each expert's hidden activations and, last, the constant 1, [E, F + 1, F + 1].
        gaps: see ``LayerStatistics.gaps``.
    """

    grams: Float[np.ndarray, "E F1 F1"]
    gaps: Float[np.ndarray, "E F1 D"] | None

    def of(self, rows: Sequence[int]) -> Moments:
        """Those of some experts."""
        return Moments(self.grams[rows], None if self.gaps is None else self.gaps[rows])


class Compensation(NamedTuple):
    """What one layer's cut takes from statistics; None where its plan asks for none.

    Attributes:
        novices: constants of the new novices, [n, D], in the order of the plan.
        moments: of the experts with neurons, for their repair.
        neuron_means: mean activations of the experts with neurons, [E_kept, F].
        mixed_gram: second moments of what attention's output projection reads and, last, the
            constant 1.
        shared_gram: of the shared expert's hidden activations and, last, the constant 1.
    """

    novices: Float[np.ndarray, "n D"]
    moments: Moments | None = None
    neuron_means: Float[np.ndarray, "E F"] | None = None
    mixed_gram: Float[np.ndarray, "NH1 NH1"] | None = None
    shared_gram: Float[np.ndarray, "U1 U1"] | None = None


def compensation(
    plan: LayerPlan,
    layer: LayerConfig,
    leaves: dict[str, Any],
    weights: dict[str, Any],
    statistics: LayerStatistics,
) -> Compensation:
    """Reads what a layer's plan needs of statistics.

    Args:
        plan, layer, leaves, weights: of this layer.
        statistics: of this layer.

    Raises:
        ValueError: the statistics lack something, or are of another model.
    """
    moe, mixed_gram = layer.feed_forward, None
    width = len(weights["mlp_norm"]["scale"])
    if plan.repair and plan.kv_groups is not None:
        size = weights["attention"]["out"]["kernel"][..., 0].size + 1
        mixed_gram = statistics.attention("mixed_gram", size, size)
    if not isinstance(moe, MoeConfig):
        return Compensation(np.zeros((0, width), np.float32), mixed_gram=mixed_gram)
    novices = _new_novices(plan, moe, leaves, weights, statistics)
    moments = means = shared_gram = None
    if plan.repair and plan.shared_neurons is not None and moe.shared is not None:
        shared_gram = statistics.shared("hidden_gram", *[moe.shared.width + 1] * 2)
    if plan.repair and (plan.neurons or plan.constants):
        moments = _moments(moe, statistics).of(list(moe.expert_ids))
    elif plan.constants:
        means = statistics.experts("neuron_mean", moe, moe.expert_width)[list(moe.expert_ids)]
    return Compensation(novices, moments, means, mixed_gram, shared_gram)


def _moments(moe: MoeConfig, statistics: LayerStatistics) -> Moments:
    size = moe.expert_width + 1
    return Moments(statistics.experts("hidden_gram", moe, size, size), statistics.gaps())


def _new_novices(
    plan: LayerPlan,
    moe: MoeConfig,
    leaves: dict[str, Any],
    weights: dict[str, Any],
    statistics: LayerStatistics,
) -> Float[np.ndarray, "n D"]:
    ids, width = list(plan.novices), len(weights["mlp_norm"]["scale"])
    if not ids or plan.novice_value == "zero":
        return np.zeros((len(ids), width), np.float32)
    if plan.novice_value == "least_squares":
        # What repair leaves of an expert that keeps no neuron is its constant.
        rows = np.array([moe.expert_ids.index(e) for e in ids])
        one = stacked(leaves, weights)[1]["moe"]
        moments = _moments(moe, statistics).of(ids)
        down, bias = one["experts"]["down"][rows], take(expert_constants(one), rows, 0)
        constants = repair_experts(down, bias, [()] * len(ids), moments)[1]
        return gather(constants).astype(np.float32)
    if plan.novice_value == "mean":
        return statistics.experts("output_mean", moe, width)[ids]
    gated = statistics.experts("gated_output", moe, width)[ids]
    return _weighted_means(gated, statistics.experts("routing_mass", moe)[ids])


def expert_constants(weights: dict[str, Any]) -> Float[Array, "E D"]:
    """The constants that stacked experts add; zeros if they have none."""
    if "expert_bias" in weights:
        return weights["expert_bias"]
    kernel = weights["router"]["kernel"]
    return jnp.zeros((len(weights["experts"]["down"]), len(kernel)), kernel.dtype)


def _weighted_means(
    gated: Float[np.ndarray, "n D"], mass: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "n D"]:
    """``sum_t w_t y_t / sum_t w_t``: the constant c that minimises ``sum_t w_t ||y_t - c||^2``.

    MoNE's plain mean minimises the sum without weights; here the tokens that give an expert a large
    part in their output count for more. Zero for an expert that has no routing weight.
    """
    mass = mass[:, None].astype(np.float64)
    mean = np.divide(gated, mass, out=np.zeros(gated.shape), where=mass > 0)
    return mean.astype(np.float32)


def repair_experts(
    down: Float[Array, "E F D"],
    bias: Float[Array, "E D"] | None,
    kept: Sequence[Sequence[int]],
    moments: Moments,
) -> tuple[Float[Array, "E F D"], Float[Array, "E D"] | None]:
    """Down rows ``kept`` of each expert and, if it has one, its constant, after repair.

    Other down rows are zero. A constant always stays: it takes over what it can as well. Gaps
    towards the original's stream are closed as far as it goes, too.
    """
    weights, mask = down.astype(jnp.float32), _mask(down.shape[:2], kept)
    size = down.shape[1]
    if bias is not None:  # a last row, which reads the constant 1
        weights = jnp.concatenate([weights, bias[:, None].astype(jnp.float32)], 1)
        mask, size = np.pad(mask, ((0, 0), (0, 1)), constant_values=True), size + 1
    gaps = () if moments.gaps is None else (jnp.asarray(moments.gaps[:, :size]),)
    grams = moments.grams[:, :size, :size]
    repaired = over_experts(_repaired, grams, weights, jnp.asarray(mask), *gaps).astype(down.dtype)
    if bias is None:
        return placed_like(repaired, down), None
    return placed_like(repaired[:, :-1], down), placed_like(repaired[:, -1], bias)


# At the top of the module, so that its compiled form is found again for every layer.
def _repaired(gram, down, kept, gap=None):
    return repaired_down(gram, down, kept, gap=gap)


def _mask(shape: tuple[int, ...], kept: Sequence[Sequence[int]]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for row, neurons in zip(mask, kept, strict=True):
        row[list(neurons)] = True
    return mask


def compensated_bias(
    down: Float[Array, "E F D"],
    bias: Float[Array, "E D"],
    kept: Sequence[Sequence[int]],
    means: Float[np.ndarray, "E F"],
) -> Float[Array, "E D"]:
    """``bias`` plus the mean of what the neurons that go added (FLAP, arXiv 2312.11983)."""
    lost = np.where(_mask(means.shape, kept), np.float32(0), means.astype(np.float32))
    added = jnp.einsum("ef,efd->ed", lost, down.astype(jnp.float32), precision="highest")
    return placed_like((bias.astype(jnp.float32) + added).astype(bias.dtype), bias)


def repair_shared(
    weights: dict[str, Any], kept: np.ndarray, gram: Float[np.ndarray, "U1 U1"]
) -> dict[str, Any]:
    """A layer's shared expert whose down rows ``kept`` make up for the others, which are zeros.

    It is linear in its hidden activations times its gate, of which ``gram`` has the second moments
    and, last, those with the constant 1: it has no constant.
    """
    down = weights["down"]
    stays = np.zeros(len(down), bool)
    stays[kept] = True
    repaired = repaired_down(gram[:-1, :-1], down.astype(jnp.float32), jnp.asarray(stays))
    return {**weights, "down": placed_like(repaired.astype(down.dtype), down)}


def repair_attention(
    weights: dict[str, Any], kept: np.ndarray, gram: Float[np.ndarray, "NH1 NH1"]
) -> dict[str, Any]:
    """A layer's attention whose output projection does without some of its query heads.

    Attention adds ``y = sum_n m_n W_n + b`` to the stream, linear in the mixed heads ``m``: so the
    rows of the heads that stay (and the bias, if there is one) take over what they can of the
    others' by least squares, as an expert's do (see ``repair.repaired_down``).

    Args:
        weights: of attention, all heads; they come back whole, with zeros in the projections of
            heads that go.
        kept: query heads that stay.
        gram: second moments of the mixed heads and, last, the constant 1.
    """
    out = weights["out"]
    kernel: Float[Array, "N H D"] = out["kernel"]
    rows = kernel.reshape(-1, kernel.shape[-1]).astype(jnp.float32)
    stays = np.zeros(kernel.shape[:2], bool)
    stays[kept] = True
    mask = stays.reshape(-1)
    if "bias" in out:
        rows = jnp.concatenate([rows, out["bias"][None].astype(jnp.float32)])
        mask = np.append(mask, True)
    repaired = repaired_down(gram[: len(mask), : len(mask)], rows, jnp.asarray(mask))
    changed = {"kernel": repaired[: stays.size].reshape(kernel.shape)}
    if "bias" in out:
        changed["bias"] = repaired[-1]
    changed = {n: placed_like(new.astype(out[n].dtype), out[n]) for n, new in changed.items()}
    return {**weights, "out": {**out, **changed}}
