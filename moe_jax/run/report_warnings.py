"""What a reader of a run's report should not miss, as sentences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.plan import LayerPlan, Plan
from moe_jax.report.facts import Layer, Stage
from moe_jax.report.stage_sections import experts_named
from moe_jax.scoring.super_experts import super_experts
from moe_jax.statistics import Stats

# Below this many tokens an expert's mean and variance say little.
_FEW_TOKENS = 32
# What serving kernels like expert widths to be multiples of.
_ALIGNMENT = 32
_SHOWN_NAMES = 5


def describe_warnings(stages: Sequence[Stage], config: ModelConfig) -> list[str]:
    """Sentences on what a reader should not miss; ``config`` is that of the result."""
    warnings = [
        f"Stage {n}: {text}" for n, stage in enumerate(stages) for text in stage.get("warnings", ())
    ]
    widths = {config.moe(i).expert_width for i in config.moe_layers}
    odd = sorted(width for width in widths if width % _ALIGNMENT)
    before = [
        layer["expert_width"][0]
        for s in stages
        for layer in s["layers"][:1]
        if "expert_width" in layer
    ]
    if odd and any(width not in widths for width in before):
        warnings.append(
            f"Expert width {odd[0]} is not a multiple of {_ALIGNMENT}, which serving kernels "
            "prefer; set round_to."
        )
    return warnings


def super_warnings(stats: Stats, plan: Plan) -> list[str]:
    """Experts that a model may not do without, and whether the plan removes any."""
    found = super_experts(stats)
    if not found:
        return []
    names = [f"{e} of layer {i}" for i, ids in found.items() for e in ids]
    removed = [
        f"{e} of layer {i}"
        for i, ids in found.items()
        for layer in [plan.layers.get(i, LayerPlan())]
        for e in ids
        if e in {*layer.vanishing, *layer.novices}
    ]
    lost = f" The plan removes {_first(removed, ', ', 'more')}: set super_floor." if removed else ""
    return [
        f"The largest output of experts {_first(names, ', ', ' more')} stands out over all others' "
        f"(super experts): without such a one a model may collapse.{lost}"
    ]


def moment_warnings(layers: Sequence[Layer]) -> list[str]:
    """Where second moments are singular."""
    lines = experts_named(layers, lambda layer: layer.get("fewer_tokens_than_neurons") or ())
    if not lines:
        return []
    few = sum(len(layer.get("fewer_tokens_than_neurons") or ()) for layer in layers)
    every = sum(layer["num_experts"] for layer in layers)
    return [
        f"{few} of {every} experts were reached by fewer tokens than they have neurons "
        f"({_first(lines, '; ', ' more layers')}): their second moments are singular, and the "
        "ridge decides what the text leaves open; calibrate on more text."
    ]


def coverage_warnings(stats: Stats, num_sequences: int) -> list[str]:
    """What calibration text was too little for."""
    warnings = []
    if stats.sequences < num_sequences:
        found = ", ".join(
            f"{name} {domain['sequences']}" for name, domain in stats.facts["domains"].items()
        )
        warnings.append(
            f"{stats.sequences} of the {num_sequences} calibration sequences wanted were found "
            f"({found}); set pack to cut long documents into several, or give more text."
        )
    counts = np.concatenate([layer["count"] for layer in stats.layers.values()])
    unreached = stats.unreached()
    if unreached:
        warnings.append(
            f"no calibration token reached {len(unreached)} of {counts.size} experts "
            f"({_first(unreached, ', ', ' more')}); their scores are 0."
        )
    few = int((counts < _FEW_TOKENS).sum()) - len(unreached)
    if few:
        warnings.append(
            f"{few} of {counts.size} experts were reached by fewer than {_FEW_TOKENS} "
            "calibration tokens; calibrate on more text to rank them."
        )
    return warnings


def _first(names: Sequence[str], between: str, more: str) -> str:
    """The first few names, and how many more there are."""
    left = len(names) - _SHOWN_NAMES
    shown = between.join(names[:_SHOWN_NAMES])
    return f"{shown}{between if between == '; ' else ' '}and {left}{more}" if left > 0 else shown
