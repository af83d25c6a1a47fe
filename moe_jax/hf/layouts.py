"""Where parameters lie on disk: tensor names, and the form of a tensor apart from its values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Form:
    """How a leaf, or one expert's part of it, lies in a tensor.

    Attributes:
        inputs: which axes of the leaf are the input of a matrix that is stored transposed, as
            ``[out, in]``, the way torch keeps linear layers: its ``first``, or all but its
            ``last``. None: nothing is transposed.
        rank: axes of a tensor that is not transposed: the leaf's are merged into the last, those
            before it have size 1. None: the leaf's own axes.
        stacked: the tensor holds all experts of a layer, along its first axis.
        part, parts: which of how many pieces of equal size, along the output, the leaf is.
        interleaved: whether the pieces of a tensor that is not transposed take turns there.
    """

    inputs: Literal["first", "but_last"] | None = None
    rank: int | None = None
    stacked: bool = False
    part: int = 0
    parts: int = 1
    interleaved: bool = False

    def input_axes(self, shape: tuple[int, ...]) -> int:
        """How many of the first axes of a leaf's part of this shape are a matrix's input."""
        return len(shape) - 1 if self.inputs == "but_last" else 1

    def matrix(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """(in, out) of a leaf's part of this shape, if it is stored transposed."""
        if self.inputs is None:
            return None
        axes = self.input_axes(shape)
        return math.prod(shape[:axes]), math.prod(shape[axes:])

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the tensor that holds a leaf's part of this shape, without the axis of experts."""
        matrix = self.matrix(shape)
        if matrix is not None:
            return self.parts * matrix[1], matrix[0]
        if self.rank is not None:
            return (*(1,) * (self.rank - 1), math.prod(shape))
        return (*shape[:-1], self.parts * shape[-1]) if self.interleaved else shape

    def region(self, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """Of that tensor, what belongs to the leaf."""
        matrix = self.matrix(shape)
        if self.interleaved:
            return (..., slice(self.part, None, self.parts))
        if matrix is None or self.parts == 1:
            return ()
        return (slice(self.part * matrix[1], (self.part + 1) * matrix[1]),)


SAME = Form()
FLAT = Form(rank=1)
ROW = Form(rank=2)
LINEAR = Form("first")
LINEAR_FROM_HEADS = Form("but_last")
STACKED = Form("first", stacked=True)
UPPER_ROWS = Form("first", part=0, parts=2)
LOWER_ROWS = Form("first", part=1, parts=2)
FIRST_HALF = Form("first", stacked=True, part=0, parts=2)
SECOND_HALF = Form("first", stacked=True, part=1, parts=2)
STACKED_SAME = Form(stacked=True)
EVEN = Form(stacked=True, part=0, parts=2, interleaved=True)
ODD = Form(stacked=True, part=1, parts=2, interleaved=True)


def copy_transposed(source: np.ndarray, target: np.ndarray, strip: int = 64) -> None:
    """``target[...] = source.T``, in strips of rows that stay in cache: six times faster."""
    for i in range(0, source.shape[0], strip):
        target[:, i : i + strip] = source[i : i + strip].T


class Stored(NamedTuple):
    """A leaf's tensors: a name with ``{layer}``, ``{expert}`` and ``{novice}``, and their form."""

    name: str
    form: Form = SAME


# Leaf path -> its tensors; where experts come in buckets of equal width, a path is given without
# the bucket's index.
TensorTable = Mapping[str, Stored]


def in_layer(table: Mapping[str, tuple[str, Form]]) -> dict[str, Stored]:
    """Tensors of every layer, from paths and names within one."""
    return {
        f"layers.{{layer}}.{leaf}": Stored(f"model.layers.{{layer}}.{name}", form)
        for leaf, (name, form) in table.items()
    }


def linear_parts(ours: str, theirs: Mapping[str, str]) -> dict[str, tuple[str, Form]]:
    """Bias-free projections ``ours.NAME``, stored as linear layers."""
    return {f"{ours}.{name}": (f"{stored}.weight", LINEAR) for name, stored in theirs.items()}


GATED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

# The decoder of the Llama line, experts aside. A model has tensors for the leaves that it has.
DECODER: TensorTable = {
    "embed.embedding": Stored("model.embed_tokens.weight"),
    "final_norm.scale": Stored("model.norm.weight"),
    "final_norm.bias": Stored("model.norm.bias"),
    "lm_head.kernel": Stored("lm_head.weight", LINEAR),
    "lm_head.bias": Stored("lm_head.bias"),
    **in_layer(
        {
            "attention_norm.scale": ("input_layernorm.weight", SAME),
            "attention_norm.bias": ("input_layernorm.bias", SAME),
            "mlp_norm.scale": ("post_attention_layernorm.weight", SAME),
            "mlp_norm.bias": ("post_attention_layernorm.bias", SAME),
            "attention.query.kernel": ("self_attn.q_proj.weight", LINEAR),
            "attention.query.bias": ("self_attn.q_proj.bias", FLAT),
            "attention.key.kernel": ("self_attn.k_proj.weight", LINEAR),
            "attention.key.bias": ("self_attn.k_proj.bias", FLAT),
            "attention.value.kernel": ("self_attn.v_proj.weight", LINEAR),
            "attention.value.bias": ("self_attn.v_proj.bias", FLAT),
            "attention.out.kernel": ("self_attn.o_proj.weight", LINEAR_FROM_HEADS),
            "attention.out.bias": ("self_attn.o_proj.bias", SAME),
            "attention.sinks": ("self_attn.sinks", SAME),
            "attention.query_latent.kernel": ("self_attn.q_a_proj.weight", LINEAR),
            "attention.query_latent.bias": ("self_attn.q_a_proj.bias", SAME),
            "attention.query_latent_norm.scale": ("self_attn.q_a_layernorm.weight", SAME),
            "attention.query_up.kernel": ("self_attn.q_b_proj.weight", LINEAR),
            "attention.latent.kernel": ("self_attn.kv_a_proj_with_mqa.weight", LINEAR),
            "attention.latent.bias": ("self_attn.kv_a_proj_with_mqa.bias", SAME),
            "attention.latent_norm.scale": ("self_attn.kv_a_layernorm.weight", SAME),
            "attention.key_value.kernel": ("self_attn.kv_b_proj.weight", LINEAR),
            "attention.query_norm.scale": ("self_attn.q_norm.weight", FLAT),
            "attention.key_norm.scale": ("self_attn.k_norm.weight", FLAT),
            **linear_parts("mlp", {name: f"mlp.{stored}" for name, stored in GATED.items()}),
        }
    ),
}


def per_expert(
    block: str = "mlp", projections: Mapping[str, str] = GATED, router: str = "gate"
) -> dict[str, Stored]:
    """The decoder with one tensor per expert and projection, novices included.

    The constant that an expert adds to its output is the bias of its down projection, as neurons
    may have biases of the others.

    Args:
        block: name of the MoE part of a layer.
        router: name of its router.
    """
    expert = f"{block}.experts.{{expert}}"
    return {
        **DECODER,
        **in_layer(
            {
                "moe.router.kernel": (f"{block}.{router}.weight", LINEAR),
                "moe.router.bias": (f"{block}.{router}.bias", SAME),
                **linear_parts("moe.experts", {n: f"{expert}.{p}" for n, p in projections.items()}),
                "moe.experts.gate_bias": (f"{expert}.{projections['gate']}.bias", SAME),
                "moe.experts.up_bias": (f"{expert}.{projections['up']}.bias", SAME),
                "moe.expert_bias": (f"{expert}.{projections['down']}.bias", SAME),
                "moe.novices.constant": (f"{block}.experts.{{novice}}.approx_value", SAME),
            }
        ),
    }


def fused(
    router: str = "gate",
    block: str = "mlp",
    into: str = "experts.gate_up_proj",
    down: str = "experts.down_proj",
) -> dict[str, Stored]:
    """The decoder with all experts of a layer in two tensors, as transformers 5 holds it."""
    return {
        **DECODER,
        **in_layer(
            {
                "moe.router.kernel": (f"{block}.{router}.weight", LINEAR),
                "moe.experts.gate": (f"{block}.{into}", FIRST_HALF),
                "moe.experts.up": (f"{block}.{into}", SECOND_HALF),
                "moe.experts.down": (f"{block}.{down}", STACKED),
            }
        ),
    }


def fused_with_biases() -> dict[str, Stored]:
    """The decoder with stacked experts that are not transposed, gate and up neurons in turn.

    A novice is an expert whose matrices are zero: the bias of its down projection is left of it.
    """
    both, down = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
    return {
        **DECODER,
        **in_layer(
            {
                "moe.router.kernel": ("mlp.router.weight", LINEAR),
                "moe.router.bias": ("mlp.router.bias", SAME),
                "moe.experts.gate": (both, EVEN),
                "moe.experts.up": (both, ODD),
                "moe.experts.gate_bias": (f"{both}_bias", EVEN),
                "moe.experts.up_bias": (f"{both}_bias", ODD),
                "moe.experts.down": (down, STACKED_SAME),
                "moe.expert_bias": (f"{down}_bias", STACKED_SAME),
                "moe.novices.constant": (f"{down}_bias", STACKED_SAME),
            }
        ),
    }


def correction(name: str, form: Form = SAME) -> dict[str, Stored]:
    """The tensor that corrects the router's scores, to be added to a table."""
    return in_layer({"moe.router.correction": (name, form)})


def shared_expert(expert: str, output_gate: str | None = None) -> dict[str, Stored]:
    """Tensors of a shared expert, to be added to a table: its module, and that of its gate."""
    table = linear_parts("moe.shared", {n: f"{expert}.{p}" for n, p in GATED.items()})
    if output_gate is not None:
        table["moe.shared.output_gate.kernel"] = (f"{output_gate}.weight", ROW)
    return in_layer(table)
