"""Bytes of a run's checkpoints as they are stored, before and after, from shapes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from moe_jax.config import ModelConfig, MoeConfig
from moe_jax.hf.source import Source
from moe_jax.hf.stored_weights import Exported, foreseen_export
from moe_jax.lineage import Lineage
from moe_jax.plan import Cut, LayerPlan, Merge, Plan
from moe_jax.report.facts import Output
from moe_jax.run.stage import StageConfig
from moe_jax.settings import ExportConfig
from moe_jax.text import byte_size, two_digits


def stored_bytes(
    source: Source,
    stages: Sequence[StageConfig],
    models: Sequence[ModelConfig],
    export: ExportConfig,
    plans: Mapping[int, Plan] | None = None,
) -> str:
    """Some lines on what is stored of the source, and what will be of the result.

    Args:
        source: the checkpoint that the first stage starts from; of its tensors, shapes are read.
        stages: of the run.
        models: the source's, and what each stage makes of it.
        export: the run's.
        plans: by index, those of the stages that apply one.
    """
    assert source.hf is not None  # a run starts from a folder with config.json
    lineage = foreseen_lineage(stages, models, plans or {})
    facts, further = (models[-1], source.hf, source.infos, lineage), export.cut_further
    foreseen = foreseen_export(*facts, export.packing, further)
    before = source.nbytes
    lines = [f"weights as stored: {byte_size(before)} before, {byte_size(foreseen.nbytes)} after"]
    if foreseen.nbytes > before:
        lines[0] += ": LARGER than the source"
    if foreseen.packed or foreseen.reason:
        lines.append(f"  {_told(foreseen)}")
    if foreseen.reason and export.packing == "keep":
        other = foreseen_export(*facts, "source", further)
        if other.packed:
            lines.append(f"  export.packing = 'source' would leave {byte_size(other.nbytes)}.")
    return "\n".join(lines)


def described_export(exported: Exported) -> Output:
    """Of a packed checkpoint's export, what the report says of its output; nothing of others."""
    if not exported.packed and not exported.reason:
        return {}
    facts: Output = {"packed": exported.packed, "storage": [_told(exported)]}
    if exported.errors:
        error, name = exported.worst
        facts["packing_error"] = dict(exported.errors)
        each = ", ".join(f"{kind} {two_digits(e)}" for kind, e in exported.errors.items())
        facts["storage"].append(
            f"Packing again moved weights by a relative error (Frobenius) of {each}; the largest "
            f"of a tensor is {two_digits(error)}, of {name}."
        )
    return facts


def _told(exported: Exported) -> str:
    if not exported.packed:
        return f"The source's packed weights are written unpacked, in 16 bits: {exported.reason}."
    return (
        f"Packed as the source is: {exported.kept:,} tensors have its bytes, {exported.repacked:,} "
        "are packed again."
    )


def foreseen_lineage(
    stages: Sequence[StageConfig], models: Sequence[ModelConfig], plans: Mapping[int, Plan]
) -> Lineage:
    """Where the result of a run comes from, as far as that is known: see ``plan.foreseen``.

    Neurons that a ranking chooses are taken to lie scattered, so that no block stays whole.
    """
    lineage = Lineage.of(models[0])
    for i, (stage, smaller) in enumerate(zip(stages, models[1:], strict=True)):
        plan = plans.get(i)
        if plan is None and stage.cut is not None:
            plan = _stand_in(stage.cut, lineage.config, smaller)
        lineage = lineage if plan is None else lineage.after(plan, smaller)
        if stage.distill is not None:
            lineage = lineage.changed(stage.distill.trained_parts)
    return lineage


def _stand_in(cut: Cut, config: ModelConfig, smaller: ModelConfig) -> Plan:
    """A plan of the same kind as a cut's, between the same architectures."""
    layers = {}
    for i, (old, new) in enumerate(zip(config.layers, smaller.layers, strict=False)):
        groups = None
        if new.num_kv_heads < old.num_kv_heads:
            groups = tuple(range(new.num_kv_heads))
        layer = LayerPlan(kv_groups=groups, repair=cut.repairs, constants=cut.constants)
        before, after = old.feed_forward, new.feed_forward
        if isinstance(before, MoeConfig) and isinstance(after, MoeConfig):
            layer = _experts(layer, cut, before, after)
        layers[i] = layer
    dropped = tuple(range(smaller.num_layers, config.num_layers))
    return Plan(layers, settings={"refit": cut.refit}, dropped_layers=dropped)


def _experts(layer: LayerPlan, cut: Cut, before: MoeConfig, after: MoeConfig) -> LayerPlan:
    gone = tuple(range(after.num_experts, before.num_experts))
    scattered = {
        (old, new): tuple(n * old // new for n in range(new))
        for e in after.expert_ids
        if (new := after.width_of(e)) < (old := before.width_of(e))
    }
    return dataclasses.replace(
        layer,
        deleted=() if cut.recipe else gone,
        merges=(Merge(0, gone, (1.0,) * (len(gone) + 1)),) if cut.recipe and gone else (),
        novices=tuple(e for e in after.novice_ids if e not in before.novice_ids),
        neurons={
            e: scattered[key]
            for e in after.expert_ids
            if (key := (before.width_of(e), after.width_of(e))) in scattered
        },
    )
