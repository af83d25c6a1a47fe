"""What a pass over calibration text is asked for, and what batches add up to."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.calibrate.memory import MomentPlan, plan_second_moments
from moe_jax.calibrate.sums import State, copied, merge_states
from moe_jax.calibrate.weights import expert_weight_norms, group_weight_norm
from moe_jax.config import ModelConfig
from moe_jax.kinds import check_own_teacher
from moe_jax.params import expert_leaves, stack_experts
from moe_jax.processes import gather
from moe_jax.statistics import Stats
from moe_jax.statistics_table import PASSES, per_token, sliced, spread

Batches = list[dict[str, np.ndarray]]
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Measurement:
    """What is measured of calibration text, and how.

    Attributes:
        importance: losses whose gradients score experts, neurons and key/value groups, among
            ``kd_topk``
            (the teacher's ``top_k`` probabilities against the full softmax), ``kd_full`` (with
            routing in train mode: in eval mode its gradient vanishes while the model is its own
            teacher) and ``lm``. Each costs a forward and backward pass beside the shared one.
        teacher: of the distillation losses; None: the model itself.
        top_k: of ``kd_topk``.
        second_moments: also those of the experts' hidden activations, ``[E, F + 1, F + 1]`` a
            layer, which OBS and repair need; True for all layers with experts, some of them by
            index, or a plan of ``plan_second_moments``. Where those of all layers do not fit on the
            device together, the batches are read several times, for a few layers each, to the
            same bits.
        second_moment_bytes: that they may take on the device, see ``plan_second_moments``; None:
            half of what is free there. How they are laid out is logged before work starts.
        attention_moments: also those of the mixed heads that attention's output projections read,
            ``[N H + 1, N H + 1]`` a layer, which its repair needs; part of the plan, where one is
            given.
        shared_moments: also those of the shared expert's hidden activations, ``[U + 1, U + 1]`` a
            layer, which OBS and repair of its neurons need; part of the plan likewise.
        slices: shares that the batches are dealt out to, at most, whose sums are kept as well, so
            that ``moe_jax.confidence`` can tell how much the text decides; 1 keeps none. Each
            takes the memory of what ``statistics_table.sliced`` leaves.
        seed: of sampled routing.
        backend: of ``ops.grouped_matmul``.
    """

    importance: Sequence[str] = ()
    teacher: tuple[dict[str, Any], ModelConfig] | None = None
    top_k: int = 8
    second_moments: bool | Sequence[int] | MomentPlan = False
    second_moment_bytes: int | None = None
    attention_moments: bool = False
    shared_moments: bool = False
    slices: int = 8
    seed: int = 0
    backend: str = "auto"

    def moment_plan(self, config: ModelConfig, copies: int = 1) -> MomentPlan:
        """How second moments are laid out, logged unless the plan was given."""
        if isinstance(self.second_moments, MomentPlan):
            return self.second_moments
        plan = plan_second_moments(
            config, self.second_moments, self.second_moment_bytes, copies, self.attention_moments,
            self.shared_moments,
        )  # fmt: skip
        if plan.passes:
            _logger.info("%s", plan)
        return plan

    def check(self, params: dict[str, Any], config: ModelConfig) -> None:
        """Raises ValueError for what cannot be measured of a model."""
        config.require_experts("calibration")
        if self.slices < 1:
            raise ValueError(f"slices must be at least 1, got {self.slices}")
        unknown = set(self.importance) - set(PASSES)
        if unknown:
            raise ValueError(f"importance must be among {PASSES}, got {sorted(unknown)}")
        teacher_params, teacher = self.teacher or (params, config)
        own_teacher = teacher_params is params
        if "kd_full" in self.importance and own_teacher:
            check_own_teacher(config.router)
        if teacher.vocab_size != config.vocab_size:
            raise ValueError(
                f"teacher and model must share a vocabulary, got {teacher.vocab_size} "
                f"and {config.vocab_size} entries"
            )


@dataclass
class RunningSum:
    """What batches add up to, on the device; what has a row for each token, on the host."""

    state: State | None = None
    rows: dict[int, dict[str, list[np.ndarray]]] = field(default_factory=dict)
    tokens: int = 0
    sequences: int = 0
    batches: int = 0

    def add(self, new: State, mask: np.ndarray) -> None:
        """Adds a batch."""
        valid = np.asarray(mask).reshape(-1)
        for i, layer in new[0].items():
            for name in filter(per_token, layer):
                found = gather(layer[name])[valid]
                self.rows.setdefault(i, {}).setdefault(name, []).append(found)
        sums = {
            i: {n: a for n, a in arrays.items() if not per_token(n)} for i, arrays in new[0].items()
        }
        new = (sums, *new[1:])
        # What is merged into gives up its buffers, of which those of a batch may serve twice.
        self.state = copied(new) if self.state is None else merge_states(self.state, new)
        self.tokens += int(np.count_nonzero(mask))
        self.sequences += int(np.count_nonzero(mask.any(1)))
        self.batches += 1

    @property
    def sums(self) -> State:
        """What was added up so far; raises ValueError if that is nothing."""
        if self.state is None:
            raise ValueError("calibration needs at least one batch, got none")
        return self.state

    def stats(self, config: ModelConfig, weights: Mapping[int, dict[str, Any]]) -> Stats:
        """Statistics on the host, with what the weights of the layers alone tell.

        Raises:
            ValueError: nothing was added, or nothing but padding.
        """
        experts, attention, stream = self.sums
        if not self.tokens:
            raise ValueError("calibration text holds no tokens: every position is padding")
        layers = {i: expert_arrays(config, weights[i], i, arrays) for i, arrays in experts.items()}
        for i, rows in self.rows.items():
            layers[i] |= {name: np.concatenate(parts) for name, parts in rows.items()}
        return Stats(
            layers,
            self.tokens,
            self.sequences,
            self.batches,
            {},
            {i: attention_arrays(config, weights[i], i, arrays) for i, arrays in attention.items()},
            gather(stream),
        )

    def slice(self, config: ModelConfig) -> Stats:
        """Statistics of a slice of the text, which need no weights."""
        layers = {i: spread(gather(arrays), config, i) for i, arrays in self.sums[0].items()}
        return Stats(layers, self.tokens, self.sequences, self.batches)


class SlicedSum:
    """What batches add up to, of all text and of each of ``shares`` shares of it, dealt in turn."""

    def __init__(self, shares: int = 1) -> None:
        self.whole = RunningSum()
        self.shares = [RunningSum() for _ in range(shares if shares > 1 else 0)]

    def add(self, new: State, mask: np.ndarray) -> None:
        """Adds a batch."""
        share = self.shares[self.whole.batches % len(self.shares)] if self.shares else None
        self.whole.add(new, mask)
        if share is not None:
            own = {i: sliced(arrays) for i, arrays in new[0].items()}
            share.add((own, {}, {}), mask)

    def stats(self, config: ModelConfig, weights: Mapping[int, dict[str, Any]]) -> Stats:
        """``RunningSum.stats``, with the slices."""
        shares = enumerate(self.shares)
        slices = {(0, n): share.slice(config) for n, share in shares if share.state}
        return replace(self.whole.stats(config, weights), slices=slices)


def expert_arrays(
    config: ModelConfig, weights: dict[str, Any], layer: int, arrays: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """What was measured of a layer's experts, to the host, with what its weights alone tell."""
    moe = weights["moe"]
    experts = stack_experts(moe["experts"], expert_leaves(config, layer))
    stacked = {**moe, "experts": experts}
    return spread(gather({**arrays, **expert_weight_norms(stacked)}), config, layer)


def attention_arrays(
    config: ModelConfig, weights: dict[str, Any], layer: int, arrays: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """What was measured of a layer's attention, to the host, with what its weights alone tell."""
    groups = config.layers[layer].num_kv_heads
    weight_norm = group_weight_norm(weights["attention"], groups)
    return gather({**arrays, "weight_norm": weight_norm})


def merged_domains(parts: Iterable[tuple[str, Stats]]) -> Stats:
    """Statistics of domains, one after the other, as those of all; each gives up its arrays.

    ``facts["domains"][name]`` holds a domain's ``tokens``, ``sequences`` and, by layer, ``count``
    [E]: merging is exact, so the routing of every domain costs nothing more.
    """
    merged, facts = None, {}
    for name, stats in parts:
        facts[name] = {
            "tokens": stats.tokens,
            "sequences": stats.sequences,
            "count": {str(i): layer["count"].tolist() for i, layer in stats.layers.items()},
        }
        merged = stats if merged is None else merged.merge(stats, consume=True)
    if merged is None:
        raise ValueError("calibration needs at least one domain, got none")
    return replace(merged, facts={"domains": facts})


def check_batch(batch: Any, vocab_size: int) -> None:
    """Raises ValueError unless a batch is ``{"tokens": Int[B, S], "mask": Bool[B, S]}``."""
    for name, kind in (("tokens", "iu"), ("mask", "b")):
        array = batch.get(name) if isinstance(batch, Mapping) else None
        if not isinstance(array, np.ndarray | jax.Array):
            raise ValueError(
                "a calibration batch must be {'tokens': Int[B, S], 'mask': Bool[B, S]} of NumPy or "
                f"JAX arrays, got {type(batch if array is None else array).__name__} for "
                f"{'the batch' if array is None else repr(name)}"
            )
        if array.dtype.kind not in kind or array.ndim != 2:
            raise ValueError(
                f"{name} of a calibration batch must be {'Int' if kind == 'iu' else 'Bool'}[B, S], "
                f"got {array.dtype}{list(array.shape)}"
            )
    if batch["tokens"].shape != batch["mask"].shape:
        raise ValueError(
            "tokens and mask of a calibration batch must have one shape, got "
            f"{batch['tokens'].shape} and {batch['mask'].shape}"
        )
    check_tokens(batch["tokens"], vocab_size)


def check_tokens(tokens: np.ndarray | jax.Array, vocab_size: int) -> None:
    """Raises ValueError if an id is outside ``[0, vocab_size)``."""
    xp = np if isinstance(tokens, np.ndarray) else jnp
    low, high = int(xp.min(tokens)), int(xp.max(tokens))
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token ids must be in [0, vocab_size = {vocab_size}), got {low if low < 0 else high}"
        )


def warn_unreached(stats: Stats) -> None:
    """Logs the names of the experts that no token was routed to."""
    names = stats.unreached()
    if names:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        _logger.warning("no calibration token reached %s; their scores are 0", shown)
