"""What a run takes on devices, hosts and disks, and how long, before any weight is read."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from moe_jax.calibrate.measurement import Measurement
from moe_jax.calibrate.memory import MomentPlan, moment_copies, passes_within
from moe_jax.calibrate.shares import share_out
from moe_jax.calibrate.sums import LayerWanted
from moe_jax.config import ModelConfig
from moe_jax.distill import TrainSettings
from moe_jax.distill.step import abstract_state, scans, split_trained
from moe_jax.params import ITEM_BYTES, abstract_params, count_params, layer_leaves
from moe_jax.plan import Cut
from moe_jax.processes import BATCH_AXES, MESH_AXES, check_rows, leaf_shardings
from moe_jax.run.compiled_memory import (
    Step,
    abstract_weights,
    bytes_per_device,
    lower_evaluation,
    lower_gradients,
    lower_layer_gradients,
    lower_layer_sums,
    lower_stream,
    lower_sums,
    lower_training,
    placed,
    temporaries,
)
from moe_jax.run.config import RunConfig
from moe_jax.run.devices import DEVICES
from moe_jax.statistics_table import requested_bytes, statistics_bytes
from moe_jax.text import MISSING, aligned, byte_size, counted, two_digits

_TRIES = 6  # meshes that a proposal compiles for


@dataclass(frozen=True)
class Phase:
    """What lies on a device while one kind of step runs, in bytes.

    Attributes:
        step: what is compiled for ``temporaries``; the gradients are part of these, and come out
            of them in the table.
    """

    name: str
    step: Step
    weights: int
    optimizer: int = 0
    gradients: int = 0
    statistics: int = 0
    moments: int = 0
    temporaries: int | None = None

    @property
    def total(self) -> int:
        resident = self.weights + self.optimizer + self.statistics + self.moments
        return resident + max(self.temporaries or 0, self.gradients)


@dataclass(frozen=True)
class MemoryPlan:
    """The plan of a run for one mesh.

    Attributes:
        run: with stages in the place of a target.
        models: what it starts from, and what each stage leaves.
        dtype: of computation.
        stored: of the result.
        memory: bytes of a device; None if it is not known.
        device: its name in ``devices.DEVICES``, if it has one.
    """

    run: RunConfig
    models: tuple[ModelConfig, ...]
    dtype: str
    stored: str
    memory: float | None = None
    device: str = ""

    @cached_property
    def mesh(self) -> Any:
        """Of this shape, without devices."""
        return AbstractMesh(tuple(self.run.mesh.get(a, 1) for a in MESH_AXES), MESH_AXES)

    @property
    def layerwise(self) -> bool:
        """Whether calibration holds one layer at a time, and so the whole run."""
        return getattr(self.run.calibration, "mode", "") == "layerwise"

    def weights(self, config: ModelConfig, dtype: Any = None) -> int:
        """Of a whole model on a device."""
        return bytes_per_device(abstract_weights(config, dtype or self.dtype, self.mesh))

    def held(self, i: int) -> int:
        """Of the original and of what stage ``i`` starts from, which training leaves in float32."""
        before = self.weights(self.models[0])
        if i and any(stage.distill for stage in self.run.stages[:i]):
            before += self.weights(self.models[i], jnp.float32)
            return before + (self.weights(self.models[i]) if self.dtype != "float32" else 0)
        return before + (self.weights(self.models[i]) if i else 0)

    def phases(self) -> Iterator[Phase]:
        """Every kind of step of the run, in order."""
        text = self.run.calibration
        shape = (text.batch_size, text.seq_len)
        for i, stage in enumerate(self.run.stages):
            if stage.cut is not None:
                yield from self._calibrations(i, stage.cut, shape)
            if stage.distill:
                yield self._training(i, stage.distill)
        if self.run.evaluation.files and not self.layerwise:
            shape = (self.run.evaluation.batch_size, self.run.evaluation.seq_len)
            pair = (self.models[-1], self.models[0])
            step = Step(pair, partial(lower_evaluation, shape, self.dtype))
            yield Phase("evaluate", step, sum(map(self.weights, pair)))

    def _calibrations(self, i: int, cut: Cut, shape: tuple[int, ...]) -> Iterator[Phase]:
        model, name = self.models[i], f"stage {i}: "
        moments = self.moments(i)
        hidden, mixed = cut.needs_second_moments, cut.needs_attention_moments
        shared = cut.needs_shared_moments
        if self.layerwise or cut.sequential:
            hidden |= cut.sequential
            wanted = LayerWanted(hidden=hidden, mixed=mixed, shared=shared)
            sums = partial(lower_layer_sums, shape, self.dtype, wanted)
            largest = max(statistics_bytes(model, cut.losses, layer=n) for n in model.moe_layers)
            weights = self._two_layers(model) if self.layerwise else self.held(i)
            step = Step((model,), sums, by_depth=False)
            held = {"weights": weights, "statistics": 2 * largest}
            yield Phase(f"{name}each layer", step, **held, moments=moments.on_device)
            if cut.losses:
                lower = partial(lower_layer_gradients, shape, self.dtype)
                step = Step((model,), lower, by_depth=False)
                yield Phase(f"{name}gradients of each layer", step, **held)
            return
        whole = statistics_bytes(model, cut.losses)
        own = statistics_bytes(model, cut.losses, sliced=True)
        held = {
            "weights": self.held(i),
            # The sums so far, those of a batch, and those of the slices of the text.
            "statistics": 2 * whole + self.slices * own,
            "moments": moments.on_device,
        }
        sums = partial(lower_sums, shape, self.dtype, hidden, mixed, shared)
        yield Phase(f"{name}calibrate", Step((model,), sums), **held)
        # The same step, whose most may be at its end: that is not seen at two depths.
        end = partial(lower_stream, shape, self.dtype)
        yield Phase(f"{name}compare depths", Step((model,), end, base=model.num_layers), **held)
        for loss in cut.losses:
            lower = partial(lower_gradients, shape, self.dtype, loss, Measurement.top_k)
            step = Step((model, self.models[0]), lower)
            yield Phase(f"{name}gradients of {loss}", step, **held)

    def _training(self, i: int, settings: TrainSettings) -> Phase:
        if settings.compute_dtype == "auto" and self.memory is not None:  # an accelerator's
            settings = dataclasses.replace(settings, compute_dtype="bfloat16")
        text, model = self.run.training, self.models[i + 1]
        cached = bool(text.teacher_cache)
        pair = (model, self.models[0])
        shape = (text.batch_size, text.seq_len)
        step = Step(pair, partial(lower_training, shape, self.dtype, settings, cached))
        state = abstract_state(model, settings, self.mesh)
        trained = bytes_per_device(state["params"])
        held = self.weights(self.models[0]) + self.weights(model) + trained
        # Where layers are stacked for the step, the caller keeps them as they were.
        if scans(pair[1], settings) and settings.needs_teacher and not cached:
            held += self.weights(self.models[0])
        if scans(model, settings):
            leaves = abstract_params(model)
            _, frozen = split_trained(placed(leaves, self.dtype, self.mesh), leaves, settings)
            held += bytes_per_device(frozen)
        optimizer = bytes_per_device(state) - trained
        return Phase(f"stage {i}: distil", step, held, optimizer, gradients=trained)

    def _cut(self, i: int) -> Cut:
        """What stage ``i`` removes; raises ValueError if it only trains, or applies a plan."""
        cut = self.run.stages[i].cut
        if cut is None:
            raise ValueError(f"stage {i} has no cut of its own")
        return cut

    def moments(self, i: int) -> MomentPlan:
        """Second moments of stage ``i``, laid out for a device of this memory."""
        cut, model, text = self._cut(i), self.models[i], self.run.calibration
        by_layer: dict[int, int] = {}
        wanted = [("second_moments", "layers", cut.needs_second_moments or cut.sequential)]
        wanted += [("attention_moments", "attention", cut.needs_attention_moments)]
        wanted += [("shared_moments", "layers", cut.needs_shared_moments)]
        follows = cut.sequential and cut.repairs and cut.repair_target == "original"
        wanted += [("follow_original", "layers", follows)]
        for request, part, needed in wanted:
            for n, size in requested_bytes(model, request, part).items() if needed else ():
                by_layer[n] = by_layer.get(n, 0) + size
        if self.layerwise or cut.sequential:
            return MomentPlan(by_layer, tuple((n,) for n in by_layer))
        # Where not even one layer's fit, each has a pass, and the sum tells that it does not fit.
        least = 2 * max(by_layer.values(), default=0)
        left = None if self.memory is None else int(self.memory - self.held(i)) // 2
        bound = text.second_moment_bytes or (left and max(left, least))
        return MomentPlan(by_layer, passes_within(by_layer, bound), bound)

    @property
    def batches(self) -> list[int]:
        """Calibration batches of each file."""
        text = self.run.calibration
        count = max(len(text.files), 1)
        return [math.ceil(text.num_sequences / count / text.batch_size)] * count

    @property
    def slices(self) -> int:
        """Sums of slices of the text that are kept beside the whole."""
        shares = max(place.shares for place in share_out(self.batches, Measurement.slices))
        return shares if shares > 1 else 0

    def _two_layers(self, model: ModelConfig) -> int:
        """The largest layer, the one that is read ahead of it, or the vocabulary's matrices."""
        each = [
            bytes_per_device(placed(layer_leaves(model, n), self.dtype, None))
            for n in range(model.num_layers)
        ]
        ends = {name: leaf for name, leaf in abstract_params(model).items() if name != "layers"}
        return max(2 * max(each), bytes_per_device(placed(ends, self.dtype, None)))

    def elsewhere(self) -> list[str]:
        """What lies in the memory of hosts and on disk, a line for each."""
        text, width = self.run.calibration, self.models[0].width
        tokens = text.num_sequences * text.seq_len
        host, disk = {}, {}
        files = len(text.files) + (len(text.files) > 1)  # each domain, and all together
        for i, stage in enumerate(self.run.stages):
            model, after = self.models[i], self.models[i + 1]
            if stage.cut is not None:
                moments = self.moments(i).total
                measured = statistics_bytes(model, stage.losses, tokens=tokens)
                measured += self.slices * statistics_bytes(model, stage.losses, sliced=True)
                stream = tokens * width * ITEM_BYTES[self.dtype]
                follows = stage.cut.repairs and stage.cut.repair_target == "original"
                if self.layerwise:
                    # Before every layer and behind the last one; while one is cut, before and
                    # behind it.
                    depths = 2 * (1 + follows) if stage.sequential else model.num_layers + 1
                    gradients = 2 if stage.losses else 0
                    disk[f"hidden states {i}"] = stream * (depths + gradients)
                    copies = 2 if stage.cut.refit else 1
                    disk[f"cut {i}"] = copies * self._stored(after, self.dtype)
                elif stage.sequential:
                    host[f"hidden states {i}"] = stream * (1 + follows)
                    disk[f"cut {i}"] = self._stored(after, self.dtype)
                if stage.sequential:
                    moments = 0  # of one layer at a time
                host[f"statistics {i}"] = measured
                host[f"second moments {i}"] = moments * moment_copies(text.files)
                disk[f"statistics {i}"] = (measured + moments) * files
            if stage.distill:
                # The last checkpoint stays until the next one is whole.
                state = bytes_per_device(abstract_state(after, stage.distill, None))
                disk[f"checkpoints {i}"] = 2 * state
                disk[f"weights {i}"] = self._stored(after, "float32")
        disk["export"] = self._stored(self.models[-1], self.stored)
        return [
            f"{place}: {', '.join(f'{name} {byte_size(n)}' for name, n in sizes.items() if n)}"
            for place, sizes in (("host memory", host), ("disk", disk))
            if any(sizes.values())
        ]

    def _stored(self, config: ModelConfig, dtype: str) -> int:
        return count_params(config).total * ITEM_BYTES[dtype]

    def work(self) -> list[str]:
        """Passes over the calibration text, and what a token costs, for each stage that cuts."""
        text, lines = self.run.calibration, []
        tokens = text.num_sequences * text.seq_len
        names = [self.device] if self.device else list(DEVICES)
        for i, stage in enumerate(self.run.stages):
            if stage.cut is None:
                continue
            passes = max(len(self.moments(i).passes), 1)
            if self.layerwise or stage.sequential:
                passes = 1
            costs = [f"{name} {self.token_cost(i, passes, name)}" for name in names]
            count = counted(passes, "pass") if passes == 1 else f"{passes} passes"
            lines += [
                f"stage {i}: {count} over {tokens:,} tokens in {sum(self.batches):,} batches; "
                f"a token at least: {', '.join(costs)}"
            ]
        return lines

    def token_cost(self, i: int, passes: int, name: str) -> str:
        """Microseconds by a roofline of products and memory, without communication."""
        device, cut, model = DEVICES[name], self._cut(i), self.models[i]
        text, count = self.run.calibration, self.mesh.size
        # A backward pass that forms no gradient of a weight costs as much as the pass forward; a
        # teacher goes forward once more.
        rounds = passes + sum(3 if loss.startswith("kd") else 2 for loss in cut.losses)
        moments = self.moments(i)
        products = rounds * forward_flops(model, text.seq_len)
        for n in model.moe_layers:
            moe = model.moe(n)
            if cut.needs_second_moments or cut.sequential:
                products += 2 * moe.experts_per_token * (moe.expert_width + 1) ** 2
            if cut.needs_shared_moments and moe.shared is not None:
                products += 2 * (moe.shared.width + 1) ** 2
        moved = rounds * self.weights(model) + 3 * statistics_bytes(model, cut.losses)
        moved += 3 * moments.total  # two read, one written
        batch = text.batch_size * text.seq_len
        by_products, by_memory = products / count / device.flops, moved / batch / device.bandwidth
        limit = "products" if by_products > by_memory else "memory"
        return f"{two_digits(1e6 * max(by_products, by_memory))} us ({limit})"

    def compiled(self) -> tuple[list[Phase], str]:
        """Phases with their temporaries, and what compiled them."""
        phases = list(self.phases())
        steps = {phase.name: phase.step for phase in phases}
        found, kind = temporaries(steps, self.mesh.shape, self.device)
        return [dataclasses.replace(p, temporaries=found[p.name]) for p in phases], kind

    def _peaks(self, *plans: MemoryPlan) -> list[int]:
        """The most that each of several plans for one mesh takes; all compile in one process."""
        each = [{f"{i} {p.name}": p for p in plan.phases()} for i, plan in enumerate(plans)]
        steps = {name: phase.step for phases in each for name, phase in phases.items()}
        found, _ = temporaries(steps, plans[0].mesh.shape, self.device)
        return [
            max(dataclasses.replace(p, temporaries=found[n]).total for n, p in phases.items())
            for phases in each
        ]

    def text(self, compiles: bool) -> str:
        """The plan for a terminal; without compiling, temporaries are left out."""
        phases, kind = self.compiled() if compiles else (list(self.phases()), "")
        sizes = {axis: size for axis, size in self.mesh.shape.items() if size > 1}
        of = f"each of {self.mesh.size} devices, mesh {sizes}" if sizes else "one device"
        compiler = f"; temporaries on {kind}" if kind else ""
        lines = [f"memory of {of}{compiler}", memory_table(phases)]
        if self.memory is not None:
            most = max(phases, key=lambda phase: phase.total)
            verdict = "fits" if most.total <= self.memory else "does not fit"
            lines.append(
                f"{most.name} needs {byte_size(most.total)} of {byte_size(self.memory)}: {verdict}"
            )
        if not compiles:
            lines.append("temporaries: python -m moe_jax.inspect with the same --config tells them")
        return "\n".join([*lines, *self.elsewhere(), *self.work()])

    def with_mesh(self, sizes: Mapping[str, int], rows: int) -> MemoryPlan:
        """The same run on another mesh, with so many sequences for each share of a batch."""
        batch = rows * math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)
        texts = {
            name: dataclasses.replace(getattr(self.run, name), batch_size=batch)
            for name in ("calibration", "evaluation")
        }
        run = dataclasses.replace(self.run, mesh=dict(sizes), **texts)
        return dataclasses.replace(self, run=run)

    def proposal(self, count: int) -> str:
        """The mesh of ``count`` devices that splits weights least and fits, and its batch."""
        if self.memory is None:
            raise ValueError("a mesh is proposed for devices whose memory is known: name one")
        meshes = list(itertools.islice(self._meshes(count), _TRIES))
        for sizes in meshes:
            one, two = self._peaks(self.with_mesh(sizes, 1), self.with_mesh(sizes, 2))
            if one > self.memory:
                continue
            rows = 1 + int((self.memory - one) // max(two - one, 1))
            rows = 1 << (min(rows, self.run.calibration.num_sequences).bit_length() - 1)
            batch = self.with_mesh(sizes, rows).run.calibration.batch_size
            shown = {axis: size for axis, size in sizes.items() if size > 1} or "none"
            return (
                f"proposal: mesh {shown}, calibration.batch_size = {batch}, where a sequence for "
                f"each share takes {byte_size(one)} and one more {byte_size(max(two - one, 0))}"
            )
        return (
            f"proposal: of {len(meshes)} meshes that were tried none fits {byte_size(self.memory)} "
            f"on {counted(count, 'device')}; take more, or go layer by layer"
        )

    def _meshes(self, count: int) -> Iterator[dict[str, int]]:
        """Meshes whose weights, optimizer and statistics fit, the least split first."""
        shapes = [
            dict(zip(MESH_AXES, shape, strict=True))
            for shape in itertools.product(_divisors(count), repeat=len(MESH_AXES))
            if math.prod(shape) == count
        ]
        for sizes in sorted(shapes, key=lambda s: (-s["data"], s["tensor"], s["expert"])):
            plan = self.with_mesh(sizes, 1)
            try:
                for model in self.models:
                    leaf_shardings(abstract_params(model), plan.mesh)
                for stage in self.run.stages:
                    if stage.distill:
                        pieces = self.run.training.batch_size // stage.distill.accumulation
                        check_rows(pieces, plan.mesh)
                fits = max(phase.total for phase in plan.phases()) <= (self.memory or math.inf)
            except ValueError:
                continue
            if fits:
                yield sizes


def memory_table(phases: Sequence[Phase]) -> str:
    """A row for each phase."""
    header = ("", "weights", "optimizer", "gradients", "statistics", "moments", "temporaries",
              "total")  # fmt: skip
    rows: list[Sequence[str]] = [header]
    for phase in phases:
        beside = None if phase.temporaries is None else phase.temporaries - phase.gradients
        sizes = (phase.weights, phase.optimizer, phase.gradients, phase.statistics, phase.moments)
        cells = [byte_size(size) if size else MISSING for size in sizes]
        more = MISSING if beside is None else byte_size(max(beside, 0))
        rows.append((phase.name, *cells, more, byte_size(phase.total)))
    return aligned(rows)


def forward_flops(config: ModelConfig, seq_len: int) -> int:
    """Of a token's way through the matrices and through attention over half of the sequence."""
    embedding = 0 if config.tied_embeddings else config.vocab_size * config.width
    heads = sum(layer.num_heads for layer in config.layers)
    return 2 * (count_params(config).active - embedding) + 2 * seq_len * heads * config.head_dim


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]
