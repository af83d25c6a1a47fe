"""The fields of a cut, each with what it means, its bounds and what it applies to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from moe_jax.plan.cut import needs
from moe_jax.plan.cut.needs import METHODS, RANKS_GROUPS, RANKS_NEURONS, Needs
from moe_jax.plan.merge import MergeRouter, MergeWeights, Similarity
from moe_jax.plan.schema import Replacement
from moe_jax.scoring import AGGREGATIONS
from moe_jax.settings import setting


@dataclass(frozen=True)
class CutFields:
    """What is asked of a cut; see ``Cut``."""

    method: str = setting(
        "mone",
        "What ranks experts (mone by default; rerouted counts their tokens' new routes), merges "
        "them (m_smoe, hc_smoe, ream) or ranks their neurons: token_fisher by what the loss pays "
        "for each per token, obs by Optimal Brain Surgeon, where what stays makes up for what "
        "goes, another criterion of neurons by itself, slim by importance (SlimMoE's step; "
        "implied by the fields of neurons). angular drops layers (implied by drop_layers).",
        choices=METHODS,
        scores=True,
    )
    importance: str = setting(
        "kd_topk", "Criterion that ranks neurons.", choices=RANKS_NEURONS, needs=needs.SLIMMED,
        scores=True,
    )  # fmt: skip
    frequency: str = setting(
        "",
        "How often an expert is used: the sum of its routing weights (routing_mass, the default) "
        "or their mean over its tokens (mean_weight).",
        choices=("", "routing_mass", "mean_weight"),
        needs=needs.FREQUENCY,
        scores=True,
    )
    aggregation: str = setting(
        "",
        "How gradients of several sequences become one importance; empty: the criterion's own.",
        choices=("", *AGGREGATIONS),
        needs=needs.GRADIENTS,
        scores=True,
    )
    options: Mapping[str, Any] = setting(
        {}, "Further options of the criterion of experts or neurons, by name.", needs=needs.SCORED,
        scores=True,
    )  # fmt: skip

    keep_experts: int | None = setting(
        None, "Experts that each layer keeps (on average, with scope global).", needs=needs.EXPERTS
    )
    keep_ratio: float | None = setting(
        None,
        "Share of a layer's experts to keep, rounded to what align_experts and num_groups divide.",
        needs=needs.EXPERTS,
        bounds="(0, 1]",
    )
    expert_width: int | None = setting(
        None,
        "Neurons that each expert keeps (on average, unless neuron_scope is expert).",
        needs=needs.NEURONS,
    )
    width_ratio: float | None = setting(
        None, "Share of the neurons to keep, rounded to a multiple of round_to.",
        needs=needs.NEURONS, bounds="(0, 1]",
    )  # fmt: skip
    total_params: int | None = setting(
        None,
        "Most parameters that the model may have after the cut: the largest plan that fits is "
        "taken.",
        needs=needs.RANKED,
    )
    active_params: int | None = setting(
        None,
        "Most parameters that a token may read, embeddings counted by row.",
        needs=needs.RANKED,
    )
    total_bytes: int | None = setting(
        None, "Most bytes that the weights may take, as stored in dtype.", needs=needs.RANKED
    )
    dtype: str = setting(
        "", "Dtype that total_bytes are counted for; empty: as config.json says.", needs=needs.BYTES
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
        needs=needs.RANKED,
    )
    group_importance: str = setting(
        "",
        "Criterion that ranks key/value groups; empty: that of the neurons if it is one for "
        "groups, too, else kd_topk.",
        choices=("", *RANKS_GROUPS),
        needs=needs.KV,
        scores=True,
    )
    group_options: Mapping[str, Any] = setting(
        {}, "Further options of the criterion of key/value groups, by name.", needs=needs.KV,
        scores=True,
    )  # fmt: skip

    shared_width: int | None = setting(
        None,
        "Neurons that the shared expert of each layer keeps, ranked among its own by the criterion "
        "of the cut; alone or beside another size.",
        needs=needs.NEURONS,
        bounds=">= 1",
    )

    replacement: Replacement = setting(
        "novice",
        "What becomes of a removed expert: its mean output (novice), the mean weighted by routing "
        "(weighted_novice), nothing (zero); or it vanishes with its router row (delete), or is "
        "merged into the most similar one that stays (merge).",
        choices=get_args(Replacement),
        needs=needs.REPLACED,
    )
    merge_similarity: str = setting(
        "",
        "What stands for an expert where similar ones are looked for; empty: the method's own.",
        choices=("", *get_args(Similarity)),
        needs=needs.MERGED,
        scores=True,
    )
    merge_weights: str = setting(
        "", "Weights of merged experts; empty: the method's own.",
        choices=("", *get_args(MergeWeights)), needs=needs.MERGED, scores=True,
    )  # fmt: skip
    merge_align: bool | None = setting(
        None, "Permute neurons to those of the expert that stays before merging.",
        needs=needs.MERGED, scores=True,
    )  # fmt: skip
    merge_router: str = setting(
        "", "Router row of a merged expert: the mean by the same weights, or the kept one's.",
        choices=("", *get_args(MergeRouter)), needs=needs.MERGED, scores=True,
    )  # fmt: skip
    merge_cap: int | None = setting(
        None, "Most experts that become one.", bounds=">= 2", needs=needs.MERGED, scores=True
    )

    scope: str = setting(
        "layer",
        "Rank experts within each layer, over all layers (global: each keeps at least K; the "
        "result needs the shipped modelling file), or within num_groups equal groups of "
        "consecutive ids in each layer that keep equally many, as expert-parallel devices and "
        "group-limited routers have them (group).",
        choices=("layer", "global", "group"),
        needs=needs.EXPERTS,
    )
    num_groups: int | None = setting(
        None, "Groups of consecutive ids.", bounds=">= 1", needs=needs.ROUTER_GROUPS
    )
    min_per_group: int = setting(
        1,
        "Fewest experts that each of these groups keeps.",
        bounds=">= 1",
        needs=needs.ROUTER_GROUPS,
    )
    min_experts: int | None = setting(
        None, "Fewest experts that each layer keeps; empty: K.", needs=needs.EXPERTS
    )
    max_experts: int | None = setting(
        None, "Most experts that each layer keeps; empty: all.", needs=needs.EXPERTS
    )
    align_experts: int = setting(
        1,
        "A divisor of each layer's kept experts, such as the number of expert-parallel devices; "
        "with delete also of its router rows.",
        bounds=">= 1",
        needs=needs.EXPERTS,
    )

    mesh: Mapping[str, int] = setting(
        {},
        "Sizes of the axes expert and tensor of a mesh that the result will lie on, such as "
        "{'expert': 8, 'tensor': 2}: kept experts, and with own_widths those of each width, are "
        "multiples of the first, widths and key/value groups of the second. What that costs is "
        "told with the plan.",
        needs=needs.RANKED,
    )

    neuron_scope: str = setting(
        "expert",
        "Rank neurons within each expert; across the experts of a layer, all of which are filled "
        "up with zeros to the widest of the model unless own_widths is set; across the whole "
        "model (with own_widths); or across the model so that the experts of a layer have one "
        "width, each layer its own (layer_width; filled up likewise). Scores must compare between "
        "experts, or layers: token_fisher's do.",
        choices=("expert", "layer", "model", "layer_width"),
        needs=needs.NEURONS,
    )
    own_widths: bool = setting(
        False,
        "Store experts as wide as they are, which the shipped modelling file reads; one that "
        "keeps nothing becomes a novice.",
        needs=needs.NARROWED,
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
        needs=needs.OWN,
    )  # fmt: skip
    active_share: float = setting(
        0.0,
        "What own widths count: 0 a neuron's bytes, 1 its work per token, by how often its expert "
        "is chosen; between them, a mix.",
        bounds="[0, 1]",
        needs=needs.OWN,
        scores=True,
    )
    round_to: int = setting(
        1, "Widths are multiples of it; 128 suits TPUs and GPU kernels.", bounds=">= 1",
        needs=needs.NEURONS,
    )  # fmt: skip
    min_width: int | None = setting(
        None,
        "Fewest neurons that each expert keeps: a hedge against calibration text that lacks what "
        "an expert is for. Empty: 1, or 0 with own_widths.",
        needs=needs.NARROWED,
        bounds=">= 0",
    )
    max_width: int | None = setting(
        None, "Most neurons that each expert keeps.", needs=needs.NARROWED, bounds=">= 1"
    )
    super_floor: float | None = setting(
        None,
        "Experts whose largest output stands out over all the model's (super experts) are not "
        "removed, and keep at least this share of their neurons; 0 makes no exception. Empty: a "
        "quarter with token_fisher and rerouted, 0 with criteria as published.",
        bounds="[0, 1]",
        needs=needs.SIZED,
        scores=True,
    )
    constants: bool = setting(
        False,
        "Every expert also gains a constant, which takes over what it can of the neurons that go; "
        "the shipped modelling file reads it, and the stock class of gpt_oss.",
        needs=needs.NARROWED,
    )
    repair: bool | None = setting(
        None,
        "Neurons that stay (and with kv_groups, heads) make up for those that go, in closed form; "
        "empty: with obs only.",
        needs=needs.NEURONS,
    )
    refit: bool = setting(
        False,
        "Then bring each layer's output near to what it was, by least squares over all its "
        "down-projections, constants and the shared expert's down-projection together.",
        needs=needs.SCORED,
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
        needs=needs.IN_TURN,
        scores=True,
    )
    repair_target: str = setting(
        "original",
        "What a sequential cut's repair comes near to: the original model's residual stream "
        "behind each layer, or the layer's own output before its cut (less memory).",
        choices=("original", "own"),
        needs=needs.REPAIRED_IN_TURN,
        scores=True,
    )
