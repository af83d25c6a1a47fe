"""Temporaries of a run's compiled steps: XLA's own count, on abstract weights and batches.

Nothing is allocated. A step is compiled for models of a few layers, twice for each kind of layer,
and what one more of a kind takes is multiplied by how many there are: XLA plans equal layers alike.
What a mesh of more devices than this process has would take is found in one that simulates them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.calibrate.gradients import Objective, expert_pulls, layer_gradients, mask_gradients
from moe_jax.calibrate.sums import StreamBatch, Wanted, batch_sums, layer_sums, stream_sums
from moe_jax.config import LayerConfig, ModelConfig
from moe_jax.distill.settings import TrainSettings
from moe_jax.distill.step import abstract_state, make_step, scans, split_trained
from moe_jax.evaluate.held_out import evaluation_step
from moe_jax.params import Leaf, abstract_params, layer_leaves, stack_leaves
from moe_jax.processes import BATCH_AXES, leaf_shardings
from moe_jax.run.devices import simulated_mesh


class Step(NamedTuple):
    """A jitted step of a run.

    Attributes:
        models: whose layers it goes through side by side.
        lower: the step for such models, perhaps of fewer layers, on a mesh.
        by_depth: whether it goes through all layers; else through one at a time.
        base: layers of each kind that it is compiled for, and then with one more: what the first
            one makes may be shared with the ends.
    """

    models: tuple[ModelConfig, ...]
    lower: Callable[[tuple[ModelConfig, ...], Mesh | None], Any]
    by_depth: bool = True
    base: int = 2

    @property
    def kinds(self) -> list[tuple[LayerConfig, ...]]:
        """What lies side by side at each depth; dropped layers are taken from the end."""
        return list(zip(*(model.layers for model in self.models), strict=False))

    def shortened(self, keep: Mapping[tuple[LayerConfig, ...], int]) -> tuple[ModelConfig, ...]:
        """The models with so many layers of each kind, the first ones."""
        seen: Counter = Counter()
        kept = []
        for kind in self.kinds:
            if seen[kind] < keep.get(kind, 0):
                kept.append(kind)
            seen[kind] += 1
        return tuple(
            dataclasses.replace(model, layers=layers)
            for model, layers in zip(self.models, zip(*kept, strict=True), strict=True)
        )

    def temporaries(self, mesh: Mesh | None) -> int:
        """Bytes that a device needs beside arguments and results."""

        def compiled(keep: Mapping[tuple[LayerConfig, ...], int]) -> int:
            lowered = self.lower(self.shortened(keep), mesh)
            return lowered.compile().memory_analysis().temp_size_in_bytes

        counts = Counter(self.kinds)
        if not self.by_depth:
            return max(compiled({kind: 1}) for kind in counts)
        first = {kind: min(self.base, count) for kind, count in counts.items()}
        total = start = compiled(first)
        for kind, count in counts.items():
            if more := count - first[kind]:
                total += more * (compiled(first | {kind: first[kind] + 1}) - start)
        return total


def temporaries(
    steps: Mapping[str, Step], sizes: Mapping[str, int], device: str = ""
) -> tuple[dict[str, int], str]:
    """``Step.temporaries`` of every step on a mesh of such sizes, and what compiled them.

    Args:
        device: a name in ``devices.DEVICES``, whose compiler is used if it is there.

    Raises:
        RuntimeError: a step does not compile.
    """
    # XLA's CPU multiplies bfloat16 as float32, and out of a loop over sequences it would take the
    # conversions of all weights, which accelerators do not need.
    hoisting = "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(math.prod(sizes.values())),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_disable_hlo_passes={hoisting} "
        "--xla_backend_optimization_level=0",  # nothing runs
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=pickle.dumps((steps, dict(sizes), device)),
        env=environment,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"the steps do not compile for mesh {dict(sizes)}: {''.join(reason)}")
    found, kind = json.loads(done.stdout.splitlines()[-1])
    return found, kind


def abstract_weights(
    config: ModelConfig, dtype: Any, mesh: Mesh | None, stacked: bool = False
) -> dict[str, Any]:
    """Shapes, dtypes and places of a model's weights."""
    leaves = abstract_params(config)
    return placed(stack_leaves(leaves) if stacked else leaves, dtype, mesh)


def placed(leaves: Any, dtype: Any, mesh: Mesh | None) -> Any:
    """Abstract arrays of leaves, which may be those of a part of a model."""

    def made(leaf: Leaf, place: Any = None) -> jax.ShapeDtypeStruct:
        kind = jnp.float32 if leaf.exact else dtype
        return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=place)

    return jax.tree.map(made, leaves, *([] if mesh is None else [leaf_shardings(leaves, mesh)]))


def abstract_batch(
    shape: tuple[int, ...], mesh: Mesh | None, **dtypes: Any
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch with such arrays, split as ``processes.place_batch`` does."""
    place = None if mesh is None else NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in dtypes.items()
    }


# Ways to lower a step: all but models and mesh is bound when it is planned.


def lower_sums(shape, dtype, hidden, mixed, shared, models, mesh):
    """The forward pass of calibration, with second moments of experts, heads or shared experts."""
    (model,) = models
    experts, every = model.moe_layers, tuple(range(model.num_layers))
    wanted = Wanted(True, experts * hidden, every * mixed, experts * shared)
    batch = abstract_batch(shape, mesh, tokens=jnp.int32, mask=jnp.bool_)
    return batch_sums.lower(abstract_weights(model, dtype, mesh), model, batch, "auto", wanted)


def lower_stream(shape, dtype, models, mesh):
    """What compares the residual stream at all depths: the end of calibration's forward pass."""
    (model,) = models
    x = abstract_batch((*shape, model.width), mesh, x=dtype)["x"]
    valid = abstract_batch((math.prod(shape),), mesh, valid=jnp.bool_)["valid"]
    return stream_sums.lower([x] * (model.num_layers + 1), valid)


def _within(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Lowers what ``processes.on_mesh_of`` is entered for: each device runs its own experts."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def lower_layer_sums(shape, dtype, wanted, models, mesh):
    """The same of one layer, from its input."""
    (model,) = models
    layer = model.layers[0]
    weights = placed(layer_leaves(model, 0), dtype, mesh)
    batch = abstract_batch(shape, mesh, mask=jnp.int32)
    x = abstract_batch((*shape, model.width), mesh, x=dtype)["x"]
    return layer_sums.lower(weights, model, layer, StreamBatch(x, batch["mask"]), "auto", wanted)


def lower_layer_gradients(shape, dtype, models, mesh):
    """The backward pass of one layer, from the gradient behind it."""
    (model,) = models
    weights = placed(layer_leaves(model, 0), dtype, mesh)
    batch = abstract_batch(shape, mesh, mask=jnp.bool_)
    x = abstract_batch((*shape, model.width), mesh, x=dtype)["x"]
    return layer_gradients.lower(weights, model, model.layers[0], x, x, batch["mask"], "auto")


def lower_gradients(shape, dtype, loss, top_k, models, mesh):
    """The backward pass of calibration for one loss."""
    model, teacher = models
    weights = abstract_weights(model, dtype, mesh)
    batch = abstract_batch(shape, mesh, tokens=jnp.int32, mask=jnp.bool_)
    if loss == "rerouting":
        with _within(mesh):
            return expert_pulls.lower(weights, model, batch, "auto")
    objective = Objective(model, teacher, loss, top_k, "auto")
    other = weights if model == teacher else abstract_weights(teacher, dtype, mesh)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    with _within(mesh):
        return mask_gradients.lower(weights, other, batch, rng, objective)


def lower_training(shape, dtype, settings: TrainSettings, cached, models, mesh):
    """The training step, with a live teacher unless its predictions are ``cached``."""
    model, teacher = models
    chosen = tuple(i for i in settings.hidden_layers if i < model.num_layers)
    settings = dataclasses.replace(settings, hidden_layers=chosen)
    state = abstract_state(model, settings, mesh)
    weights = abstract_weights(model, dtype, mesh, stacked=scans(model, settings))
    leaves = abstract_params(model)
    leaves = stack_leaves(leaves) if scans(model, settings) else leaves
    _, frozen = split_trained(weights, leaves, settings)
    batch = abstract_batch(shape, mesh, tokens=jnp.int32, segment_ids=jnp.int32)
    live = settings.needs_teacher and not cached
    if settings.needs_teacher and cached:
        wide = (*shape, settings.top_k)
        batch |= abstract_batch(wide, mesh, teacher_ids=jnp.int32, teacher_log_probs=jnp.float32)
    other = abstract_weights(teacher, dtype, mesh, scans(teacher, settings)) if live else None
    step: Any = make_step(model, settings, teacher if live else None, mesh and state)
    with _within(mesh):
        return step.lower(state, frozen, other, batch)


def lower_evaluation(shape, dtype, models, mesh):
    """Held-out losses of a model and of the original, in one step."""
    model, original = models
    batch = abstract_batch(
        shape, mesh, tokens=jnp.int32, segment_ids=jnp.int32, targets=jnp.int32, mask=jnp.bool_
    )
    weights, other = (abstract_weights(m, dtype, mesh) for m in (model, original))
    with _within(mesh):
        return evaluation_step.lower(weights, model, batch, other, original)


def bytes_per_device(tree: Any) -> int:
    """Of abstract or real arrays, by where they lie."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        place: Any = getattr(leaf, "sharding", None)
        shape = leaf.shape if place is None else place.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def _main() -> None:
    steps, sizes, device = pickle.load(sys.stdin.buffer)
    try:
        found = _on_mesh(steps, *simulated_mesh(sizes, device))
    except jax.errors.JaxRuntimeError as error:  # the TPU's compiler refuses what does not fit
        if not device or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        mesh, kind = simulated_mesh(sizes)
        found = _on_mesh(steps, mesh, f"{kind} ({device}'s compiler runs out of memory)")
    print(json.dumps(found))


def _on_mesh(steps: Mapping[str, Step], mesh: Mesh, kind: str) -> tuple[dict[str, int], str]:
    one_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    return {name: step.temporaries(None if one_cpu else mesh) for name, step in steps.items()}, kind


if __name__ == "__main__":
    _main()
