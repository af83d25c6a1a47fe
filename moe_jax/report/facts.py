"""What a report holds: plain data that JSON can hold, described here and nowhere else.

Every key may be absent unless it is marked ``Required``, and so is what a page says of it.
``check_report`` reads these types, so a key that is not listed here is refused.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping
from typing import Any, Required, TypedDict, get_args, get_origin, is_typeddict

import numpy as np

_CURVE_POINTS = 101


class Parameters(TypedDict, total=False):
    """Counts as ``params.ParameterCount`` has them."""

    total: int
    active: int
    experts: int


class Source(TypedDict, total=False):
    """Where the original came from."""

    path: str
    family: str
    id: str  # a hub repository
    license: str
    digest: str  # of config and weights


class Output(TypedDict, total=False):
    """Where the result is."""

    path: str
    dtype: str | None
    tensors: dict[str, int]  # of the source by what became of them, see hf.account
    compared_bytes: int  # read again and found to be the source's
    logit_tokens: int
    logit_difference: float  # the largest between what was exported and what was read back
    packed: bool  # whether a packed checkpoint's result is packed, too
    storage: list[str]  # sentences on that
    packing_error: dict[str, float]  # kind of leaf -> relative error of what was packed again


class Model(TypedDict, total=False):
    """The original or the compressed model."""

    parameters: Parameters
    bytes: int  # of all weights as stored
    evaluation: dict[str, Any]  # Evaluation.to_dict()


class Layer(TypedDict, total=False):
    """A layer before its stage; lists are over all E experts, ids index them."""

    layer: Required[int]  # its index in the model
    num_experts: int  # E
    count: list[int]  # tokens routed to each expert by calibration
    routing_mass: list[float]  # sum of routing weights
    variance: list[float]  # trace of the covariance of the output
    frequency: dict[str, list[float]]  # domain -> share of its selections that each expert got
    score: list[float]  # what the ranking used
    removed: list[int]  # experts that are gone and left nothing
    novices: list[int]  # experts that are now a constant vector
    merged: list[list[int]]  # experts that became one, which stands in the place of the first
    expert_width: list[int]  # [before, after], hidden neurons as stored: padding counts
    shared_width: list[int]  # [before, after], hidden neurons of the shared expert
    widths: list[int]  # neurons that each expert keeps, where they differ; 0 of those gone
    kv_groups: list[int]  # [before, after], key/value heads with their query heads
    unreached: list[int]  # experts that calibration never reached
    fewer_tokens_than_neurons: list[int]  # where the cut looked at second moments
    importance: dict[str, Any]  # importance_curve()


class Confidence(TypedDict, total=False):
    """Whether the text was enough; see ``moe_jax.confidence``."""

    verdict: str  # one sentence
    # {floor, tokens, experts, num_few, few, edges, histogram, busiest, uniform}; of few the first
    # hundred
    coverage: dict[str, Any]
    # {shares, layers, kept, common, rank_correlation}: the last two [shares][layers]; absent where
    # the ranking is not one of experts by text
    convergence: dict[str, Any]
    # {probability, resamples, degrees, number, experts}: those that other text would have decided
    # otherwise with at least this probability, the likeliest twenty as
    # [layer, expert, whether it was kept, probability]
    unsure: dict[str, Any]


class Record(TypedDict, total=False):
    """What a training logged at one step; parts of the loss unweighted."""

    step: Required[int]
    loss: float | None
    distill: float | None
    lm: float | None
    hidden: float | None
    router: float | None
    balance: float | None
    learning_rate: float | None


class Training(TypedDict, total=False):
    """One training."""

    settings: dict[str, Any]  # other than the defaults, and ``loss``, ``learning_rate``
    steps: int
    tokens: int
    tokens_per_second: float | None  # the median
    metrics: list[Record]


class StageEvaluation(TypedDict, total=False):
    """Evaluations against the original; that of a run's last step is the report's ``after``."""

    cut: dict[str, Any]
    trained: dict[str, Any]


class Stage(TypedDict, total=False):
    """A cut, a training, or a cut and then a training."""

    method: str  # how it was cut; "distill" if it was only trained
    settings: dict[str, Any]  # of the cut
    kept: str  # such as "48 of 64 experts per layer, 4 of 8 key/value groups per layer"
    layers: list[Layer]  # those with experts
    dropped_layers: list[int]  # whole layers that went
    parameters: Parameters  # after the cut
    confidence: Confidence
    training: Training
    evaluation: StageEvaluation
    warnings: list[str]


class Loader(TypedDict, total=False):
    """What a loader of the result needs."""

    trust_remote_code: bool
    serve: str  # the command that serves it
    notes: list[str]


class Report(TypedDict, total=False):
    """A compression run."""

    name: str  # what to call the compressed model
    source: Source
    output: Output
    command: str
    environment: dict[str, Any]  # environment()
    seed: int
    config: dict[str, Any]
    data: dict[str, dict[str, str]]  # calibration, training, evaluation: file -> sha256
    seconds: dict[str, float]  # step -> wall seconds, in order
    peak_memory_mib: float
    before: Model
    after: Model
    stages: list[Stage]  # in the order in which they were applied, counted from 0
    loader: Loader
    warnings: list[str]


_PER_EXPERT = ("count", "routing_mass", "variance", "score", "widths")
_BEFORE_AND_AFTER = ("expert_width", "shared_width", "kv_groups")


def check_report(report: Any) -> None:
    """Raises ValueError, naming place and nearest key, if ``report`` is no ``Report``."""
    _check(report, Report, "report")


def _check(value: Any, kind: Any, place: str) -> None:
    if is_typeddict(kind):
        _check_keys(value, kind, place)
        fields = typing.get_type_hints(kind)
        for key, item in value.items():
            if item is not None:
                _check(item, fields[key], key if kind is Report else f"{place}.{key}")
        if kind is Layer:
            _check_layer(value, place)
    elif get_origin(kind) is list and is_typeddict(get_args(kind)[0]):
        for i, item in enumerate(value):
            _check(item, get_args(kind)[0], f"{place}[{i}]")


def _check_keys(value: Any, kind: Any, place: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place} must be a dict, got {type(value).__name__}")
    # Read late, since annotations are text here: __required_keys__ would be empty.
    known = typing.get_type_hints(kind, include_extras=True)
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0)[0]
            raise ValueError(f"{place} has an unknown key {key!r}; did you mean {near!r}?")
    for key in (k for k, hint in known.items() if get_origin(hint) is Required and k not in value):
        raise ValueError(f"{place} must have the key {key!r}, got {sorted(value)}")


def _check_layer(layer: Layer, place: str) -> None:
    lengths = {k: len(v) for k, v in layer.items() if k in _PER_EXPERT and v is not None}  # type: ignore[arg-type]
    if "num_experts" in layer:
        lengths["num_experts"] = layer["num_experts"]
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{place} must have one number of experts, got {lengths}")
    for key in _BEFORE_AND_AFTER:
        sizes: Any = layer.get(key)
        if sizes is not None and len(sizes) != 2:
            raise ValueError(f"{place}.{key} must be [before, after], got {sizes}")


def gone_ids(layer: Mapping[str, Any]) -> list[int]:
    """Ids of a layer's experts that were removed, became constants or merged into others."""
    return sorted(
        {*(layer.get("removed") or ()), *(layer.get("novices") or ()), *merged_ids(layer)}
    )


def merged_ids(layer: Mapping[str, Any]) -> list[int]:
    """Ids of a layer's experts that were merged into another, in whose place both now stand."""
    return sorted(e for _, *others in layer.get("merged") or () for e in others)


def importance_curve(importance: Any, kept_width: Any) -> dict[str, Any]:
    """Neuron importance of one layer, small enough for a report.

    Some criteria (``flap``) are negative for neurons that vary less than average: there importance
    is counted from each expert's least important neuron.

    Args:
        importance: [E, F].
        kept_width: neurons kept, the most important first, by every expert or by each.

    Returns:
        ``rank`` (percent of F) and, of the sorted importance relative to each expert's mean, its
        ``low``, ``median`` and ``high`` (10th, 50th, 90th percentile over experts) there; ``cut``
        (percent of F kept on average); ``kept_share`` [E], the share of importance that the kept
        ones hold.

    Raises:
        ValueError: not a matrix, not finite, or ``kept_width`` outside [1, F], or [0, F] of each
            expert.
    """
    values = np.asarray(importance, np.float64)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"importance must be [E, F] and finite, got shape {values.shape}")
    width = values.shape[1]
    kept = np.broadcast_to(np.asarray(kept_width), len(values))
    least = 1 if np.ndim(kept_width) == 0 else 0
    if not least <= kept.min() <= kept.max() <= width:
        raise ValueError(f"kept_width must be in [{least}, F = {width}], got {kept_width}")
    values = values - np.minimum(values.min(axis=1, keepdims=True), 0)
    ranked = -np.sort(-values, axis=1)
    ranked /= np.maximum(ranked.mean(1, keepdims=True), 1e-300)
    picks = np.unique(np.linspace(0, width - 1, min(width, _CURVE_POINTS)).round().astype(int))
    low, median, high = np.percentile(ranked[:, picks], (10, 50, 90), axis=0)
    held = np.where(np.arange(width) < kept[:, None], ranked, 0).sum(1) / width
    return {
        "rank": (100 * (picks + 1) / width).tolist(),
        "low": low.tolist(),
        "median": median.tolist(),
        "high": high.tolist(),
        "cut": 100 * float(kept.mean()) / width,
        "kept_share": held.tolist(),
    }
