"""What a cut is: what is ranked, by what, how much stays, and what stands for the rest.

Stages of a run, the command ``plan``, ``make_plan`` and the sequential cut all take a ``Cut``. Each
field says what it applies to (``needs``), so that a value which nothing would read is refused
everywhere, with the reason.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from moe_jax.plan.merge import (
    MERGE_RECIPES,
    MergeRecipe,
    MergeRouter,
    MergeWeights,
    Similarity,
)
from moe_jax.plan.schema import Replacement
from moe_jax.scoring import (
    AGGREGATIONS,
    EXPERT_CRITERIA,
    GROUP_CRITERIA,
    MODEL_CRITERIA,
    MODEL_GROUP_CRITERIA,
    NEEDED_LOSS,
    NEURON_CRITERIA,
    criterion_options,
)
from moe_jax.settings import check_names, check_values, mapping, section, setting

SLIM, OBS, ANGULAR = "slim", "obs", "angular"
BUDGETS = ("total_params", "active_params", "total_bytes")
# How much stays, by what is ranked.
SIZES: dict[str, tuple[str, ...]] = {
    "experts": ("keep_experts", "keep_ratio", *BUDGETS),
    "neurons": ("expert_width", "width_ratio", *BUDGETS),
    "layers": ("drop_layers",),
}
_NEURON_CRITERIA = (*NEURON_CRITERIA, *MODEL_CRITERIA)
_KV_CRITERIA = tuple(dict.fromkeys((*GROUP_CRITERIA, *MODEL_GROUP_CRITERIA)))
_METHODS = tuple(
    dict.fromkeys((*EXPERT_CRITERIA, *MERGE_RECIPES, SLIM, OBS, *_NEURON_CRITERIA, ANGULAR))
)


class Needs(NamedTuple):
    """What a field applies to: in words, and whether a cut has it."""

    what: str
    holds: Callable[[Cut], bool]


_EXPERTS = Needs("a ranking of experts", lambda cut: cut.ranks == "experts")
_REPLACED = Needs(
    "a ranking of experts that are not merged anyway",
    lambda cut: cut.ranks == "experts" and cut.method not in MERGE_RECIPES,
)
_MERGED = Needs("a method that merges, or replacement 'merge'", lambda cut: cut.recipe is not None)
_NEURONS = Needs("a ranking of neurons", lambda cut: cut.ranks == "neurons")
_NARROWED = Needs(
    "a ranking of neurons, and how many stay (such as expert_width)",
    lambda cut: cut.ranks == "neurons" and cut.sized,
)
_RANKED = Needs("a ranking of experts or neurons", lambda cut: cut.ranks != "layers")
_SIZED = Needs(
    "experts or neurons to be cut, such as keep_ratio",
    lambda cut: cut.ranks != "layers" and cut.sized,
)
_SCORED = Needs(
    "experts or neurons to be cut, such as keep_ratio or shared_width",
    lambda cut: cut.ranks != "layers" and cut.scored,
)
_OWN = Needs(
    "own_widths, of experts and not of layers",
    lambda cut: cut.own_widths and cut.neuron_scope != "layer_width",
)
_KV = Needs("kv_groups", lambda cut: cut.kv_groups is not None)
_ROUTER_GROUPS = Needs("scope 'group'", lambda cut: cut.scope == "group")
_FREQUENCY = Needs(
    "a criterion with a frequency: mone or a variant of it",
    lambda cut: "frequency" in criterion_options(cut.criterion),
)
_GRADIENTS = Needs(
    "a criterion of gradients (kd_topk, kd_full, lm, fisher, or taylor_... of experts)",
    lambda cut: (
        "aggregation" in criterion_options(cut.criterion)
        or (
            cut.kv_groups is not None
            and "aggregation" in criterion_options(cut.kv_criterion, "attention")
        )
    ),
)
_SLIM = Needs("method 'slim'", lambda cut: cut.method == SLIM)
_IN_TURN = Needs(
    "method 'obs' with expert_width or width_ratio",
    lambda cut: cut.method == OBS and not (cut.expert_width is cut.width_ratio is None),
)
_REPAIRED_IN_TURN = Needs("sequential and repair", lambda cut: cut.sequential and cut.repairs)
_BYTES = Needs("total_bytes", lambda cut: cut.total_bytes is not None)


@dataclass(frozen=True)
class Cut:
    """What to remove from a model; ``from_dict`` checks what is wrong whatever the model.

    A cut ranks experts, the neurons of experts, or layers (``ranks``), and beside experts or
    neurons perhaps key/value groups. Exactly one size says how much stays.
    """

    method: str = setting(
        "mone",
        "What ranks experts (mone by default; rerouted counts their tokens' new routes), merges "
        "them (m_smoe, hc_smoe, ream) or ranks their neurons: token_fisher by what the loss pays "
        "for each per token, obs by Optimal Brain Surgeon, where what stays makes up for what "
        "goes, another criterion of neurons by itself, slim by importance (SlimMoE's step; "
        "implied by the fields of neurons). angular drops layers (implied by drop_layers).",
        choices=_METHODS,
        scores=True,
    )
    importance: str = setting(
        "kd_topk", "Criterion that ranks neurons.", choices=_NEURON_CRITERIA, needs=_SLIM,
        scores=True,
    )  # fmt: skip
    frequency: str = setting(
        "",
        "How often an expert is used: the sum of its routing weights (routing_mass, the default) "
        "or their mean over its tokens (mean_weight).",
        choices=("", "routing_mass", "mean_weight"),
        needs=_FREQUENCY,
        scores=True,
    )
    aggregation: str = setting(
        "",
        "How gradients of several sequences become one importance; empty: the criterion's own.",
        choices=("", *AGGREGATIONS),
        needs=_GRADIENTS,
        scores=True,
    )
    options: Mapping[str, Any] = setting(
        {}, "Further options of the criterion of experts or neurons, by name.", needs=_SCORED,
        scores=True,
    )  # fmt: skip

    keep_experts: int | None = setting(
        None, "Experts that each layer keeps (on average, with scope global).", needs=_EXPERTS
    )
    keep_ratio: float | None = setting(
        None,
        "Share of a layer's experts to keep, rounded to what align_experts and num_groups divide.",
        needs=_EXPERTS,
        bounds="(0, 1]",
    )
    expert_width: int | None = setting(
        None,
        "Neurons that each expert keeps (on average, unless neuron_scope is expert).",
        needs=_NEURONS,
    )
    width_ratio: float | None = setting(
        None, "Share of the neurons to keep, rounded to a multiple of round_to.", needs=_NEURONS,
        bounds="(0, 1]",
    )  # fmt: skip
    total_params: int | None = setting(
        None,
        "Most parameters that the model may have after the cut: the largest plan that fits is "
        "taken.",
        needs=_RANKED,
    )
    active_params: int | None = setting(
        None, "Most parameters that a token may read, embeddings counted by row.", needs=_RANKED
    )
    total_bytes: int | None = setting(
        None, "Most bytes that the weights may take, as stored in dtype.", needs=_RANKED
    )
    dtype: str = setting(
        "", "Dtype that total_bytes are counted for; empty: as config.json says.", needs=_BYTES
    )
    drop_layers: int | None = setting(
        None,
        "Consecutive layers to drop: those that turn the residual stream least.",
        needs=Needs("method 'angular'", lambda cut: cut.ranks == "layers"),
    )
    kv_groups: int | None = setting(
        None,
        "Key/value heads, with their query heads, that each layer keeps; alone or beside another "
        "size.",
        needs=_RANKED,
    )
    group_importance: str = setting(
        "",
        "Criterion that ranks key/value groups; empty: that of the neurons if it is one for "
        "groups, too, else kd_topk.",
        choices=("", *_KV_CRITERIA),
        needs=_KV,
        scores=True,
    )
    group_options: Mapping[str, Any] = setting(
        {}, "Further options of the criterion of key/value groups, by name.", needs=_KV,
        scores=True,
    )  # fmt: skip

    shared_width: int | None = setting(
        None,
        "Neurons that the shared expert of each layer keeps, ranked among its own by the criterion "
        "of the cut; alone or beside another size.",
        needs=_NEURONS,
        bounds=">= 1",
    )

    replacement: Replacement = setting(
        "novice",
        "What becomes of a removed expert: its mean output (novice), the mean weighted by routing "
        "(weighted_novice), nothing (zero); or it vanishes with its router row (delete), or is "
        "merged into the most similar one that stays (merge).",
        choices=get_args(Replacement),
        needs=_REPLACED,
    )
    merge_similarity: str = setting(
        "",
        "What stands for an expert where similar ones are looked for; empty: the method's own.",
        choices=("", *get_args(Similarity)),
        needs=_MERGED,
        scores=True,
    )
    merge_weights: str = setting(
        "", "Weights of merged experts; empty: the method's own.",
        choices=("", *get_args(MergeWeights)), needs=_MERGED, scores=True,
    )  # fmt: skip
    merge_align: bool | None = setting(
        None, "Permute neurons to those of the expert that stays before merging.", needs=_MERGED,
        scores=True,
    )  # fmt: skip
    merge_router: str = setting(
        "", "Router row of a merged expert: the mean by the same weights, or the kept one's.",
        choices=("", *get_args(MergeRouter)), needs=_MERGED, scores=True,
    )  # fmt: skip
    merge_cap: int | None = setting(
        None, "Most experts that become one.", bounds=">= 2", needs=_MERGED, scores=True
    )

    scope: str = setting(
        "layer",
        "Rank experts within each layer, over all layers (global: each keeps at least K; the "
        "result needs the shipped modelling file), or within num_groups equal groups of "
        "consecutive ids in each layer that keep equally many, as expert-parallel devices and "
        "group-limited routers have them (group).",
        choices=("layer", "global", "group"),
        needs=_EXPERTS,
    )
    num_groups: int | None = setting(
        None, "Groups of consecutive ids.", bounds=">= 1", needs=_ROUTER_GROUPS
    )
    min_per_group: int = setting(
        1, "Fewest experts that each of these groups keeps.", bounds=">= 1", needs=_ROUTER_GROUPS
    )
    min_experts: int | None = setting(
        None, "Fewest experts that each layer keeps; empty: K.", needs=_EXPERTS
    )
    max_experts: int | None = setting(
        None, "Most experts that each layer keeps; empty: all.", needs=_EXPERTS
    )
    align_experts: int = setting(
        1,
        "A divisor of each layer's kept experts, such as the number of expert-parallel devices; "
        "with delete also of its router rows.",
        bounds=">= 1",
        needs=_EXPERTS,
    )

    mesh: Mapping[str, int] = setting(
        {},
        "Sizes of the axes expert and tensor of a mesh that the result will lie on, such as "
        "{'expert': 8, 'tensor': 2}: kept experts, and with own_widths those of each width, are "
        "multiples of the first, widths and key/value groups of the second. What that costs is "
        "told with the plan.",
        needs=_RANKED,
    )

    neuron_scope: str = setting(
        "expert",
        "Rank neurons within each expert; across the experts of a layer, all of which are filled "
        "up with zeros to the widest of the model unless own_widths is set; across the whole "
        "model (with own_widths); or across the model so that the experts of a layer have one "
        "width, each layer its own (layer_width; filled up likewise). Scores must compare between "
        "experts, or layers: token_fisher's do.",
        choices=("expert", "layer", "model", "layer_width"),
        needs=_NEURONS,
    )
    own_widths: bool = setting(
        False,
        "Store experts as wide as they are, which the shipped modelling file reads; one that "
        "keeps nothing becomes a novice.",
        needs=_NARROWED,
    )
    rank_shared: bool = setting(
        False,
        "Rank the shared expert's neurons together with those of the routed experts, by cost per "
        "byte (or active work); each layer's keeps some, in steps of round_to, or of 1/128 of its "
        "width. Scores must compare: token_fisher's do.",
        needs=Needs("own_widths", lambda cut: cut.narrows and cut.own_widths),
    )
    max_buckets: int = setting(
        4, "Most different widths that a layer (or the model) may then have.", bounds=">= 1",
        needs=_OWN,
    )  # fmt: skip
    active_share: float = setting(
        0.0,
        "What own widths count: 0 a neuron's bytes, 1 its work per token, by how often its expert "
        "is chosen; between them, a mix.",
        bounds="[0, 1]",
        needs=_OWN,
        scores=True,
    )
    round_to: int = setting(
        1, "Widths are multiples of it; 128 suits TPUs and GPU kernels.", bounds=">= 1",
        needs=_NEURONS,
    )  # fmt: skip
    min_width: int | None = setting(
        None,
        "Fewest neurons that each expert keeps: a hedge against calibration text that lacks what "
        "an expert is for. Empty: 1, or 0 with own_widths.",
        needs=_NARROWED,
        bounds=">= 0",
    )
    max_width: int | None = setting(
        None, "Most neurons that each expert keeps.", needs=_NARROWED, bounds=">= 1"
    )
    super_floor: float | None = setting(
        None,
        "Experts whose largest output stands out over all the model's (super experts) are not "
        "removed, and keep at least this share of their neurons; 0 makes no exception. Empty: a "
        "quarter with token_fisher and rerouted, 0 with criteria as published.",
        bounds="[0, 1]",
        needs=_SIZED,
        scores=True,
    )
    constants: bool = setting(
        False,
        "Every expert also gains a constant, which takes over what it can of the neurons that go; "
        "the shipped modelling file reads it, and the stock class of gpt_oss.",
        needs=_NARROWED,
    )
    repair: bool | None = setting(
        None,
        "Neurons that stay (and with kv_groups, heads) make up for those that go, in closed form; "
        "empty: with obs only.",
        needs=_NEURONS,
    )
    refit: bool = setting(
        False,
        "Then bring each layer's output near to what it was, by least squares over all its "
        "down-projections, constants and the shared expert's down-projection together.",
        needs=_SCORED,
    )
    refit_sequences: int | None = setting(
        None,
        "Sequences of the calibration files that the refit reads, which more of them serve than "
        "the ranking; empty: calibration.num_sequences.",
        bounds=">= 1",
        needs=Needs("refit", lambda cut: cut.refit),
    )
    sequential: bool = setting(
        False,
        "Measure, cut and repair one layer after the other, each on the output of the layers that "
        "are already cut: one layer's second moments and the text's residual stream in memory.",
        needs=_IN_TURN,
        scores=True,
    )
    repair_target: str = setting(
        "original",
        "What a sequential cut's repair comes near to: the original model's residual stream "
        "behind each layer, or the layer's own output before its cut (less memory).",
        choices=("original", "own"),
        needs=_REPAIRED_IN_TURN,
        scores=True,
    )

    @property
    def floor(self) -> float:
        """``super_floor``, or what is meant by its absence."""
        if self.super_floor is not None:
            return self.super_floor
        return 0.25 if self.criterion in ("token_fisher", "rerouted") else 0.0

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "") -> Cut:
        """Builds and checks a cut; a method that is not given follows from the other fields.

        Raises:
            ValueError: an unknown field (with the nearest known one), a value of the wrong kind or
                out of bounds, or one that nothing would read; named with its place.
        """
        values = dict(raw)
        for name in ("options", "group_options"):
            given = mapping(values.get(name), f"{where}.{name}" if where else name)
            values[name] = {key: one for key, one in given.items() if one not in ("", None)}
        if not values.get("method"):
            values["method"] = _implied_method(values)
        cut = section(cls, values, where)
        prefix = f"{where}." if where else ""
        cut.check(prefix)
        known = criterion_options(cut.criterion) if cut.ranks != "layers" else {}
        check_names(cut.options, list(known), f"{prefix}options.")
        if cut.kv_groups is not None:
            known = criterion_options(cut.kv_criterion, "attention")
            check_names(cut.group_options, list(known), f"{prefix}group_options.")
        return cut

    def check(self, prefix: str = "", subject: str = "") -> None:
        """Raises ValueError for fields that do not go together.

        Args:
            prefix: of the fields' names in messages.
            subject: what ranks, for messages; empty: the method.
        """
        subject = subject or f"method {self.method!r}, which ranks {self.ranks}"
        self._check_size(prefix, subject)
        for name in self.given():
            needs = Cut.__dataclass_fields__[name].metadata.get("needs")
            if needs and not needs.holds(self):
                value = getattr(self, name)
                raise ValueError(f"{prefix}{name} = {value!r} needs {needs.what}, got {subject}")
        check_values(self, prefix)
        for wrong, message in self._contradictions():
            if wrong:
                raise ValueError(f"{prefix}{message}")

    def _check_size(self, prefix: str, subject: str) -> None:
        names = dict.fromkeys(name for sizes in SIZES.values() for name in sizes)
        given = [name for name in names if getattr(self, name) is not None]
        fitting = SIZES[self.ranks]
        others = {"experts": ("kv_groups",), "neurons": ("kv_groups", "shared_width"), "layers": ()}
        beside = others[self.ranks]
        alone = not given and any(getattr(self, name) is not None for name in beside)
        if not alone and (len(given) != 1 or given[0] not in fitting):
            hint = f" (or {' or '.join(beside)} alone)" if beside else ""
            raise ValueError(
                f"{prefix.removesuffix('.') + ': ' if prefix else ''}exactly one of {fitting} must "
                f"be given with {subject}{hint}, got {given or 'none'}"
            )

    def _contradictions(self) -> list[tuple[bool, str]]:
        recipe, groups = self.recipe, self.kv_groups or 0
        return [
            (
                bool(set(self.mesh) - set(_MESH_AXES))
                or not all(isinstance(n, int) and n >= 1 for n in self.mesh.values()),
                f"mesh must have positive sizes of axes among {_MESH_AXES}, got {dict(self.mesh)}",
            ),
            (
                groups % self._divisor("tensor") > 0,
                f"kv_groups must be a multiple of mesh axis 'tensor' = {self._divisor('tensor')}, "
                f"got {groups}",
            ),
            (
                self.own_widths and self.neuron_scope == "expert",
                "own_widths needs neuron_scope 'layer', 'model' or 'layer_width', got 'expert'",
            ),
            (
                self.neuron_scope == "model" and not self.own_widths,
                "neuron_scope 'model' needs own_widths",
            ),
            (
                (self.scope == "group") != (self.num_groups is not None),
                f"num_groups goes with scope 'group' and no other, got {self.num_groups} and "
                f"{self.scope!r}",
            ),
            (
                recipe is not None and recipe.grouping == "clusters" and self.scope == "group",
                "scope must be 'layer' or 'global', got 'group': clusters decide by similarity "
                "which experts stay, and know no groups of ids",
            ),
            (
                self.rank_shared and self.shared_width is not None,
                "rank_shared leaves no shared_width to be asked for, got both",
            ),
            (
                self.sequential and self.refit,
                "a sequential cut repairs each layer in its turn; it takes no refit",
            ),
            (
                self.sequential and self.neuron_scope in ("model", "layer_width"),
                f"neuron_scope {self.neuron_scope!r} ranks across layers, of which a sequential "
                "cut has not measured the later ones; take 'layer'",
            ),
            (
                self.sequential and self.kv_groups is not None,
                "kv_groups are ranked by gradients through the whole model, which a sequential cut "
                "has not; cut them in a stage of their own",
            ),
        ]

    def given(self) -> dict[str, Any]:
        """The fields that are not at their defaults."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != _DEFAULT[field.name]
        }

    def _divisor(self, axis: str) -> int:
        size = self.mesh.get(axis, 1)
        return size if isinstance(size, int) and size > 0 else 1

    @property
    def expert_step(self) -> int:
        """What numbers of experts are multiples of, by ``align_experts`` and ``mesh``."""
        return math.lcm(self.align_experts, self._divisor("expert"))

    @property
    def width_step(self) -> int:
        """What widths are multiples of, by ``round_to`` and ``mesh``."""
        return math.lcm(self.round_to, self._divisor("tensor"))

    @property
    def ranks(self) -> str:
        """What is ranked: ``experts``, ``neurons`` or ``layers``."""
        if self.method == ANGULAR:
            return "layers"
        return "neurons" if self.method in (SLIM, *_NEURON_CRITERIA) else "experts"

    @property
    def sized(self) -> bool:
        """Whether experts, their neurons or layers are cut."""
        return any(getattr(self, name) is not None for name in SIZES[self.ranks])

    @property
    def scored(self) -> bool:
        """Whether anything but key/value groups is cut."""
        return self.sized or self.narrows_shared

    @property
    def narrows_shared(self) -> bool:
        """Whether shared experts lose neurons."""
        return self.shared_width is not None or self.rank_shared

    @property
    def narrows(self) -> bool:
        """Whether experts lose neurons."""
        return self.ranks == "neurons" and self.sized

    @property
    def repairs(self) -> bool:
        """Whether neurons and heads that stay make up for those that go."""
        wanted = self.method == OBS if self.repair is None else self.repair
        return self.ranks == "neurons" and wanted

    @property
    def recipe(self) -> MergeRecipe | None:
        """How experts are merged; None if they are not."""
        recipe = MERGE_RECIPES.get(self.method)
        if recipe is None:
            if self.replacement != "merge" or self.ranks != "experts":
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
        if self.method in MERGE_RECIPES:
            return MERGE_RECIPES[self.method].criterion
        return self.importance if self.method == SLIM else self.method

    @property
    def kv_criterion(self) -> str:
        """What ranks key/value groups."""
        if self.group_importance:
            return self.group_importance
        if self.criterion == "random_neurons":
            return "random_groups"
        return self.criterion if self.criterion in _KV_CRITERIA else "kd_topk"

    @property
    def score_options(self) -> dict[str, Any]:
        """Options of ``scoring.score`` for experts and neurons."""
        known = criterion_options(self.criterion)
        # The cost of a removal is another one where a constant takes over a part of it.
        named = {
            "frequency": self.frequency,
            "aggregation": self.aggregation,
            "constant": self.constants,
        }
        return {
            **{name: value for name, value in named.items() if value and name in known},
            **self.options,
        }

    @property
    def kv_score_options(self) -> dict[str, Any]:
        """Options of ``scoring.score`` for key/value groups."""
        known = criterion_options(self.kv_criterion, "attention")
        own = {"aggregation": self.aggregation} if self.aggregation else {}
        return {name: own[name] for name in own if name in known} | dict(self.group_options)

    @property
    def losses(self) -> tuple[str, ...]:
        """Losses that calibration must differentiate."""
        criteria = [self.criterion] if self.scored and self.ranks != "layers" else []
        criteria += [self.kv_criterion] if self.kv_groups is not None else []
        return tuple(sorted({NEEDED_LOSS[name] for name in criteria if name in NEEDED_LOSS}))

    @property
    def needs_second_moments(self) -> bool:
        """Whether calibration must measure them before the cut; a sequential one does so itself."""
        return self.narrows and self._uses_moments and not self.sequential

    @property
    def needs_shared_moments(self) -> bool:
        """Whether those of shared experts must be measured, by a sequential cut itself."""
        return self.narrows_shared and self._uses_moments

    @property
    def _uses_moments(self) -> bool:
        return self.repairs or self.criterion in MODEL_CRITERIA

    @property
    def needs_attention_moments(self) -> bool:
        """Whether calibration must measure the second moments of the mixed heads."""
        uses = self.repairs or self.kv_criterion in MODEL_GROUP_CRITERIA
        return self.kv_groups is not None and uses


_DEFAULT = vars(Cut())
_MESH_AXES = ("data", "fsdp", "expert", "tensor")  # a cut changes no size of the first two


def _implied_method(values: Mapping[str, Any]) -> str:
    """From the fields that are given: which of them are about neurons, or layers."""
    given = {name for name, value in values.items() if value not in (None, {}, "")}
    fields = {name: Cut.__dataclass_fields__[name] for name in given & set(_DEFAULT)}
    needed = [field.metadata.get("needs") for field in fields.values()]
    if "drop_layers" in given:
        return ANGULAR
    if any(needs in (_EXPERTS, _ROUTER_GROUPS) for needs in needed):
        return "mone"
    neurons = (_SLIM, _NEURONS, _NARROWED, _OWN, _KV)
    return SLIM if "kv_groups" in given or any(needs in neurons for needs in needed) else "mone"
