"""Facts that differ by layer, as ``config.json`` spells them: dense layers and sliding windows.

A pattern is a pair of functions, one for each direction; ``write`` edits a parsed file only where
it does not say so already. What a file cannot say is found by reading it again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax.hf.checks import list_at, typed

Json = dict[str, Any]
Windows = tuple[int | None, ...]


class DensePattern(NamedTuple):
    """Which layers have no experts.

    Attributes:
        read: (parsed file, number of layers) -> their indices.
        write: (parsed file, indices, number of layers) edits the file.
    """

    read: Callable[[Mapping[str, Any], int], Collection[int]]
    write: Callable[[Json, Sequence[int], int], None]


class WindowPattern(NamedTuple):
    """The sliding window of each layer.

    Attributes:
        read: (parsed file, ``sliding_window`` as it stands there, number of layers) -> windows.
        write: (parsed file, default of ``sliding_window``, windows) edits the file.
    """

    read: Callable[[Mapping[str, Any], int | None, int], Windows]
    write: Callable[[Json, int | None, Windows], None]


def _refuse_dense(hf: Json, dense: Sequence[int], count: int) -> None:
    if dense:
        raise ValueError(
            f"{hf['model_type']}: every layer must have experts, layers {list(dense)} have none"
        )


def _refuse_experts(hf: Json, dense: Sequence[int], count: int) -> None:
    if len(dense) < count:
        raise ValueError(f"{hf['model_type']}: no layer may have experts, got {count - len(dense)}")


def _read_listed(hf: Mapping[str, Any], count: int) -> Collection[int]:
    step = 1 if hf.get(_PERIOD) is None else typed(_PERIOD, hf[_PERIOD], int)
    if step < 1:
        raise ValueError(f"{_PERIOD} must be at least 1, got {step}")
    listed = list_at(hf, _LISTED, int)
    return [i for i in range(count) if i in listed or (i + 1) % step]


def _write_listed(hf: Json, dense: Sequence[int], count: int) -> None:
    if list(dense) != _read_listed(hf, count):
        hf.update({_LISTED: list(dense), _PERIOD: 1})


_LISTED, _PERIOD = "mlp_only_layers", "decoder_sparse_step"
NONE_DENSE = DensePattern(lambda hf, count: (), _refuse_dense)
ALL_DENSE = DensePattern(lambda hf, count: range(count), _refuse_experts)
# Those in a list, and all but every n-th.
LISTED_DENSE = DensePattern(_read_listed, _write_listed)


def first_dense(default: int) -> DensePattern:
    """The first layers, as many as ``first_k_dense_replace`` says; ``default`` if it is absent."""

    def read(hf: Mapping[str, Any], count: int) -> Collection[int]:
        first = default if hf.get(_FIRST) is None else typed(_FIRST, hf[_FIRST], int)
        if first < 0:
            raise ValueError(f"{_FIRST} must be at least 0, got {first}")
        return range(min(first, count))

    def write(hf: Json, dense: Sequence[int], count: int) -> None:
        if list(dense) != list(range(len(dense))):
            raise ValueError(
                f"{hf['model_type']}: layers without experts must be the first ones, "
                f"got {list(dense)}"
            )
        if len(dense) != len(read(hf, count)):
            hf[_FIRST] = len(dense)

    return DensePattern(read, write)


_FIRST = "first_k_dense_replace"


def _read_kinds(hf: Mapping[str, Any], count: int) -> Collection[int]:
    kinds = hf.get(_KINDS)
    if kinds is None:
        return range(min(1, count))
    if not isinstance(kinds, list) or len(kinds) != count or set(kinds) - {"dense", "sparse"}:
        raise ValueError(f"{_KINDS} must be {count} of 'dense' and 'sparse', got {kinds!r}")
    return [i for i, kind in enumerate(kinds) if kind == "dense"]


def _write_kinds(hf: Json, dense: Sequence[int], count: int) -> None:
    if list(dense) != list(_read_kinds(hf, count)):
        hf.pop(_FIRST, None)  # the list says it
        hf[_KINDS] = ["dense" if i in dense else "sparse" for i in range(count)]


_KINDS = "mlp_layer_types"
# A list of kinds, or the first layer alone.
DENSE_BY_KIND = DensePattern(_read_kinds, _write_kinds)


def _read_interval(hf: Mapping[str, Any], count: int) -> Collection[int]:
    values = {}
    for name, default in _INTERVAL.items():
        value = hf.get(name)
        values[name] = default if value is None else typed(name, value, int)
    start, end, step = values.values()
    if step < 1:
        raise ValueError(f"moe_layer_interval must be at least 1, got {step}")
    last = count - 1 if end == -1 else end
    return [i for i in range(count) if not (start <= i <= last and (i + 1) % step == 0)]


def _write_interval(hf: Json, dense: Sequence[int], count: int) -> None:
    if list(dense) == _read_interval(hf, count):
        return
    sparse = [i for i in range(count) if i not in dense]
    if not sparse:
        raise ValueError(f"{hf['model_type']}: at least one layer must have experts, got none")
    hf.update(dict(zip(_INTERVAL, (sparse[0], sparse[-1], 1), strict=True)))
    if list(dense) != _read_interval(hf, count):
        raise ValueError(
            f"{hf['model_type']}: layers with experts must follow each other, got {sparse}"
        )


_INTERVAL = {"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1}
# Every n-th layer from one to another has experts.
DENSE_BY_INTERVAL = DensePattern(_read_interval, _write_interval)


def one_window(switch: str | None = None) -> WindowPattern:
    """One window for all layers, which counts only if the boolean key ``switch`` is true."""

    def read(hf: Mapping[str, Any], window: int | None, count: int) -> Windows:
        on = switch is None or hf.get(switch, False)
        return (window if on else None,) * count

    def write(hf: Json, default: int | None, windows: Windows) -> None:
        _check_equal(hf, windows)
        window = windows[0]
        if read(hf, hf.get("sliding_window", default), len(windows)) == windows:
            return
        if switch is None or window is not None:
            hf["sliding_window"] = window
        if switch is not None:
            hf[switch] = window is not None

    return WindowPattern(read, write)


def _check_equal(hf: Json, windows: Windows) -> None:
    if len(set(windows)) > 1:
        raise ValueError(
            f"{hf['model_type']}: sliding_window must be the same in all layers, got {set(windows)}"
        )


NO_WINDOW = WindowPattern(
    lambda hf, window, count: (None,) * count, lambda hf, default, windows: None
)

_TYPES, _LAST = "layer_types", "max_window_layers"
_SLIDING, _FULL = "sliding_attention", "full_attention"


def window_by_type(switch: str | None = None, first: int | None = None) -> WindowPattern:
    """A list of types; without one, every other layer slides.

    Args:
        switch: a boolean key; layers slide only if it is true. None: there is none.
        first: default of ``max_window_layers``: without a list only as many layers may slide.
            None: the key is not read.
    """

    def types(hf: Mapping[str, Any], count: int) -> list[bool]:
        on = switch is None or bool(hf.get(switch, False))
        listed = hf.get(_TYPES)
        if listed is None:
            end = count if first is None else typed(_LAST, hf.get(_LAST, first), int)
            return [on and i % 2 == 0 and i < end for i in range(count)]
        known = isinstance(listed, list) and not set(listed) - {_SLIDING, _FULL}
        if not known or len(listed) != count:
            raise ValueError(
                f"{_TYPES} must be {count} of {_SLIDING!r} and {_FULL!r}, got {listed!r}"
            )
        if not on and _SLIDING in listed:
            raise ValueError(
                f"{_TYPES} must be all {_FULL!r} while {switch} is false, got {listed}"
            )
        return [kind == _SLIDING for kind in listed]

    def read(hf: Mapping[str, Any], window: int | None, count: int) -> Windows:
        return tuple(window if slides else None for slides in types(hf, count))

    def write(hf: Json, default: int | None, windows: Windows) -> None:
        used = {window for window in windows if window is not None}
        if len(used) > 1:
            _check_equal(hf, tuple(used))
        if read(hf, hf.get("sliding_window", default), len(windows)) == windows:
            return
        if switch is not None:
            hf[switch] = bool(used)
        if used:
            hf["sliding_window"] = used.pop()
        hf[_TYPES] = [_FULL if window is None else _SLIDING for window in windows]

    return WindowPattern(read, write)


def follow_layers(hf: Json, before: int, kept: Sequence[int], count: int) -> None:
    """Lists with an entry for each of ``before`` layers get one for each of ``count``.

    Readers check such lists against the number of layers also where their class ignores them.

    Args:
        hf: parsed file, edited.
        before: layers of the model that the file was written for.
        kept: which of them are left, where that is known.
        count: layers now.

    Raises:
        ValueError: entries differ and nothing tells which are left.
    """
    for key, value in hf.items():
        by_layer = "layer" in key or key.endswith(("_types", "_type_list", "_pattern"))
        if not (isinstance(value, list) and len(value) == before and by_layer) or key == _LISTED:
            continue
        if len(kept) == count and all(i < before for i in kept):
            hf[key] = [value[i] for i in kept]
        elif all(entry == value[0] for entry in value):
            hf[key] = value[:1] * count
        else:
            raise ValueError(
                f"{key} has an entry for each of {before} layers; it is not known which of them "
                f"the {count} of this model were"
            )
