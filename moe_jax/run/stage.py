"""One stage of a run: a cut, a training, or a cut and then a training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from moe_jax.config import ModelConfig
from moe_jax.distill import TrainSettings
from moe_jax.fields import mapping, nearest, section
from moe_jax.plan import Replacement, kept_count, kept_groups, kept_width
from moe_jax.scoring import (
    AGGREGATIONS,
    EXPERT_CRITERIA,
    GROUP_CRITERIA,
    IMPORTANCE_LOSSES,
    NEEDED_LOSS,
    NEURON_CRITERIA,
)

_EXPERT_FIELDS = ("keep_experts", "keep_ratio", "scope", "replacement", "frequency")
_NEURON_FIELDS = (
    "expert_width", "width_ratio", "round_to", "neuron_scope", "importance", "aggregation",
    "kv_groups", "group_importance",
)  # fmt: skip
_GRADIENTS = (*IMPORTANCE_LOSSES, "fisher")
SLIM, DISTILL = "slim", "distill"


@dataclass(frozen=True)
class StageConfig:
    """What happens to the model in one stage.

    Attributes:
        method: ``mone`` or another expert criterion; ``slim`` (SlimMoE's one-shot step);
            ``distill`` (no cut, training only). Left out, it follows from the other fields.
        keep_experts, keep_ratio: for expert criteria, one of them.
        scope: ``layer`` or ``global`` ranking of experts.
        replacement: of removed experts: ``novice``, ``zero`` or ``delete``.
        frequency: of ``mone``: ``routing_mass`` or ``mean_weight``.
        expert_width, width_ratio: for ``slim``, one of them (or none, if ``kv_groups`` is given).
        round_to: widths become multiples of it.
        neuron_scope: rank neurons within each ``expert``, or across the experts of a ``layer``.
        importance: the neuron criterion of ``slim``.
        aggregation: how gradients of several sequences become one importance; empty takes the
            criterion's own.
        kv_groups: key/value heads (with their query heads) that each layer keeps.
        group_importance: the criterion that ranks them; empty takes ``importance`` if it is one
            for groups too, else ``kd_topk``.
        plan: a plan file to apply instead of measuring anything.
        distill: how to train after the cut; None for not at all.
    """

    method: str = "mone"
    keep_experts: int | None = None
    keep_ratio: float | None = None
    scope: str = "layer"
    replacement: Replacement = "novice"
    frequency: str = "routing_mass"
    expert_width: int | None = None
    width_ratio: float | None = None
    round_to: int = 1
    neuron_scope: str = "expert"
    importance: str = "kd_topk"
    aggregation: str = ""
    kv_groups: int | None = None
    group_importance: str = ""
    plan: str = ""
    distill: TrainSettings | None = None

    @classmethod
    def from_dict(cls, raw: Any, where: str, seed: int = 0) -> StageConfig:
        """Builds and checks a stage; raises ValueError naming the field and its bound.

        ``seed`` is that of its training, unless ``raw`` has one.
        """
        values = dict(mapping(raw, where))
        if values.get("distill") is not None:
            values["distill"] = _train_settings(values["distill"], f"{where}.distill", seed)
        if not values.get("method"):
            values["method"] = _implied_method(values)
        stage = section(cls, values, where)
        _check_stage(where, stage)
        return stage

    @property
    def cuts(self) -> bool:
        """Whether the stage removes anything."""
        return bool(self.plan) or self.method != DISTILL

    @property
    def slims_experts(self) -> bool:
        return self.expert_width is not None or self.width_ratio is not None

    @property
    def criterion(self) -> str:
        """What ranks experts, or their neurons."""
        return self.importance if self.method == SLIM else self.method

    @property
    def group_criterion(self) -> str:
        """What ranks key/value groups."""
        if self.group_importance:
            return self.group_importance
        if self.importance == "random_neurons":
            return "random_groups"
        return self.importance if self.importance in GROUP_CRITERIA else "kd_topk"

    @property
    def score_options(self) -> dict[str, str]:
        """Options of ``scoring.score`` for experts and neurons."""
        if self.method == "mone":
            return {"frequency": self.frequency}
        if self.method == SLIM and self.aggregation:
            return {"aggregation": self.aggregation}
        return {}

    @property
    def group_score_options(self) -> dict[str, str]:
        """Options of ``scoring.score`` for key/value groups."""
        if self.aggregation and self.group_criterion in _GRADIENTS:
            return {"aggregation": self.aggregation}
        return {}

    @property
    def losses(self) -> tuple[str, ...]:
        """Losses that calibration must differentiate for this stage."""
        if self.plan or not self.cuts:
            return ()
        criteria = [self.criterion] if self.method != SLIM or self.slims_experts else []
        criteria += [self.group_criterion] if self.kv_groups is not None else []
        return tuple(sorted({NEEDED_LOSS[name] for name in criteria if name in NEEDED_LOSS}))

    def after_cut(self, model: ModelConfig) -> ModelConfig:
        """What the cut makes of ``model``; which experts go is not known yet.

        A global ranking is taken as one by layer, and experts ranked across a layer as equally
        wide.

        Raises:
            ValueError: the model cannot be cut so.
        """
        for layer in model.moe_layers if self.method != SLIM or self.slims_experts else ():
            model = self._after_moe_cut(model, layer)
        if self.kv_groups is None:
            return model
        layers = []
        for i, layer_config in enumerate(model.layers):
            groups = kept_groups(model, i, self.kv_groups)
            queries = layer_config.num_heads // layer_config.num_kv_heads
            layers.append(
                dataclasses.replace(layer_config, num_kv_heads=groups, num_heads=groups * queries)
            )
        return dataclasses.replace(model, layers=tuple(layers))

    def _after_moe_cut(self, model: ModelConfig, layer: int) -> ModelConfig:
        moe = model.moe(layer)
        if self.method == SLIM:
            width = kept_width(moe, layer, self.expert_width, self.width_ratio, self.round_to)
            return model.replace_moe(layer, expert_width=width)
        keep = kept_count(moe, layer, self.keep_experts, self.keep_ratio)
        if self.replacement == "delete":
            novices = len(moe.novice_ids)
            return model.replace_moe(
                layer, num_experts=keep + novices, novice_ids=tuple(range(keep, keep + novices))
            )
        return model.replace_moe(layer, novice_ids=tuple(range(keep, moe.num_experts)))


def _train_settings(raw: Any, where: str, seed: int) -> TrainSettings:
    values = {"seed": seed, **mapping(raw, where)}
    if "steps" not in values:
        raise ValueError(f"{where}.steps must be given")
    if type(values["steps"]) is not int:
        raise ValueError(f"{where}.steps must be int, got {values['steps']!r}")
    # Schedules of short runs: a default warm-up longer than the run is no one's wish.
    values.setdefault("warmup_steps", min(TrainSettings.warmup_steps, values["steps"] // 10))
    for name in ("hidden_layers", "trainable"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    layers = values.get("hidden_layers", ())
    if not isinstance(layers, tuple) or not all(type(i) is int for i in layers):
        raise ValueError(f"{where}.hidden_layers must be a tuple of integers, got {layers!r}")
    try:
        return section(TrainSettings, values, where)
    except (TypeError, ValueError) as error:
        text = str(error)
        raise ValueError(text if where in text else f"{where}: {text}") from error


def _implied_method(values: Mapping[str, Any]) -> str:
    given = {name for name, value in values.items() if value is not None}
    if given & set(_NEURON_FIELDS):
        return SLIM
    return DISTILL if given == {"distill"} else "mone"


def check_choice(where: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError, with the nearest choice, if ``value`` is none of them."""
    if value not in choices:
        raise ValueError(
            f"{where} must be one of {tuple(choices)}, got {value!r}{nearest(value, choices)}"
        )


def _check_stage(where: str, stage: StageConfig) -> None:
    default = StageConfig()
    given = {name for name, value in vars(stage).items() if value != getattr(default, name)}
    given -= {"distill"}
    if stage.plan:
        extra = sorted(given - {"plan", "method"})
        if extra:
            raise ValueError(f"{where}: a stage with a plan takes nothing else, got {extra}")
        return
    check_choice(f"{where}.method", stage.method, (*EXPERT_CRITERIA, SLIM, DISTILL))
    check_choice(f"{where}.scope", stage.scope, ("layer", "global"))
    check_choice(f"{where}.replacement", stage.replacement, get_args(Replacement))
    check_choice(f"{where}.frequency", stage.frequency, ("routing_mass", "mean_weight"))
    check_choice(f"{where}.neuron_scope", stage.neuron_scope, ("expert", "layer"))
    check_choice(f"{where}.importance", stage.importance, tuple(NEURON_CRITERIA))
    check_choice(f"{where}.aggregation", stage.aggregation, ("", *AGGREGATIONS))
    check_choice(f"{where}.group_importance", stage.group_importance, ("", *GROUP_CRITERIA))
    if stage.round_to < 1:
        raise ValueError(f"{where}.round_to must be at least 1, got {stage.round_to}")
    if stage.expert_width is not None and stage.expert_width % stage.round_to:
        raise ValueError(
            f"{where}.expert_width must be a multiple of round_to = {stage.round_to}, "
            f"got {stage.expert_width}"
        )
    if stage.aggregation and stage.importance not in _GRADIENTS:
        raise ValueError(
            f"{where}.aggregation is for gradients, not for importance {stage.importance!r}"
        )
    _check_sizes(where, stage, given)


def _check_sizes(where: str, stage: StageConfig, given: set[str]) -> None:
    foreign: tuple[str, ...] = _NEURON_FIELDS
    sizes: tuple[str, ...] = ("keep_experts", "keep_ratio")
    if stage.method == SLIM:
        foreign, sizes = _EXPERT_FIELDS, ("expert_width", "width_ratio")
    elif stage.method == DISTILL:
        foreign, sizes = (*_EXPERT_FIELDS, *_NEURON_FIELDS), ()
    unused = sorted(given & set(foreign))
    if unused:
        raise ValueError(f"{where}: method {stage.method!r} does not use {unused}")
    if stage.method == DISTILL:
        if stage.distill is None:
            raise ValueError(f"{where}: method 'distill' needs the field distill, got none")
        return
    found = [name for name in sizes if getattr(stage, name) is not None]
    if len(found) > 1 or (not found and stage.kv_groups is None):
        hint = " (or kv_groups alone)" if stage.method == SLIM else ""
        raise ValueError(
            f"{where}: method {stage.method!r} needs exactly one of {sizes}{hint}, "
            f"got {found or 'none'}"
        )
    if stage.group_importance and stage.kv_groups is None:
        raise ValueError(f"{where}.group_importance ranks kv_groups, of which none are cut")
