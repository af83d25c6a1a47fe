"""Where each part of a smaller model comes from in the checkpoint that it was made of.

It follows from configurations and plans alone: which layer of the source a layer is, which of its
experts each router row is, which neurons are left of it, and which leaves have numbers of their
own. What a lineage does not call new, the source holds to the bit, so that an export can carry
packed weights over as they are, and an account of every tensor can be given before any is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int

from moe_jax.config import LayerConfig, ModelConfig, MoeConfig
from moe_jax.params import PARTS, abstract_params, leaves_with_path, path_name

if TYPE_CHECKING:
    from moe_jax.plan import LayerPlan, Plan

_CONSTANT, _EXPERT_BIAS, _DOWN = "moe.novices.constant", "moe.expert_bias", "moe.experts.down"
_OF_ROUTERS = frozenset(f"moe.router.{name}" for name in ("kernel", "bias", "correction"))
_OF_EXPERTS = frozenset(
    (_EXPERT_BIAS, *(f"moe.experts.{n}" for n in ("gate", "up", "down", "gate_bias", "up_bias")))
)
_SHARED_DOWN = "moe.shared.down"
_REFITTED = frozenset((_DOWN, _EXPERT_BIAS, _CONSTANT, _SHARED_DOWN))


@dataclass(frozen=True, eq=False)
class RowOrigin:
    """Where a router row, and the expert or novice that it chooses, comes from.

    Attributes:
        source: the router row in the source's layer.
        neurons: of each of the expert's neurons, which one of the source's expert it is, -1 for one
            whose weights are zeros; None: all of them, in order.
        new: leaves within the layer, such as ``moe.experts.down``, that have numbers of their own
            in what belongs to this row.
    """

    source: int
    neurons: Int[np.ndarray, " F"] | None = None
    new: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class LayerOrigin:
    """Where a layer comes from.

    Attributes:
        source: the layer in the source.
        rows: of its router, none without experts.
        kv_groups: the source's key/value heads that are left, with the query heads that read them.
        shared: neurons of the source's shared expert that are left; None: all.
        new: leaves within the layer that have numbers of their own, whole.
    """

    source: int
    rows: tuple[RowOrigin, ...]
    kv_groups: tuple[int, ...]
    shared: tuple[int, ...] | None = None
    new: frozenset[str] = frozenset()


class Origin(NamedTuple):
    """Where a leaf, or one entry along its first axis, lies in the source.

    Attributes:
        path: of the source's leaf.
        row: index into its first axis; None: the whole leaf.
        kept: by letter of ``params.AXES``, which of the source's entries are left along every axis
            of that letter (along F, -1 stands for zeros); letters along which all are, in order,
            are left out.
        new: whether it has numbers of its own in the place of those.
    """

    path: tuple
    row: int | None
    kept: Mapping[str, np.ndarray]
    new: bool


@dataclass(frozen=True, eq=False)
class Lineage:
    """Where a model comes from.

    Attributes:
        source, config: the architectures of the checkpoint and of the model.
        layers: of the model.
        new: leaves outside of layers that have numbers of their own.
    """

    source: ModelConfig
    config: ModelConfig
    layers: tuple[LayerOrigin, ...]
    new: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: ModelConfig) -> Lineage:
        """That of a checkpoint's own model."""
        layers = tuple(
            LayerOrigin(
                i,
                tuple(RowOrigin(e) for e in range(layer.feed_forward.num_experts))
                if isinstance(layer.feed_forward, MoeConfig)
                else (),
                tuple(range(layer.num_kv_heads)),
            )
            for i, layer in enumerate(config.layers)
        )
        return cls(config, config, layers)

    def after(self, plan: Plan, smaller: ModelConfig) -> Lineage:
        """That of what ``apply_plan``, and the refit that the plan's settings ask for, leave.

        Args:
            plan: of a cut of ``self.config``.
            smaller: what it leaves, ``plan.planned_config`` of both.
        """
        kept = [i for i in range(self.config.num_layers) if i not in plan.dropped_layers]
        layers = []
        for n, i in enumerate(kept):
            layer, cut = self.layers[i], plan.layers.get(i)
            if cut is not None:
                layer = _after(layer, cut, self.config.layers[i], smaller.layers[n])
            if plan.settings.get("refit") and layer.rows:
                layer = dataclasses.replace(layer, new=layer.new | _REFITTED)
            layers.append(layer)
        return dataclasses.replace(self, config=smaller, layers=tuple(layers))

    def changed(self, parts: Collection[str] = PARTS) -> Lineage:
        """That of a model of which these parts, see ``params.PARTS``, were trained."""
        new: dict[int | None, set[str]] = {i: set() for i in (None, *range(len(self.layers)))}
        for path, leaf in leaves_with_path(abstract_params(self.config)):
            if leaf.part in parts:
                inside = path[0] == "layers"
                new[path[1] if inside else None].add(_name(path[2:] if inside else path))
        layers = (
            dataclasses.replace(layer, new=layer.new | new[i])
            for i, layer in enumerate(self.layers)
        )
        return dataclasses.replace(self, layers=tuple(layers), new=self.new | new[None])

    def origins(self, path: tuple) -> list[Origin | None]:
        """Where a leaf comes from; None if the source has no counterpart, as of constants made.

        Returns:
            Of a leaf whose first axis runs over experts or novices an entry for each; one of
            others.
        """
        if path[0] != "layers":
            return [Origin(path, None, {}, path_name(path) in self.new)]
        layer, (_, i, *within) = self.layers[path[1]], path
        name = _name(tuple(within))
        if "experts" in within or name in (_EXPERT_BIAS, _CONSTANT):
            return self._of_rows(i, within)
        before = self.source.layers[layer.source]
        heads = np.arange(before.num_heads).reshape(before.num_kv_heads, -1)
        groups, rows = np.array(layer.kv_groups), np.array([row.source for row in layer.rows], int)
        kept: dict[str, np.ndarray] = {}
        if len(groups) < before.num_kv_heads:
            kept |= {"G": groups, "N": heads[groups].reshape(-1)}
        if layer.rows and len(rows) < self.source.moe(layer.source).num_experts:
            kept["R"] = rows
        if layer.shared is not None:
            kept["U"] = np.array(layer.shared)
        of_routers = name in _OF_ROUTERS and any(name in row.new for row in layer.rows)
        path = ("layers", layer.source, *within)
        return [Origin(path, None, kept, name in layer.new or of_routers)]

    def _of_rows(self, i: int, within: list) -> list[Origin | None]:
        """Where the entries of a leaf that stacks experts, or novices, come from."""
        layer, moe = self.layers[i], self.config.moe(i)
        before = self.source.moe(layer.source)
        name, of_experts = _name(tuple(within)), "experts" in within
        bucket = next((part for part in within if isinstance(part, int)), None)
        if name == _CONSTANT:
            owners, places = moe.novice_ids, {e: ((), n) for n, e in enumerate(before.novice_ids)}
        else:
            owners = moe.expert_ids if bucket is None else moe.buckets[bucket].expert_ids
            places = _places(before, buckets=of_experts)
        if name == _EXPERT_BIAS and not before.expert_bias:
            return [None] * len(owners)
        found: list[Origin | None] = []
        for e in owners:
            row = layer.rows[e]
            if row.source not in places:
                found.append(None)
                continue
            buckets, n = places[row.source]
            path = [part for part in within if isinstance(part, str)]
            path[2:2] = buckets
            kept = {} if row.neurons is None or not of_experts else {"F": row.neurons}
            new = name in layer.new or name in row.new
            found.append(Origin(("layers", layer.source, *path), n, kept, new))
        return found


def gathered(array: np.ndarray, axes: tuple[str, ...], origin: Origin) -> np.ndarray:
    """What ``origin`` says that a part of a leaf is, of the source's leaf, or of its row there.

    Args:
        array: the leaf, or, where the origin names a row, that row alone, [1, ...].
        axes: the leaf's letters.

    Returns:
        Of a row, without its first axis.
    """
    if origin.row is not None:
        array, axes = array[0], axes[1:]
    for axis, letter in enumerate(axes):
        if (kept := origin.kept.get(letter)) is not None:
            array = np.take(array, kept, axis)
            if (kept < 0).any():
                np.moveaxis(array, axis, 0)[kept < 0] = 0
    return array


def _places(moe: MoeConfig, buckets: bool) -> dict[int, tuple[tuple, int]]:
    """By expert, the bucket of its leaves, if they come in such, and its row there."""
    if not (buckets and moe.expert_widths):
        return {e: ((), n) for n, e in enumerate(moe.expert_ids)}
    return {
        e: ((b,), n)
        for b, bucket in enumerate(moe.buckets)
        for n, e in enumerate(bucket.expert_ids)
    }


def _name(within: tuple) -> str:
    """Of a leaf within its layer, whatever the bucket."""
    return path_name(tuple(part for part in within if isinstance(part, str)))


def _after(layer: LayerOrigin, plan: LayerPlan, old: LayerConfig, new: LayerConfig) -> LayerOrigin:
    """Where a layer comes from once it is cut."""
    made = set(layer.new)
    groups = layer.kv_groups
    if plan.kv_groups is not None:
        groups = tuple(groups[group] for group in plan.kv_groups)
        made |= {"attention.out.kernel", "attention.out.bias"} if plan.repair else set()
    before, after = old.feed_forward, new.feed_forward
    if not isinstance(before, MoeConfig) or not isinstance(after, MoeConfig):
        return dataclasses.replace(layer, kv_groups=groups, new=frozenset(made))
    if plan.repair and (plan.neurons or plan.constants):
        made |= {_DOWN, _EXPERT_BIAS}
    if plan.constants:
        made.add(_EXPERT_BIAS)
    left = [e for e in range(before.num_experts) if e not in plan.vanishing]
    rows = tuple(
        _row_after(layer.rows[e], plan, e, before.width_of(e), after.width_of(n))
        for n, e in enumerate(left)
    )
    shared = layer.shared
    if plan.shared_neurons is not None:
        made |= {_SHARED_DOWN} if plan.repair else set()
        old_neurons = range(before.shared.width) if shared is None and before.shared else shared
        shared = tuple((old_neurons or ())[j] for j in plan.shared_neurons)
    return dataclasses.replace(
        layer, rows=rows, kv_groups=groups, shared=shared, new=frozenset(made)
    )


def _row_after(row: RowOrigin, plan: LayerPlan, expert: int, old: int, new: int) -> RowOrigin:
    """Where a router row comes from, ``old`` and ``new`` being the widths of its expert."""
    made = set(row.new)
    if expert in plan.novices:
        return RowOrigin(row.source, None, frozenset(made | {_CONSTANT}))
    if any(expert == merge.kept for merge in plan.merges):
        made |= _OF_EXPERTS | (_OF_ROUTERS if plan.merge_router == "mean" else set())
    neurons, kept = row.neurons, plan.neurons.get(expert, range(old))
    if new and (len(kept) < old or new != old):
        neurons = np.arange(old, dtype=np.int32) if neurons is None else neurons
        neurons = np.pad(neurons[list(kept)], (0, new - len(kept)), constant_values=-1)
    return RowOrigin(row.source, neurons, frozenset(made))
