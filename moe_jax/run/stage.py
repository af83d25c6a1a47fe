"""One stage of a run: a cut, a training, or a cut and then a training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_jax.config import ModelConfig
from moe_jax.distill import TrainSettings
from moe_jax.plan import (
    MERGE_RECIPES,
    MergeRecipe,
    Replacement,
    check_capacity,
    check_drop_layers,
    kept_count,
    kept_groups,
    kept_width,
)
from moe_jax.run.stage_checks import (
    ANGULAR,
    DISTILL,
    GRADIENTS,
    NEURON_FIELDS,
    OBS,
    SLIM,
    check_stage,
)
from moe_jax.scoring import (
    GROUP_CRITERIA,
    MODEL_CRITERIA,
    MODEL_GROUP_CRITERIA,
    NEEDED_LOSS,
)
from moe_jax.settings import mapping, section


@dataclass(frozen=True)
class StageConfig:
    """What happens to the model in one stage.

    Attributes:
        method: ``mone`` or another expert criterion; ``m_smoe``, ``hc_smoe`` or ``ream``, which
            merge experts (see ``plan.recipes``); ``slim`` (SlimMoE's one-shot step); ``obs``
            (``slim`` with the importance ``obs`` and ``repair``); ``angular``, which drops layers;
            ``distill`` (no cut, training only). Left out, it follows from the other fields.
        keep_experts, keep_ratio: for expert criteria and merging, one of them.
        scope: ``layer`` or ``global`` ranking of experts.
        replacement: of removed experts: ``novice``, ``weighted_novice``, ``zero``, ``delete`` or
            ``merge``, which by default goes on as ``m_smoe`` does.
        frequency: of ``mone``: ``routing_mass`` or ``mean_weight``.
        expert_width, width_ratio: for ``slim``, one of them (or none, if ``kv_groups`` is given).
        round_to: widths become multiples of it.
        neuron_scope: rank neurons within each ``expert``, or across the experts of a ``layer`` or,
            with ``own_widths``, of the whole ``model``.
        own_widths: store experts as wide as they are then, instead of padding all to the widest;
            those that keep nothing become novices.
        min_width: neurons that each expert keeps at least then: a hedge against calibration text
            that lacks what an expert is for; None for 0.
        max_buckets: different widths that a layer's (or the model's) experts then may have.
        active_share: what ``own_widths`` count: 0 a neuron's bytes, 1 its work per token, by how
            often its expert is chosen; between them, a mix.
        constants: every expert also gains a constant, which takes over what it can of the neurons
            that go. Like ``own_widths``, it needs the shipped modelling file to load.
        importance: the neuron criterion of ``slim``.
        repair: whether the neurons, and with ``kv_groups`` the heads, that stay make up for those
            that go, in closed form (see the package ``repair``); None: with ``obs`` only.
        sequential: for ``obs``: measure, cut and repair one layer after the other, each on the
            output of the layers that are already cut (see ``run.sequential``); one layer's second
            moments live at a time.
        repair_target: of a sequential stage: the ``original`` model's stream behind each layer, or
            the layer's ``own`` output on what the layers before it now make of the text.
        aggregation: how gradients of several sequences become one importance; empty takes the
            criterion's own.
        kv_groups: key/value heads (with their query heads) that each layer keeps.
        group_importance: the criterion that ranks them; empty takes ``obs`` with ``obs``, else
            ``importance`` if it is one for groups too, else ``kd_topk``.
        merge_similarity, merge_weights, merge_align, merge_router, merge_cap: other settings than
            the method's own where experts are merged, see ``plan.MergeRecipe``.
        drop_layers: for ``angular``, how many.
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
    own_widths: bool = False
    min_width: int | None = None
    max_buckets: int = 4
    active_share: float = 0.0
    constants: bool = False
    importance: str = "kd_topk"
    repair: bool | None = None
    sequential: bool = False
    repair_target: str = "original"
    aggregation: str = ""
    kv_groups: int | None = None
    group_importance: str = ""
    merge_similarity: str = ""
    merge_weights: str = ""
    merge_align: bool | None = None
    merge_router: str = ""
    merge_cap: int | None = None
    drop_layers: int | None = None
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
        default = vars(cls())
        given = {name for name, value in vars(stage).items() if value != default[name]}
        check_stage(where, stage, given - {"distill"})
        return stage

    @property
    def cuts(self) -> bool:
        """Whether the stage removes anything."""
        return bool(self.plan) or self.method != DISTILL

    @property
    def ranks_neurons(self) -> bool:
        """Whether the method is one that makes experts narrower."""
        return self.method in (SLIM, OBS)

    @property
    def repairs(self) -> bool:
        """Whether neurons and heads that stay make up for those that go."""
        return self.ranks_neurons and (self.method == OBS if self.repair is None else self.repair)

    @property
    def needs_second_moments(self) -> bool:
        """Whether calibration must measure them before the cut; a sequential one does so itself."""
        uses = self.repairs or self.criterion in MODEL_CRITERIA
        return not self.plan and not self.sequential and self.slims_experts and uses

    @property
    def needs_attention_moments(self) -> bool:
        """Whether calibration must measure the second moments of the mixed heads."""
        uses = self.repairs or self.group_criterion in MODEL_GROUP_CRITERIA
        return not self.plan and self.kv_groups is not None and uses

    @property
    def slims_experts(self) -> bool:
        return self.expert_width is not None or self.width_ratio is not None

    @property
    def recipe(self) -> MergeRecipe | None:
        """How experts are merged; None if they are not."""
        recipe = MERGE_RECIPES.get(self.method)
        if recipe is None:
            if self.replacement != "merge":
                return None
            recipe = MergeRecipe(self.method)
        own = {
            "similarity": self.merge_similarity or None,
            "weights": self.merge_weights or None,
            "align": self.merge_align,
            "router": self.merge_router or None,
            "cap": self.merge_cap,
        }
        changes: dict[str, Any] = {name: new for name, new in own.items() if new is not None}
        return dataclasses.replace(recipe, **changes)

    @property
    def criterion(self) -> str:
        """What ranks experts, or their neurons."""
        if self.recipe is not None:
            return self.recipe.criterion
        return self.importance if self.method == SLIM else self.method

    @property
    def group_criterion(self) -> str:
        """What ranks key/value groups."""
        if self.group_importance:
            return self.group_importance
        if self.importance == "random_neurons":
            return "random_groups"
        known = GROUP_CRITERIA.keys() | MODEL_GROUP_CRITERIA.keys()
        return self.criterion if self.criterion in known else "kd_topk"

    @property
    def score_options(self) -> dict[str, Any]:
        """Options of ``scoring.score`` for experts and neurons."""
        if self.method == "mone":
            return {"frequency": self.frequency}
        if self.method == SLIM and self.aggregation and self.importance in GRADIENTS:
            return {"aggregation": self.aggregation}
        if self.method == OBS and self.constants:
            return {"constant": True}
        return {}

    @property
    def neuron_options(self) -> dict[str, Any]:
        """How many neurons experts keep and what those that stay make up for, for ``make_plan``."""
        return {
            "expert_width": self.expert_width,
            "width_ratio": self.width_ratio,
            "round_to": self.round_to,
            "neuron_scope": self.neuron_scope,
            "own_widths": self.own_widths,
            "min_width": self.min_width,
            "max_buckets": self.max_buckets,
            "constants": self.constants,
            "repair": self.repairs,
        }

    @property
    def group_score_options(self) -> dict[str, Any]:
        """Options of ``scoring.score`` for key/value groups."""
        if self.aggregation and self.group_criterion in GRADIENTS:
            return {"aggregation": self.aggregation}
        return {}

    @property
    def losses(self) -> tuple[str, ...]:
        """Losses that calibration must differentiate for this stage."""
        if self.plan or not self.cuts:
            return ()
        criteria = [self.criterion] if not self.ranks_neurons or self.slims_experts else []
        criteria += [self.group_criterion] if self.kv_groups is not None else []
        return tuple(sorted({NEEDED_LOSS[name] for name in criteria if name in NEEDED_LOSS}))

    def after_cut(self, model: ModelConfig) -> ModelConfig:
        """What the cut makes of ``model``; which experts or layers go is not known yet.

        A global ranking is taken as one by layer, experts ranked across a layer or the model, or
        of which some go that had their own widths, as equally wide, and dropped layers as the last
        ones.

        Raises:
            ValueError: the model cannot be cut so.
        """
        if self.drop_layers is not None:
            check_drop_layers(model, self.drop_layers)
            return dataclasses.replace(model, layers=model.layers[: -self.drop_layers])
        for layer in model.moe_layers if not self.ranks_neurons or self.slims_experts else ():
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
        if self.ranks_neurons:
            width = kept_width(moe, layer, self.expert_width, self.width_ratio, self.round_to)
            bias = moe.expert_bias or self.constants
            return model.replace_moe(layer, expert_width=width, expert_widths=(), expert_bias=bias)
        keep = kept_count(moe, layer, self.keep_experts, self.keep_ratio)
        if self.recipe is not None and self.recipe.grouping != "clusters":
            check_capacity(keep, len(moe.expert_ids), self.recipe.cap)
        if self.recipe is not None or self.replacement == "delete":
            rows = keep + len(moe.novice_ids)
        else:
            rows = moe.num_experts
        return model.replace_moe(
            layer, num_experts=rows, novice_ids=tuple(range(keep, rows)), expert_widths=()
        )


def _train_settings(raw: Any, where: str, seed: int) -> TrainSettings:
    values = {"seed": seed, **mapping(raw, where)}
    if "steps" not in values:
        raise ValueError(f"{where}.steps must be given")
    if type(values["steps"]) is not int:
        raise ValueError(f"{where}.steps must be int, got {values['steps']!r}")
    # Schedules of short runs: a default warm-up longer than the run is no one's wish.
    values.setdefault("warmup_steps", min(TrainSettings.warmup_steps, values["steps"] // 10))
    try:
        return section(TrainSettings, values, where)
    except (TypeError, ValueError) as error:
        text = str(error)
        raise ValueError(text if where in text else f"{where}: {text}") from error


def _implied_method(values: Mapping[str, Any]) -> str:
    given = {name for name, value in values.items() if value is not None}
    if given & set(NEURON_FIELDS):
        return SLIM
    if "drop_layers" in given:
        return ANGULAR
    return DISTILL if given == {"distill"} else "mone"
