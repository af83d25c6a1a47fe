"""The pass over calibration batches: jitted sums in, statistics on the host out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.calibrate.gradients import ByLayer, mask_gradients
from moe_jax.calibrate.memory import MomentPlan, log_second_moments, plan_second_moments
from moe_jax.calibrate.sums import (
    State,
    copied,
    forward_sums,
    merge_states,
    second_moment_sums,
)
from moe_jax.calibrate.weights import expert_weight_norms, group_weight_norm
from moe_jax.config import ModelConfig
from moe_jax.metrics import progress_bar
from moe_jax.params import expert_leaves, stack_experts
from moe_jax.scoring import IMPORTANCE_LOSSES
from moe_jax.statistics import Stats, expert_sums


@dataclasses.dataclass
class RunningSum:
    """What batches add up to."""

    state: State | None = None
    tokens: int = 0
    sequences: int = 0
    batches: int = 0

    def add(self, new: State, mask: np.ndarray) -> None:
        """Adds a batch."""
        # What is merged into gives up its buffers, of which those of a batch may serve twice.
        self.state = copied(new) if self.state is None else merge_states(self.state, new)
        self.tokens += int(np.count_nonzero(mask))
        self.sequences += int(np.count_nonzero(mask.any(1)))
        self.batches += 1

    @property
    def size(self) -> tuple[int, int, int]:
        return self.tokens, self.sequences, self.batches


def calibrate(
    params: dict[str, Any],
    config: ModelConfig,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    importance: Sequence[str] = (),
    teacher: tuple[dict[str, Any], ModelConfig] | None = None,
    top_k: int = 8,
    second_moments: bool | Sequence[int] | MomentPlan = False,
    second_moment_bytes: int | None = None,
    attention_moments: bool = False,
    slices: int = 1,
    seed: int = 0,
    backend: str = "auto",
    facts: dict[str, Any] | None = None,
    description: str = "calibrate",
    warn: bool = True,
) -> Stats:
    """Statistics of every layer over ``batches``, padding left out.

    Args:
        params, config: the model to measure.
        batches: ``{"tokens": Int[B, S], "mask": Bool[B, S]}``, all of one shape.
        importance: losses whose gradients score neurons and key/value groups, among ``kd_topk``
            (the teacher's ``top_k`` probabilities against the full softmax), ``kd_full`` (with
            routing in train mode: in eval mode its gradient vanishes while the model is its own
            teacher) and ``lm``. Each costs a forward and backward pass beside the shared one.
        teacher: of the distillation losses; None: the model itself.
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
        slices: shares that the batches are dealt out to in turn, whose sums are kept as well, so
            that ``moe_jax.confidence`` can tell how much the text decides; 1 keeps none. Each
            takes the device memory of ``statistics.expert_sums``.
        seed: of sampled routing.
        backend: of ``ops.grouped_matmul``.
        facts: kept with the result.
        description: stands before the progress bar.
        warn: log the names of the experts that no token reached.

    Returns:
        Mergeable sums.

    Raises:
        ValueError: no batch or slice, all padding, an unknown loss, token ids outside the
            vocabulary, teacher and model with different vocabularies, second moments that do not
            fit in memory, or NaN in the result (named).
    """
    teacher_params, teacher_config = teacher or (params, config)
    _check_importance(importance, config, teacher_config, teacher_params is params)
    if slices < 1:
        raise ValueError(f"slices must be at least 1, got {slices}")
    moments = second_moments
    if not isinstance(moments, MomentPlan):
        moments = plan_second_moments(
            config, moments, second_moment_bytes, attention=attention_moments
        )
        log_second_moments(moments)
    if len(moments.passes) > 1:
        batches = list(batches)  # read again for each pass
    whole, shares = RunningSum(), [RunningSum() for _ in range(slices if slices > 1 else 0)]

    def add_losses(batch, measured: ByLayer, attention: ByLayer, count: int) -> None:
        for loss in importance:
            rng = jax.random.fold_in(jax.random.key(seed), count)
            gradients = mask_gradients(
                params, config, teacher_params, teacher_config, batch, rng, loss, top_k, backend
            )
            for target, by_layer in zip((measured, attention), gradients, strict=True):
                for i, arrays in by_layer.items():
                    target[i] |= {f"{loss}.{name}": array for name, array in arrays.items()}

    for count, batch in enumerate(_shown(batches, description), 1):
        check_tokens(batch["tokens"], config.vocab_size)
        new = forward_sums(params, config, batch, backend, *moments.of_pass(0))
        add_losses(batch, new[0], new[1], count)
        whole.add(new, batch["mask"])
        if shares:
            shares[(count - 1) % slices].add(_of_experts(new[0]), batch["mask"])
        del new  # before those of the next batch are made
    stats = _statistics(config, params, whole, shares, facts)
    whole.state = None
    for n in range(1, len(moments.passes)):
        again = _shown(batches, f"{description}, pass {n + 1} of {len(moments.passes)}")
        hidden, mixed, _ = _more_moments(params, config, again, moments.of_pass(n), backend)
        for i, arrays in hidden.items():
            stats.layers[i] |= _spread(config, i, arrays)
        for i, arrays in mixed.items():
            stats.attention[i] |= {name: np.asarray(array) for name, array in arrays.items()}
        del hidden, mixed
    stats.check_finite()
    if warn:
        warn_unreached(stats)
    return stats


def _shown(
    batches: Iterable[dict[str, np.ndarray]], description: str
) -> Iterator[dict[str, np.ndarray]]:
    """The same batches under a progress bar."""
    length = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    with progress_bar(None, description, "tok") as bar:
        for count, batch in enumerate(batches, 1):
            yield batch
            bar.update(int(np.count_nonzero(batch["mask"])))
            bar.set_postfix(batch=f"{count}/{length}" if length else str(count))


def _more_moments(
    params, config: ModelConfig, batches, layers: tuple[tuple[int, ...], ...], backend: str
) -> State:
    """Second moments of some layers, in a pass of their own."""
    total: State | None = None
    for batch in batches:
        new = second_moment_sums(params, config, batch, backend, *layers)
        total = copied(new) if total is None else merge_states(total, new)
        del new
    assert total is not None
    return total


def _statistics(
    config: ModelConfig,
    params,
    whole: RunningSum,
    shares: Sequence[RunningSum],
    facts: dict[str, Any] | None,
) -> Stats:
    """Sums as statistics on the host; raises ValueError if there are none."""
    if whole.state is None:
        raise ValueError("calibration needs at least one batch, got none")
    if not whole.tokens:
        raise ValueError("calibration text holds no tokens: every position is padding")
    return Stats(
        {
            i: _by_expert(config, params["layers"][i], i, arrays)
            for i, arrays in whole.state[0].items()
        },
        *whole.size,
        dict(facts or {}),
        {
            i: attention_arrays(config, params["layers"][i], i, arrays)
            for i, arrays in whole.state[1].items()
        },
        {name: np.asarray(array) for name, array in whole.state[2].items()},
        {
            (0, n): Stats(
                {i: _spread(config, i, arrays) for i, arrays in share.state[0].items()},
                *share.size,
            )
            for n, share in enumerate(shares)
            if share.state is not None
        },
    )


def _check_importance(
    importance: Sequence[str], config: ModelConfig, teacher: ModelConfig, own_teacher: bool
) -> None:
    unknown = set(importance) - set(IMPORTANCE_LOSSES)
    if unknown:
        raise ValueError(f"importance must be among {IMPORTANCE_LOSSES}, got {sorted(unknown)}")
    if "kd_full" in importance and own_teacher:
        config.router.check_own_teacher()
    if teacher.vocab_size != config.vocab_size:
        raise ValueError(
            f"teacher and model must share a vocabulary, got {teacher.vocab_size} "
            f"and {config.vocab_size} entries"
        )


def check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    """Raises ValueError if an id is outside ``[0, vocab_size)``."""
    low, high = int(np.min(tokens)), int(np.max(tokens))
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token ids must be in [0, vocab_size = {vocab_size}), got {low if low < 0 else high}"
        )


def warn_unreached(stats: Stats) -> None:
    """Logs the names of the experts that no token was routed to."""
    names = stats.unreached()
    if names:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        logging.warning("no calibration token reached %s; their scores are 0", shown)


def statistics_of_layer(
    config: ModelConfig, weights: dict[str, Any], layer: int, total: RunningSum
) -> Stats:
    """Sums of one layer, with its ``weights``, as statistics on the host."""
    assert total.state is not None
    return Stats(
        {layer: _by_expert(config, weights, layer, total.state[0][layer])},
        *total.size,
        attention={layer: attention_arrays(config, weights, layer, {})},
    )


def _of_experts(measured: ByLayer) -> State:
    """The part of a batch's sums that slices keep."""
    return (
        {
            i: expert_sums(arrays) | {"stored_count": arrays["stored_count"]}  # joins moments
            for i, arrays in measured.items()
        },
        {},
        {},
    )


def _by_expert(config: ModelConfig, weights, layer: int, arrays) -> dict[str, np.ndarray]:
    """To the host, with what the weights alone tell."""
    moe = weights["moe"]
    leaves = expert_leaves(config, layer)
    stacked = {**moe, "experts": stack_experts(moe["experts"], leaves)}
    return _spread(config, layer, {**arrays, **expert_weight_norms(stacked)})


# Arrays that already run over all router rows; the others run over stored experts, in their order.
_BY_ROUTER_ROW = {
    "count", "routing_mass", "soft_count", "coactivation", "router_gram", "output_gram",
    "router_norm",
}  # fmt: skip


def _spread(config: ModelConfig, layer: int, arrays) -> dict[str, np.ndarray]:
    """To the host, with arrays over stored experts spread over all E router rows."""
    moe = config.moe(layer)
    ids = list(moe.expert_ids)
    result: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        values = np.asarray(array)
        if name == "stored_count":
            continue
        if values.dtype.kind == "i":
            values = values.astype(np.int64)
        if name not in _BY_ROUTER_ROW:
            spread = np.zeros((moe.num_experts, *values.shape[1:]), values.dtype)
            spread[ids] = values
            values = spread
        result[name] = values
    return result


def attention_arrays(
    config: ModelConfig, weights: dict[str, Any], layer: int, arrays: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """What was measured of a layer's attention, to the host, with what its weights alone tell."""
    groups = config.layers[layer].num_kv_heads
    weight_norm = group_weight_norm(weights["attention"], groups)
    return {
        name: np.asarray(array) for name, array in {**arrays, "weight_norm": weight_norm}.items()
    }
