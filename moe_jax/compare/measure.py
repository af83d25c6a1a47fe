"""Compressed models in a form in which many of them share compiled programs."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.config import ModelConfig, MoeConfig
from moe_jax.params import expert_leaves, stack_experts

Params = dict[str, Any]


def canonical(params: Params, config: ModelConfig, width: int) -> tuple[Params, ModelConfig]:
    """The same function with each layer's novices last among its router rows.

    Which experts are novices, and how wide each is, are part of a configuration and so of the
    compiled program: as they are, no two plans share one. Experts that differ in width are filled
    up with zeros to ``width``, the original's, novices beside them too: experts of no neurons.
    """
    layers = list(params["layers"])
    for i in config.moe_layers:
        moe, part = config.moe(i), dict(layers[i]["moe"])
        if not moe.novice_ids and not moe.expert_widths:
            continue
        order = np.array([*moe.expert_ids, *moe.novice_ids])
        part["router"] = {**part["router"], "kernel": part["router"]["kernel"][:, order]}
        if moe.expert_widths:
            leaves = expert_leaves(config, i)
            part = _of_one_width(part, moe, leaves, width)
            facts = {"expert_widths": (), "expert_width": width, "expert_bias": True}
            config = config.replace_moe(i, novice_ids=(), **facts)
        else:
            last = tuple(range(len(moe.expert_ids), moe.num_experts))
            config = config.replace_moe(i, novice_ids=last)
        layers[i] = {**layers[i], "moe": part}
    return {**params, "layers": layers}, config


def _of_one_width(part: Params, moe: MoeConfig, leaves: Params, width: int) -> Params:
    """All experts and then all novices as experts of ``width`` neurons and a constant."""
    novices, missing = len(moe.novice_ids), width - moe.expert_width
    experts = {}
    for name, array in stack_experts(part["experts"], leaves).items():
        more = {"E": novices, "F": missing}
        experts[name] = jnp.pad(array, [(0, more.get(axis, 0)) for axis in leaves[name].axes])
    model_width = part["router"]["kernel"].shape[0]
    bias = part.get("expert_bias", jnp.zeros((len(moe.expert_ids), model_width)))
    if novices:
        bias = jnp.concatenate([bias, part["novices"]["constant"]])
    rest = {name: leaves for name, leaves in part.items() if name != "novices"}
    return {**rest, "experts": experts, "expert_bias": bias}
