"""Routed experts that are spread over the ``expert`` axis of a mesh.

Left to itself, XLA gathers every expert's weights on every device. Here each device runs its own
experts alone, on the tokens of all devices that share its ``data`` and ``fsdp`` coordinates: rows
of other devices' experts go behind its last group, where no product sees them, and the sums over
devices are the tokens' outputs. No token is dropped, whatever the router does.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_jax.config import Clamp
from moe_jax.ops.expert_mlp import expert_mlp
from moe_jax.ops.expert_rows import Experts, rows_of_groups

_TOKENS, _EXPERT, _NEURON = ("data", "fsdp"), "expert", "tensor"


def devices_of_experts() -> AbstractMesh | None:
    """The mesh of ``jax.set_mesh`` if experts are better run device by device on it, else None.

    It has these axes and several devices. Weights that ``fsdp`` alone splits stay with XLA: here
    each device would gather all of its experts' (of DeepSeek-V3 on 512 devices, 300 GB at a time).
    """
    mesh = jax.sharding.get_abstract_mesh()
    fits = {*_TOKENS, _EXPERT, _NEURON} <= mesh.shape.keys() and mesh.size > 1
    return mesh if fits and (mesh.shape[_EXPERT] > 1 or mesh.shape["fsdp"] == 1) else None


def sharded_experts(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    experts: tuple[Experts, ...],
    groups: Int[Array, "T K"],
    mesh: AbstractMesh,
    *,
    clamp: Clamp | None = None,
    backend: str = "auto",
) -> Float[Array, "T D"]:
    """``expert_mlp``'s sums, each device with its own experts.

    Args:
        weights: of the token's slots.
        experts: in ``x.dtype``, one bucket of each width, the widest first: E experts together,
            of which each bucket's lie on ``mesh`` as ``params.AXES`` has it.
        groups: the expert of each slot, in the order of ``experts``; E for none.
        mesh: with the axes ``processes.MESH_AXES``.
        clamp, backend: see ``expert_mlp``.
    """
    parts = mesh.shape[_EXPERT]
    by_token = P(_TOKENS) if len(x) % math.prod(mesh.shape[axis] for axis in _TOKENS) == 0 else P()
    wide: Any = P(_EXPERT, None, _NEURON)
    tall: Any = P(_EXPERT, _NEURON, None)
    bias: Any = None if experts[0].gate_bias is None else P(_EXPERT, _NEURON)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(
            by_token,
            by_token,
            by_token,
            (Experts(wide, wide, tall, bias, bias),) * len(experts),
        ),
        out_specs=by_token,
        check_vma=False,  # of the loops over blocks, whose carries start out as plain zeros
    )
    def run(x, weights, groups, experts):
        counts = [len(bucket.gate) for bucket in experts]
        own, total = _own_group(counts, parts)[jax.lax.axis_index(_EXPERT)], sum(counts)
        rows = rows_of_groups(own[groups], total)
        y, _ = expert_mlp(x, weights, experts, rows, clamp=clamp, keep=(), backend=backend)
        return jax.lax.psum(y.astype(jnp.float32), (_EXPERT, _NEURON)).astype(x.dtype)

    return run(x, weights, groups, experts)


def _own_group(counts: list[int], parts: int) -> Int[Array, "P E1"]:
    """On each part of the axis, the number there of every expert; ``sum(counts)`` if not there.

    Args:
        counts: experts of each bucket on one part.
    """
    total = sum(counts)
    own = np.full((parts, parts * total + 1), total, np.int32)
    for first, count in zip(np.cumsum([0, *counts]), counts, strict=False):
        for part in range(parts):
            start = parts * first + part * count
            own[part, start : start + count] = first + np.arange(count)
    return jnp.asarray(own)
