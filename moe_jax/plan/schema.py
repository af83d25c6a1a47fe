"""What a plan says, and its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

_FORMAT = "moe_jax.plan"
_VERSION = 1
_FIELDS = {"format", "version", "method", "settings", "layers", "dropped_layers"}
Replacement = Literal["novice", "weighted_novice", "zero", "delete", "merge"]
NoviceValue = Literal["mean", "weighted_mean", "least_squares", "zero"]


@dataclass(frozen=True)
class Merge:
    """Experts that become one.

    Attributes:
        kept: the expert whose place, and order of neurons, the merged one takes.
        removed: the others; they vanish with their router rows.
        weights: shares of ``kept`` and then of each of ``removed`` in the weighted mean; they need
            not sum to one.
    """

    kept: int
    removed: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer; ids of experts are router rows before the plan.

    A layer without experts may be named for its ``kv_groups`` alone.

    Attributes:
        deleted: experts that vanish with their router rows; their tokens go to other experts.
        novices: experts that become a constant, still chosen and weighted by the router.
        novice_value: ``mean`` (the expert's mean output, from statistics), ``weighted_mean`` (its
            mean weighted by the routing weights), ``least_squares`` (weighted by their squares:
            what repair gives an expert that keeps nothing but a constant) or ``zero``.
        neurons: by expert id, the hidden neurons that stay, ascending; an expert that is not
            listed keeps all of them.
        own_widths: experts that keep different numbers of neurons are stored so, in buckets of
            equal width; the shipped modelling file reads the result. Without it and without
            ``padded_width``, all experts must keep the same number, unless the model's already
            differ.
        padded_width: the stored width: experts that keep fewer are filled up with neurons whose
            weights are zero. These add nothing (``silu(0) * 0``) and have no gradient, so that
            training leaves them at zero; stock loaders, which know one width, read the result.
            What is stored is then more than what was kept.
        repair: the down rows of the neurons that stay make up for those that go, by least squares
            over the second moments of the statistics (see ``repair.repaired_down``); with
            ``kv_groups``, so do the output projections (and bias) of the heads that stay.
        constants: experts that stay also add a constant vector. With ``repair`` it is part of the
            least squares; without, it is the mean of what the neurons that go added (FLAP's bias
            compensation, arXiv 2312.11983).
        shared_neurons: hidden neurons of the shared expert that stay, ascending; None keeps all.
            With ``repair``, its down rows make up for those that go, too.
        kv_groups: key/value heads that stay, each with its query heads, ascending; None keeps all.
        merges: groups of experts of which each becomes one, disjoint.
        merge_align: bring the neurons of merged experts into the order of the one that stays
            before the mean is taken: a permutation of an expert's neurons leaves it as it is.
        merge_router: the merged expert's router row: ``mean`` (of its experts' rows, by the same
            weights) or ``kept``.
    """

    deleted: tuple[int, ...] = ()
    novices: tuple[int, ...] = ()
    novice_value: NoviceValue = "mean"
    neurons: dict[int, tuple[int, ...]] = field(default_factory=dict)
    padded_width: int | None = None
    kv_groups: tuple[int, ...] | None = None
    merges: tuple[Merge, ...] = ()
    merge_align: bool = True
    merge_router: Literal["mean", "kept"] = "mean"
    repair: bool = False
    own_widths: bool = False
    constants: bool = False
    shared_neurons: tuple[int, ...] | None = None

    @property
    def vanishing(self) -> frozenset[int]:
        """Experts whose router rows go: deleted, or merged into others."""
        return frozenset(self.deleted).union(*(merge.removed for merge in self.merges))


def _layer_facts(layer: LayerPlan) -> dict[str, Any]:
    """Its fields; one that is younger than the format only if it says something.

    So plans, and what is named by their digests, stay as they were.
    """
    facts = asdict(layer)
    if layer.shared_neurons is None:
        del facts["shared_neurons"]
    return facts


@dataclass(frozen=True)
class Plan:
    """One layer plan per changed layer, and how they came about.

    Attributes:
        layers: by layer index.
        dropped_layers: whole decoder blocks that go; the others move up.
        method: the criterion.
        settings: its settings, for the record.
    """

    layers: dict[int, LayerPlan]
    method: str = "manual"
    settings: dict[str, Any] = field(default_factory=dict)
    dropped_layers: tuple[int, ...] = ()

    @property
    def sequential(self) -> bool:
        """Whether each layer was planned, and is to be repaired, after those before it were cut."""
        return bool(self.settings.get("sequential", False))

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(
            {
                "format": _FORMAT,
                "version": _VERSION,
                "method": self.method,
                "settings": self.settings,
                # Tuples become lists and expert ids text.
                "layers": {str(i): _layer_facts(layer) for i, layer in sorted(self.layers.items())},
                "dropped_layers": self.dropped_layers,
            }
        )

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> Plan:
        """Reads what ``to_json`` wrote, or the same as a dict; absent fields have their defaults.

        Raises:
            ValueError: not a plan, another version, an unknown field, or one of the wrong kind
                (named).
        """
        try:
            raw = json.loads(text) if isinstance(text, str) else text
        except json.JSONDecodeError as error:
            raise ValueError(f"a plan must be JSON: {error}") from error
        if not isinstance(raw, Mapping) or raw.get("format") != _FORMAT:
            raise ValueError(f"a plan must be a JSON object with format {_FORMAT!r}")
        if raw.get("version") != _VERSION:
            raise ValueError(f"plan version must be {_VERSION}, got {raw.get('version')!r}")
        if unknown := sorted(set(raw) - _FIELDS):
            raise ValueError(f"plan fields must be among {sorted(_FIELDS)}, got {unknown}")
        settings, method = raw.get("settings", {}), raw.get("method", "manual")
        for name, value, kind in (
            ("layers", raw.get("layers"), Mapping),
            ("settings", settings, Mapping),
            ("method", method, str),
        ):
            if not isinstance(value, kind):
                wanted = "text" if kind is str else "an object"
                raise ValueError(f"plan {name} must be {wanted}, got {value!r}")
        if not all(str(i).isdigit() for i in raw["layers"]):
            raise ValueError(f"plan layers must be numbered, got {sorted(raw['layers'])[:5]}")
        layers = {int(i): _layer_from_json(i, layer) for i, layer in raw["layers"].items()}
        try:
            dropped = _ids(raw.get("dropped_layers", ()))
        except TypeError as error:
            raise ValueError(f"plan dropped_layers must be integers ({error})") from error
        return cls(layers, method, dict(settings), dropped)


def _layer_from_json(name: str, raw: Any) -> LayerPlan:
    if not isinstance(raw, Mapping):
        raise ValueError(f"plan layer {name} must be an object, got {raw!r}")
    known = {field.name for field in fields(LayerPlan)}
    unknown = set(raw) - known
    if unknown:
        raise ValueError(
            f"plan layer {name}: fields must be among {sorted(known)}, got {sorted(unknown)}"
        )
    _check_choice(name, raw, "novice_value", get_args(NoviceValue))
    _check_choice(name, raw, "merge_router", ("mean", "kept"))
    padded, groups = raw.get("padded_width"), raw.get("kv_groups")
    shared = raw.get("shared_neurons")
    try:
        return LayerPlan(
            deleted=_ids(raw.get("deleted", ())),
            novices=_ids(raw.get("novices", ())),
            novice_value=raw.get("novice_value", "mean"),
            merges=tuple(_merge(merge) for merge in raw.get("merges", ())),
            merge_align=_boolean(raw.get("merge_align", True)),
            merge_router=raw.get("merge_router", "mean"),
            neurons={int(e): _ids(kept) for e, kept in raw.get("neurons", {}).items()},
            padded_width=None if padded is None else _integer(padded),
            kv_groups=None if groups is None else _ids(groups),
            repair=_boolean(raw.get("repair", False)),
            own_widths=_boolean(raw.get("own_widths", False)),
            constants=_boolean(raw.get("constants", False)),
            shared_neurons=None if shared is None else _ids(shared),
        )
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"plan layer {name}: a value of the wrong kind ({error})") from error


def _check_choice(layer: str, raw: Mapping[str, Any], field: str, choices: tuple[str, ...]) -> None:
    value = raw.get(field, choices[0])
    if value not in choices:
        raise ValueError(f"plan layer {layer}: {field} must be one of {choices}, got {value!r}")


def _merge(raw: Mapping[str, Any]) -> Merge:
    weights = tuple(float(weight) for weight in raw["weights"])
    return Merge(_integer(raw["kept"]), _ids(raw["removed"]), weights)


def _ids(values: Any) -> tuple[int, ...]:
    return tuple(_integer(value) for value in values)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"got {value!r}")
    return value


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"got {value!r}")
    return value


def read_plan(path: str | Path) -> Plan:
    """A plan file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it holds no plan; the message names the file.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no such plan file: {file}")
    return parse_plan(file.read_text(encoding="utf-8", errors="replace"), file)


def parse_plan(text: str, file: Path) -> Plan:
    """The plan in ``text``; raises ValueError naming ``file`` if it is none."""
    try:
        return Plan.from_json(text)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
