"""The table of statistics: what is measured, of which axes, how it merges, who keeps it.

``STATISTICS`` describes every array once. Merging on the device and on the host, slices of the
text, checks against a model, memory plans and the needs of criteria are read off it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from moe_jax.config import ModelConfig

# Losses whose gradients can score experts, neurons and key/value groups.
Loss = Literal["kd_topk", "kd_full", "lm"]
IMPORTANCE_LOSSES: tuple[Loss, ...] = get_args(Loss)
# What a further pass over the text can be asked for: gradients of these, or what rerouting needs.
PASSES = (*IMPORTANCE_LOSSES, "rerouting")
# Sums over batches of |sum|, over sequences of |.|, over sequences of its square, and over tokens.
AGGREGATIONS = ("batch_abs", "sequence_abs", "sequence_square", "token_square")
# What names of arrays about shared experts begin with, behind the loss.
SHARED = "shared_"
_SHARED_MOMENTS = "shared_moments"


@dataclass(frozen=True)
class Statistic:
    """One array of the statistics: all that the package must know to carry it.

    Attributes:
        about: what it holds, in words.
        axes: letters of its axes, see ``axis_sizes``. X is the stored experts on the device and
            all E router rows, a novice's zeros among them, on the host.
        merge: what two texts give together: the ``sum``; the ``maximum``; ``equal``, a fact of the
            weights; ``append``, a row for each token; or ``mean`` and ``m2``, a pair ``NAME_mean``
            and ``NAME_m2`` over the tokens of each expert, joined by Chan's formula.
        source: what it is computed from.
        sliced: whether every slice of the text keeps it, too: what criteria of experts need.
        request: the argument of ``calibrate``, or of a sequential cut, that asks for it where it
            is large; memory plans count these. Gradients come with the losses asked for.
    """

    about: str
    axes: str
    merge: Literal["sum", "maximum", "equal", "append", "mean", "m2"] = "sum"
    source: Literal["forward", "backward", "weights", "cut"] = "forward"
    sliced: bool = False
    request: str = ""

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(sizes[axis] for axis in self.axes.split())

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        """Of float32 numbers, as all large arrays are."""
        return 4 * math.prod(self.shape(sizes))


Table = Mapping[str, Mapping[str, Statistic]]


def _gradients(prefix: str, axes: str, sliced: bool = False) -> dict[str, Statistic]:
    """Rows for every loss: gradients in a mask of ones, see ``calibrate.gradients``."""
    return {
        f"LOSS.{prefix}{name}": Statistic(
            f"{name} of LOSS's gradient in a mask", axes, source="backward", sliced=sliced
        )
        for name in AGGREGATIONS
    }


# Of experts and their neurons. Here y is an expert's output before its routing weight w, h its
# hidden activations.
_EXPERTS: dict[str, Statistic] = {
    "count": Statistic("tokens routed to the expert", "E", sliced=True),
    "stored_count": Statistic("count on the device, in stored order", "X", sliced=True),
    "routing_mass": Statistic("sum of its routing weights w", "E", sliced=True),
    "soft_count": Statistic("softmax of the logits over all tokens", "E", sliced=True),
    "coactivation": Statistic("tokens that chose both", "E E"),
    "router_gram": Statistic("products of two logits over all tokens", "E E"),
    "output_gram": Statistic("w_e w_f <y_e, y_f>, tokens that chose both", "E E", sliced=True),
    "output_mean": Statistic("mean of y", "X D", "mean", sliced=True),
    "output_m2": Statistic("squared deviations of y", "X D", "m2", sliced=True),
    "output_norm": Statistic("||y||", "X", sliced=True),
    "output_peak": Statistic("largest ||y||", "X", "maximum", sliced=True),
    "gated_norm": Statistic("w ||y||", "X", sliced=True),
    "gated_square": Statistic("(w ||y||)^2", "X", sliced=True),
    "gated_output": Statistic("w y", "X D"),
    "neuron_mean": Statistic("mean of h", "X F", "mean"),
    "neuron_m2": Statistic("squared deviations of h", "X F", "m2"),
    "gated_energy": Statistic("(w h)^2", "X F"),
    "gated_peak": Statistic("largest |w h|", "X F", "maximum"),
    "hidden_gram": Statistic("w^2 [h; 1][h; 1]^T", "X F1 F1", request="second_moments"),
    "hidden_gap": Statistic(
        "w^2 [h; 1] c^T, c what a cut model's output lacks", "X F1 D",
        request="follow_original",
    ),
    "removal_cost": Statistic("what a neuron's removal cost (OBS)", "X F", source="cut"),
    "weight_norm": Statistic("norm of gate, up, down of a neuron", "X F", "equal", "weights"),
    "down_norm": Statistic("norm of a neuron's down row", "X F", "equal", "weights"),
    "down_sum": Statistic("sum of magnitudes of it", "X F", "equal", "weights"),
    "weight_sum": Statistic(
        "sum of magnitudes of a neuron's gate, up and down", "X F", "equal", "weights"
    ),
    "router_norm": Statistic("norm of the router's row", "E", "equal", "weights"),
    **_gradients("", "X F"),
    **_gradients("expert_", "X", sliced=True),
    "LOSS.gradient_square": Statistic(
        "squares over tokens of LOSS's gradient in h", "X F", source="backward"
    ),
    "rerouting.logits": Statistic("of the router", "T E", "append", "backward"),
    "rerouting.pulls": Statistic(
        "<y_e, d>, d the gradient of the loss on the text in the layer's output, of the 2 K "
        "experts that a token would choose first", "T E", "append", "backward",
    ),
}  # fmt: skip


def _of_shared(name: str, row: Statistic) -> tuple[str, Statistic]:
    """The row of the same array of a shared expert, the one that all tokens run through.

    Its gate, if it has one, counts as a part of its activations, so that w is 1.
    """
    loss, dot, rest = name.rpartition(".")
    axes = row.axes.translate(str.maketrans("XEF", "OOU"))
    request = row.request and _SHARED_MOMENTS
    about = f"{row.about}, of the shared expert"
    return f"{loss}{dot}{SHARED}{rest}", replace(
        row, about=about, axes=axes, sliced=False, request=request
    )


# By part of the statistics: arrays of layers with experts, of every layer's attention, and of the
# residual stream. Here m are the mixed heads that attention's output projection reads.
STATISTICS: dict[str, dict[str, Statistic]] = {
    "layers": _EXPERTS
    | dict(
        _of_shared(name, row)
        for name, row in _EXPERTS.items()
        if name == "count" or ("F" in row.axes and row.request != "follow_original")
    ),
    "attention": {
        "weight_norm": Statistic("norm of a group's projections", "G", "equal", "weights"),
        "mixed_gram": Statistic("[m; 1][m; 1]^T", "NH1 NH1", request="attention_moments"),
        **_gradients("", "G"),
    },
    "stream": {
        "angular_distance": Statistic(
            "arccos(cosine) / pi between the stream before two layers; L is behind all", "L1 L1"
        ),
    },
}  # fmt: skip


def statistic(name: str, part: str = "layers", table: Table = STATISTICS) -> Statistic:
    """The row of an array; ``lm.batch_abs`` is one of ``LOSS.batch_abs``.

    Raises:
        ValueError: there is none.
    """
    key = row_name(name)
    if key not in table[part]:
        raise ValueError(f"no statistic of {part} is called {name!r}")
    return table[part][key]


def row_name(name: str) -> str:
    """The name of an array's row: that of its kind where it belongs to a loss."""
    loss, dot, rest = name.partition(".")
    return f"LOSS.{rest}" if dot and loss in IMPORTANCE_LOSSES else name


def axis_sizes(config: ModelConfig, layer: int) -> dict[str, int]:
    """Sizes on the host of the axes of a layer's arrays; those of experts where it has some.

    O is the shared expert, one or none, of U neurons.
    """
    shape = config.layers[layer]
    sizes = {
        "D": config.width,
        "G": shape.num_kv_heads,
        "NH1": shape.num_heads * config.head_dim + 1,
        "L1": config.num_layers + 1,
    }
    if layer in config.moe_layers:
        moe = config.moe(layer)
        sizes |= {"E": moe.num_experts, "X": moe.num_experts}
        sizes |= {"F": moe.expert_width, "F1": moe.expert_width + 1}
        shared = moe.shared.width if moe.shared else 0
        sizes |= {"O": int(shared > 0), "U": shared, "U1": shared + 1}
    return sizes


def requested_bytes(
    config: ModelConfig, request: str, part: str = "layers", table: Table = STATISTICS
) -> dict[int, int]:
    """By layer that has some, bytes of the arrays that an argument of ``calibrate`` asks for.

    Second moments of 16 experts of 6,400 neurons take 2.6 GB a layer.
    """
    rows = [row for row in table[part].values() if row.request == request]
    layers = config.moe_layers if part == "layers" else range(config.num_layers)
    found = {i: sum(row.nbytes(axis_sizes(config, i)) for row in rows) for i in layers}
    return {i: size for i, size in found.items() if size}


def statistics_bytes(
    config: ModelConfig,
    losses: Collection[str],
    *,
    sliced: bool = False,
    layer: int | None = None,
    tokens: int = 0,
    table: Table = STATISTICS,
) -> int:
    """Bytes of the sums of a pass on the device, but for what must be asked for.

    Args:
        config: of the model that is measured.
        losses: whose gradients are, among ``PASSES``.
        sliced: only what slices of the text keep.
        layer: of this one alone; None: all, and the residual stream.
        tokens: of what has a row for each, as the host keeps it.
    """
    total = 0
    for part, rows in table.items():
        depths = config.moe_layers if part == "layers" else range(config.num_layers)
        if part == "stream":
            depths = (0,) if layer is None else ()
        for i in depths if layer is None else set(depths) & {layer}:
            sizes = axis_sizes(config, i) | {"T": tokens}
            if part == "layers":
                sizes["X"] = len(config.moe(i).expert_ids)
            for name, row in rows.items():
                if not row.request and (row.sliced or not sliced):
                    total += _times(name, row, losses) * row.nbytes(sizes)
    return total


def _times(name: str, row: Statistic, losses: Collection[str]) -> int:
    """How often an array is there when gradients of such losses are measured."""
    if row.source != "backward":
        return int(row.source == "forward")
    kind = name.partition(".")[0]
    return sum(loss == kind or (kind == "LOSS" and loss in IMPORTANCE_LOSSES) for loss in losses)


def per_token(name: str, part: str = "layers", table: Table = STATISTICS) -> bool:
    """Whether an array has a row for each token."""
    row = table[part].get(row_name(name))
    return row is not None and row.merge == "append"


def merge_arrays(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    part: str = "layers",
    xp: Any = np,
    table: Table = STATISTICS,
) -> dict[str, Any]:
    """Arrays of two texts as those of both together.

    Args:
        a, b: arrays of the same names; with means, the tokens of each expert (``stored_count`` on
            the device, ``count`` on the host).
        part: of the statistics.
        xp: ``numpy``, which takes the means in float64, or ``jax.numpy`` on the device.
        table: what merges how.
    """
    merged: dict[str, Any] = {}
    for name in a:
        rule = statistic(name, part, table).merge
        if rule == "sum":
            merged[name] = a[name] + b[name]
        elif rule == "maximum":
            merged[name] = xp.maximum(a[name], b[name])
        elif rule == "equal":
            merged[name] = a[name]
        elif rule == "append":
            merged[name] = xp.concatenate([a[name], b[name]])
        elif rule == "mean":
            squares = name.removesuffix("mean") + "m2"
            tokens = "stored_count" if "stored_count" in a else "count"
            tokens = f"{SHARED}count" if name.startswith(SHARED) else tokens
            merged[name], merged[squares] = _merge_moments(a, b, name, squares, tokens, xp)
    return merged


def _merge_moments(a, b, mean: str, squares: str, tokens: str, xp):
    """Chan, Golub and LeVeque 1979; in float64 where there is one, as sums of many texts need."""
    real = xp.float64 if xp is np else xp.float32
    n_a, n_b = (x[tokens].astype(real)[:, None] for x in (a, b))
    share = n_b / xp.maximum(n_a + n_b, 1)
    delta = b[mean].astype(real) - a[mean]
    return (
        (a[mean] + delta * share).astype(xp.float32),
        (a[squares] + b[squares] + xp.square(delta) * n_a * share).astype(xp.float32),
    )


def of_shared(layer: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a layer's shared expert under the names of routed ones: it is one of one."""
    return {n.replace(SHARED, "", 1): array for n, array in layer.items() if SHARED in n}


def sliced(layer: Mapping[str, Any], table: Table = STATISTICS) -> dict[str, Any]:
    """What slices of the text keep of a layer's arrays."""
    return {name: array for name, array in layer.items() if statistic(name, table=table).sliced}


def spread(
    arrays: Mapping[str, Any], config: ModelConfig, layer: int, table: Table = STATISTICS
) -> dict[str, np.ndarray]:
    """Arrays of a layer with experts from the device, as the host keeps them.

    Those over stored experts are spread over all router rows, counts are widened.
    """
    moe = config.moe(layer)
    kept: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if name == "stored_count":  # what count tells by router row
            continue
        values = np.asarray(array)
        if values.dtype.kind == "i":
            values = values.astype(np.int64)
        if statistic(name, table=table).axes.startswith("X"):
            rows = np.zeros((moe.num_experts, *values.shape[1:]), values.dtype)
            rows[list(moe.expert_ids)] = values
            values = rows
        kept[name] = values
    return kept
