"""A cut: its fields checked against each other, and what follows from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from moe_jax.plan.cut import needs
from moe_jax.plan.cut.fields import CutFields
from moe_jax.plan.cut.needs import ANGULAR, OBS, RANKS_GROUPS, RANKS_NEURONS, SIZES, SLIM
from moe_jax.plan.merge import MERGE_RECIPES, MergeRecipe
from moe_jax.processes import MESH_AXES
from moe_jax.scoring import (
    MODEL_CRITERIA,
    MODEL_GROUP_CRITERIA,
    NEEDED_LOSS,
    criterion_options,
)
from moe_jax.settings import check_names, check_values, mapping, section


class Cut(CutFields):
    """What to remove from a model; ``from_dict`` checks what is wrong whatever the model.

    A cut ranks experts, the neurons of experts, or layers (``ranks``), and beside experts or
    neurons perhaps key/value groups. Exactly one size says how much stays.
    """

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
            need = Cut.__dataclass_fields__[name].metadata.get("needs")
            if need and not need.holds(self):
                value = getattr(self, name)
                raise ValueError(f"{prefix}{name} = {value!r} needs {need.what}, got {subject}")
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
                bool(set(self.mesh) - set(MESH_AXES))
                or not all(isinstance(n, int) and n >= 1 for n in self.mesh.values()),
                f"mesh must have positive sizes of axes among {MESH_AXES}, got {dict(self.mesh)}",
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
        return "neurons" if self.method in (SLIM, *RANKS_NEURONS) else "experts"

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
        return self.criterion if self.criterion in RANKS_GROUPS else "kd_topk"

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


def _implied_method(values: Mapping[str, Any]) -> str:
    """From the fields that are given: which of them are about neurons, or layers."""
    given = {name for name, value in values.items() if value not in (None, {}, "")}
    fields = {name: Cut.__dataclass_fields__[name] for name in given & set(_DEFAULT)}
    needed = [field.metadata.get("needs") for field in fields.values()]
    if "drop_layers" in given:
        return ANGULAR
    if any(need in (needs.EXPERTS, needs.ROUTER_GROUPS) for need in needed):
        return "mone"
    neurons = (needs.SLIMMED, needs.NEURONS, needs.NARROWED, needs.OWN, needs.KV)
    return SLIM if "kv_groups" in given or any(need in neurons for need in needed) else "mone"
