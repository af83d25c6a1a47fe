"""What a family of models is: one file in ``hf.families`` holds one of these, made of parts.

A family says how ``config.json`` spells the architecture (names, aliases and what the stock class
assumes where a key is missing) and under which names, and in which form, every parameter lies on
disk. Reading, writing, key checks, shape checks and the modelling file that exports carry are
driven by it. The modelling and configuration files of ``transformers`` 5 are its definition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_jax.hf.layer_patterns import NO_WINDOW, NONE_DENSE, DensePattern, WindowPattern
from moe_jax.hf.layouts import TensorTable
from moe_jax.kinds import DefaultRope, GroupedQueryAttention, SoftmaxRouter

# Suffix of the model_type under which MoNE's authors publish models with novices.
COMPRESSED_SUFFIX = "_compressed"


@dataclass(frozen=True)
class Key:
    """One fact in ``config.json``.

    Attributes:
        names: spellings; where two are present they must agree. A new file gets the first.
        kind: type of the value.
        default: what the stock class takes where the key is absent; a function of the facts
            that stand before this one in the family.
        null: what it makes of an explicit ``null``; None: that is an error.
        optional: whether ``null`` is a value of its own.
        write_all: write every spelling, since readers differ in the one they know.
        per: the file counts in units of this fact, which stands before.
        values: what the file's values stand for, where they are not the fact itself.
        implied: the value in a new file of a key that no fact of a model is, from its facts.
    """

    names: tuple[str, ...]
    kind: type
    default: Any | Callable[[dict[str, Any]], Any]
    null: Callable[[dict[str, Any]], Any] | None = None
    optional: bool = False
    write_all: bool = False
    per: str | None = None
    values: Mapping[Any, Any] | None = None
    implied: Callable[[dict[str, Any]], Any] | None = None

    def stored(self, fact: Any, facts: Mapping[str, Any]) -> Any:
        """What the file says for a fact; None if it cannot say it in its units."""
        if self.values is not None:
            return next(key for key, value in self.values.items() if value == fact)
        if self.per is None:
            return fact
        count, rest = divmod(fact, facts[self.per])
        return None if rest else count


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        model_type: as in ``config.json``; ``{model_type}_compressed`` is accepted as well.
        stem: how its classes in transformers begin.
        keys: fact -> Key, in the order in which defaults may refer to each other. A fact is a
            field of ModelConfig or of a part of it, under its own name; the width of dense layers
            and of a shared expert are ``dense_width`` and ``shared_width``.
        layouts: layout name -> table. The first is that of stock classes; ``per_expert``, with a
            tensor per expert and projection, that of the modelling file which is shipped.
        fixed: facts that hold for every model of the family, without a key.
        switches: keys with the only values that are supported, where they are present.
        attention, router: kinds.
        router_slots: experts per token that the router is able to pick, None for any.
        ropes: kinds that its class reads, see ``hf.rope_keys``.
        default_theta: rotary base where the file gives none.
        default_scaling: what the file would say of ``rope_parameters`` where it says nothing.
        dense_layers, windows: how the file tells layers apart.
        rotary_share: share of a head that is turned where the file gives none; None: always all.
        aliases: other ``model_type`` values of the same architecture.
        further_layers: how names of tensors begin that belong to layers after the last one, for
            multi-token prediction, where the file announces these; ``{layer}`` is the index of
            each. They are no part of the model.
        norms_of_model_width: whether its norms over all heads are as wide as the model, so that
            they cannot be of heads that do not add up to it.
        check: of the facts together; raises ValueError.
    """

    model_type: str
    stem: str
    keys: Mapping[str, Key]
    layouts: Mapping[str, TensorTable]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    switches: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    attention: type = GroupedQueryAttention
    router: type = SoftmaxRouter
    router_slots: int | None = None
    ropes: tuple[str, ...] = (DefaultRope.kind,)
    default_theta: float = 10000.0
    default_scaling: Mapping[str, Any] = field(default_factory=dict)
    dense_layers: DensePattern = NONE_DENSE
    windows: WindowPattern = NO_WINDOW
    rotary_share: float | None = None
    aliases: tuple[str, ...] = ()
    further_layers: tuple[str, ...] = ()
    norms_of_model_width: bool = False
    check: Callable[[Mapping[str, Any]], None] | None = None

    @property
    def own_layout(self) -> str:
        """Of models that need the modelling file which is shipped."""
        return "per_expert" if "per_expert" in self.layouts else self.default_layout

    @property
    def holds_constants(self) -> bool:
        """Whether its class has experts that add a constant: novices are such without weights."""
        return bool(self.fixed.get("expert_bias"))

    @property
    def default_layout(self) -> str:
        return next(iter(self.layouts))


def _heads(facts: dict[str, Any]) -> int:
    return facts["num_heads"]


def _head_dim(facts: dict[str, Any]) -> int:
    if facts["num_heads"] < 1:
        raise ValueError(f"num_attention_heads must be positive, got {facts['num_heads']}")
    return facts["width"] // facts["num_heads"]


def decoder_keys(
    *,
    vocab_size: int,
    width: int,
    num_layers: int,
    heads: int | tuple[int, int],
    positions: int,
    norm_eps: float,
) -> dict[str, Key]:
    """Keys that all families have under one name, with a class's defaults.

    Args:
        heads: query and key/value heads, or one number for both.
        positions: of the context.
    """
    num_heads, kv_heads = heads if isinstance(heads, tuple) else (heads, _heads)
    return {
        "vocab_size": Key(("vocab_size",), int, vocab_size),
        "width": Key(("hidden_size",), int, width),
        "num_layers": Key(("num_hidden_layers",), int, num_layers),
        "num_heads": Key(("num_attention_heads",), int, num_heads),
        "num_kv_heads": Key(("num_key_value_heads",), int, kv_heads, null=_heads),
        "head_dim": Key(("head_dim",), int, _head_dim, null=_head_dim),
        "max_positions": Key(("max_position_embeddings",), int, positions),
        "norm_eps": Key(("rms_norm_eps",), float, norm_eps),
        "init_std": Key(("initializer_range",), float, 0.02),
        "tied_embeddings": Key(("tie_word_embeddings",), bool, False),
    }


ATTENTION_BIAS = {
    "qkv_bias": Key(("attention_bias",), bool, False),
    "out_bias": Key(("attention_bias",), bool, False),
}


RENORMALIZE = {"renormalize": Key(("norm_topk_prob",), bool, False)}


def expert_keys(
    count: int, chosen: int, width: int, width_name: str, *count_names: str, write_all: bool = False
) -> dict[str, Key]:
    """Keys of routed experts, with a class's defaults: E, K and F."""
    return {
        "num_experts": Key(count_names, int, count, write_all=write_all),
        "experts_per_token": Key(("num_experts_per_tok",), int, chosen),
        "expert_width": Key((width_name,), int, width),
    }


# How many layers the file announces behind the last one, and where DeepSeek's line keeps them; see
# ``Family.further_layers``.
FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")
AS_LAYERS = ("model.layers.{layer}.",)

LATENT_ATTENTION = {
    "content_dim": Key(("qk_nope_head_dim",), int, 128),
    "rope_dim": Key(("qk_rope_head_dim",), int, 64),
    "value_dim": Key(("v_head_dim",), int, 128),
    "latent_rank": Key(("kv_lora_rank",), int, 512),
    "query_rank": Key(("q_lora_rank",), int, 1536, optional=True),
    **ATTENTION_BIAS,
}


def sigmoid_router(scale: float, groups: int = 1, chosen_groups: int = 1) -> dict[str, Key]:
    """Keys of DeepSeek-V3's router, with a class's defaults."""
    return {
        "renormalize": Key(("norm_topk_prob",), bool, True),
        "scale": Key(("routed_scaling_factor",), float, scale),
        "groups": Key(("n_group",), int, groups),
        "chosen_groups": Key(("topk_group",), int, chosen_groups),
    }


def counted_shared_experts(default: int, name: str = "n_shared_experts") -> dict[str, Key]:
    """The key of shared experts that the file counts, each as wide as a routed one."""
    return {"shared_width": Key((name,), int, default, null=lambda facts: 0, per="expert_width")}


def sliding_window(default: int | None) -> dict[str, Key]:
    """The key of a window that all layers, or some, have."""
    return {"sliding_window": Key(("sliding_window",), int, default, optional=True)}
