"""Settings: dataclasses whose fields say what they mean, made from configuration mappings.

A field made by ``setting`` carries its documentation, choices and bounds; its annotation says of
what kind its values are. Checks, errors and help are read off these.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")
DTYPES = ("", "float32", "bfloat16", "float16")


def setting(
    default: Any,
    doc: str,
    *,
    choices: Sequence[str] | Callable[[], Sequence[str]] = (),
    bounds: str = "",
    hash: bool | None = None,
    **more: Any,
) -> Any:
    """A field of a dataclass with what is known about it in its metadata.

    Args:
        default: its value; a mapping or a dataclass's type is made anew for each instance.
        choices: the values that a text may have; a function where they are known later.
        bounds: of a number: ``>= 1`` or an interval such as ``(0, 1]``; None is always allowed.
        hash: False for a mapping of settings that are to be keys of a cache.
    """
    metadata = {"doc": doc, "choices": choices, "bounds": bounds, **more}
    if isinstance(default, type) or default == {}:
        kind = default if isinstance(default, type) else dict
        return dataclasses.field(default_factory=kind, hash=hash, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class CalibrationConfig:
    """Text to measure the model on; sequences are taken from all files in equal shares."""

    files: tuple[str, ...] = setting(
        (),
        "Text (.txt, .jsonl, .parquet), globs, or hf:NAME data sets; each is a domain. "
        "FILE:COLUMN reads another column than text, also of chats (lists of messages), which the "
        "checkpoint's chat template writes; FILE:COLUMN:NAME takes its template NAME.",
    )
    num_sequences: int = setting(
        128, "Sequences over all files, of one document each.", bounds=">= 1"
    )
    seq_len: int = setting(
        512, "Tokens per sequence; longer documents give a random window.", bounds=">= 1"
    )
    batch_size: int = setting(8, "Sequences per step.", bounds=">= 1")
    pack: bool = setting(False, "Join documents and cut blocks instead, as the MoNE authors do.")
    mode: str = setting(
        "auto",
        "Hold the model in memory (whole), or read one layer at a time from disk (layerwise), "
        "which takes the memory of a layer, and the text's residual stream before every layer on "
        "disk. auto: whole where the weights fit.",
        choices=("auto", "whole", "layerwise"),
    )
    second_moment_bytes: int = setting(
        0,
        "What second moments (of obs and repair) may take on the device: where those of all layers "
        "do not fit, the text is read several times, to the same result. 0: half of what is free.",
        bounds=">= 0",
    )


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out text; without files, nothing is evaluated."""

    files: tuple[str, ...] = setting((), "Text, as of calibration; each file is a domain.")
    seq_len: int = setting(
        512, "Tokens of context; longer documents are cut into several windows.", bounds=">= 1"
    )
    batch_size: int = setting(8, "Windows per step.", bounds=">= 1")
    max_bytes: int = setting(0, "Most bytes of each file to use; 0 uses all.", bounds=">= 0")


@dataclass(frozen=True)
class TrainingConfig:
    """Text that stages train on: an endless stream, on which each stage goes on after the last."""

    files: tuple[str, ...] | Mapping[str, float] = setting(
        (),
        "Text, as of calibration, mixed by size; or each file's share of tokens by name: "
        'ConfigDict({"a.jsonl": 0.7, ...}, allow_dotted_keys=True).',
    )
    seq_len: int = setting(512, "Tokens per packed row.", bounds=">= 1")
    batch_size: int = setting(
        8, "Rows per optimizer step, over all processes and micro-batches.", bounds=">= 1"
    )
    cache_dir: str = setting("", "Where tokenised text is kept; empty: in the user's cache folder.")
    teacher_cache: str = setting(
        "",
        "Folder of the teacher's predictions on this text, made by python -m "
        "moe_jax.cache_teacher, to train without running the teacher.",
    )


@dataclass(frozen=True)
class TrackingConfig:
    """Where the numbers of trainings go beside ``metrics.jsonl``."""

    tensorboard: bool = setting(False, "Write event files (needs tensorboardX).")
    wandb_project: str = setting("", "Log to this Weights & Biases project (needs wandb).")


@dataclass(frozen=True)
class ExportConfig:
    """How the result is stored."""

    packing: Literal["keep", "source"] = setting(
        "keep",
        "Of a packed checkpoint (FP8, MXFP4). keep: packed weights keep their bytes if all of them "
        "can, as where nothing but experts or layers goes; else the result is written in 16 bits. "
        "source: what cannot is packed again by the checkpoint's scheme; the report tells the "
        "error.",
        choices=("keep", "source"),
    )
    cut_further: bool = setting(
        False,
        "Cut the checkpoint's layers for predicting further tokens (MTP) as the last layer is; "
        "else they are left out of a model that was cut.",
    )


# Values.


def mapping(raw: Any, where: str) -> Mapping[str, Any]:
    """``raw``, or an empty mapping for None; raises ValueError for anything else."""
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where} must be a dict, got {raw!r}")
    return raw


def section(kind: type[T], raw: Any, where: str = "") -> T:
    """An instance of the dataclass ``kind`` from a mapping.

    Tuples may be lists, or text with commas, as on a command line.

    Raises:
        ValueError: an unknown field, with the nearest known one; a value of the wrong kind, out of
            bounds, or none of the choices.
    """
    prefix = f"{where}." if where else ""
    hints = typing.get_type_hints(kind)
    values = dict(mapping(raw, where))
    check_names(values, [field.name for field in _fields(kind)], prefix)
    values = {name: convert(value, hints[name], prefix + name) for name, value in values.items()}
    made = kind(**values)
    check_values(made, prefix)
    return made


def _fields(kind: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(kind)


def check_values(settings: Any, prefix: str = "") -> None:
    """Raises ValueError for a field out of its bounds, or that is none of its choices."""
    for field in _fields(settings):
        value = getattr(settings, field.name)
        if value is None:
            continue
        if choices := field_choices(field):
            check_choice(prefix + field.name, value, choices)
        if bounds := field.metadata.get("bounds"):
            check_bounds(prefix + field.name, value, bounds)


def field_choices(field: dataclasses.Field) -> Sequence[str]:
    """The values that a field may have; none if it is free."""
    choices = field.metadata.get("choices", ())
    return choices() if callable(choices) else choices


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises ValueError, with the nearest choice, if ``value`` is none of them."""
    if value not in choices:
        hint = nearest(str(value), map(str, choices))
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}{hint}")


def check_bounds(name: str, value: float, bounds: str) -> None:
    """Raises ValueError unless ``value`` lies in ``bounds``, such as ``>= 1`` or ``(0, 1]``."""
    if bounds.startswith(">="):
        least = float(bounds.removeprefix(">="))
        if not value >= least:
            raise ValueError(f"{name} must be at least {least:g}, got {value}")
        return
    low, high = map(float, bounds[1:-1].split(","))
    above = value > low if bounds[0] == "(" else value >= low
    below = value < high if bounds[-1] == ")" else value <= high
    if not (above and below):
        raise ValueError(f"{name} must be in {bounds}, got {value}")


def convert(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the annotation ``hint`` has it.

    Raises:
        ValueError: it is of another kind.
    """
    members = _members(hint)
    if any(_is_kind(value, member) for member in members):
        return value
    for member in members:
        if (made := _made(value, member, where)) is not None:
            return made
    wanted = " or ".join(map(_kind_name, members))
    raise ValueError(f"{where} must be {wanted}, got {value!r}")


def _made(value: Any, kind: Any, where: str) -> Any:
    """What ``value`` is as one of a kind with parts, or as a float; None if it cannot be one."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and isinstance(value, (str, list, tuple)):
        given = [value] if isinstance(value, str) else value
        parts = [part for one in given for part in _parts(one, arguments[0])]
        return tuple(convert(part, arguments[0], f"{where}[{i}]") for i, part in enumerate(parts))
    if value is not None and not isinstance(value, Mapping):
        return value if kind is float and type(value) is int else None
    if dataclasses.is_dataclass(kind):
        return section(typing.cast(type, kind), value, where)
    if _is_mapping_kind(kind):
        item = arguments[1] if len(arguments) > 1 else Any
        return {key: convert(one, item, f"{where}.{key}") for key, one in (value or {}).items()}
    return None


def _parts(item: Any, kind: Any) -> list[Any]:
    """Text with commas as its parts, numbers where ``kind`` is one."""
    if not isinstance(item, str):
        return [item]
    parts: list[Any] = [part.strip() for part in item.split(",") if part.strip()]
    for i, part in enumerate(parts if kind in (int, float) else ()):
        with contextlib.suppress(ValueError):  # told where parts are checked
            parts[i] = kind(part)
    return parts


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _is_mapping_kind(kind: Any) -> bool:
    origin = typing.get_origin(kind) or kind
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _is_kind(value: Any, kind: Any) -> bool:
    """Whether a value without parts is of a kind; True is no integer."""
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str)  # which one is told by the field's choices
    if kind is Any:
        return True
    if dataclasses.is_dataclass(kind):
        return isinstance(value, typing.cast(type, kind))
    return isinstance(kind, type) and type(value) is kind


def _kind_name(kind: Any) -> str:
    if kind is type(None):
        return "None"
    if typing.get_origin(kind) is Literal or kind is str:
        return "text"
    if typing.get_origin(kind) is tuple:
        return f"a tuple of {_kind_name(typing.get_args(kind)[0])}"
    if _is_mapping_kind(kind) or dataclasses.is_dataclass(kind):
        return "a dict"
    return getattr(kind, "__name__", str(kind))


def check_names(values: Iterable[str], known: Sequence[str], prefix: str = "") -> None:
    """Raises ValueError, with the nearest known name, if ``values`` has another."""
    for name in values:
        if name not in known:
            raise ValueError(
                f"unknown configuration field {prefix}{name}{nearest(name, known)}; "
                f"known: {', '.join(known)}"
            )


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error's message, or nothing if no known name is similar."""
    match = difflib.get_close_matches(name, list(known), 1, 0.4)
    return f" (did you mean {match[0]!r}?)" if match else ""


def check_dtype(dtype: str) -> None:
    """Raises ValueError unless ``dtype`` is one to compute in, or empty."""
    check_choice("dtype", dtype, DTYPES)


def check_seed(seed: Any) -> None:
    """Raises ValueError unless ``seed`` is an integer from 0 on."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer, 0 or more, got {seed!r}")


def check_seq_len(seq_len: int, max_positions: int) -> None:
    """Raises ValueError if sequences are longer than the model's context."""
    if seq_len > max_positions:
        raise ValueError(
            f"seq_len must be at most the model's {max_positions} positions, got {seq_len}"
        )


# Help.


def field_rows(kind: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of every field of a dataclass, those of its sections after it."""
    hints = typing.get_type_hints(kind)
    described = _described_attributes(kind)
    for field in _fields(kind):
        hint = hints[field.name]
        if field.metadata.get("beside"):  # its fields stand beside these, and are told apart
            continue
        if dataclasses.is_dataclass(hint):
            yield from field_rows(typing.cast(type, hint), f"{prefix}{field.name}.")
            continue
        doc = field.metadata.get("doc") or described.get(field.name, "")
        if field.metadata.get("needs"):
            doc += f" Needs {field.metadata['needs'].what}."
        if choices := [choice for choice in field_choices(field) if choice]:
            doc += f" One of: {', '.join(choices)}."
        yield prefix + field.name, _default(field), doc


def field_help(kind: type) -> str:
    """Every field of a dataclass as text for a terminal, for ``--help``."""
    lines = []
    for name, default, doc in field_rows(kind):
        meaning = f"{doc} Default: {default}." if default else doc
        lines += [f"  {name}", *textwrap.wrap(meaning, 94, initial_indent=" " * 6,
                                              subsequent_indent=" " * 6)]  # fmt: skip
    return "\n".join(lines)


def field_table(kind: type) -> str:
    """Every field of a dataclass as a Markdown table."""
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for name, default, doc in field_rows(kind):
        shown = f"`{default}`" if default else ""
        rows.append(f"| `{name}` | {shown} | {doc.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def _default(field: dataclasses.Field) -> str:
    """Nothing for what is empty: its meaning says what that stands for."""
    value = None if field.default is dataclasses.MISSING else field.default
    return "" if value is None or value in ("", ()) else str(value)


def _described_attributes(kind: type) -> dict[str, str]:
    """The ``Attributes`` of a docstring, for dataclasses that describe their fields there."""
    _, _, text = (kind.__doc__ or "").partition("Attributes:\n")
    described: dict[str, str] = {}
    names: list[str] = []
    for line in textwrap.dedent(text).splitlines():
        if line and not line.startswith(" ") and ": " in line:
            before, _, doc = line.partition(": ")
            names = [name.strip() for name in before.split(",")]
            described |= dict.fromkeys(names, doc)
        elif line.startswith(" "):
            described |= {name: f"{described[name]} {line.strip()}" for name in names}
    return {name: doc[:1].upper() + doc[1:].replace("``", "") for name, doc in described.items()}
