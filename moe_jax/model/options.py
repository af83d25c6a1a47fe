"""What a caller may ask of a forward pass beside its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
from jaxtyping import Array, Float

from moe_jax.ops.expert_mlp import TAPS as EXPERT_TAPS

# Intermediates that a block can return: the residual stream [B, S, D] before and behind it;
# ``key`` and ``value`` [B, S, G, H] as attention reads them and ``mixed`` [B, S, N, H], what its
# output projection reads; ``feed_forward_input`` [B, S, D] behind its norm and, of a dense layer,
# ``hidden`` [B, S, F]; the others are described in ``moe.moe_layer``.
TAPS = (
    "layer_input",
    "key",
    "value",
    "mixed",
    "feed_forward_input",
    "router_logits",
    "expert_ids",
    "weights",
    "row",
    "row_token",
    "row_weight",
    "group_sizes",
    *EXPERT_TAPS,
    "layer_output",
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockOptions:
    """How one block is run.

    Attributes:
        taps: names in ``TAPS`` of what to return beside the output.
        backend: of ``ops.grouped_matmul``.
        neuron_mask: [E_kept, F], multiplied into each expert's hidden activations. Ones leave the
            layer as it is and make its gradient the grouped Taylor importance; zeros are a dry run
            of slimming.
        group_mask: [G], multiplied into the outputs of each key/value head's query heads: its
            gradient at ones is their first-order importance, zeros are a dry run of removal.
        rng: train mode (sampling routers, input jitter) when given.
    """

    taps: tuple[str, ...] = field(default=(), metadata={"static": True})
    backend: str = field(default="auto", metadata={"static": True})
    neuron_mask: Float[Array, "E_kept F"] | None = None
    group_mask: Float[Array, " G"] | None = None
    rng: Array | None = None


@dataclass(frozen=True)
class ForwardOptions:
    """How a whole model is run: keywords of ``forward`` and ``hidden_states``.

    Attributes:
        neuron_masks, group_masks: by layer index, see ``BlockOptions``.
        rng: train mode when given; each layer folds its index in.
        remat: keep each block's input only and compute the rest again in the backward pass.
        backend: of ``ops.grouped_matmul``.
    """

    neuron_masks: Mapping[int, Array] | None = None
    group_masks: Mapping[int, Array] | None = None
    rng: Array | None = None
    remat: bool = False
    backend: str = "auto"

    def of_layer(self, i, taps: tuple[str, ...]) -> BlockOptions:
        """The part of layer ``i``, which may be traced if there are no masks."""
        return BlockOptions(
            taps=taps,
            backend=self.backend,
            neuron_mask=self.neuron_masks.get(i) if self.neuron_masks else None,
            group_mask=self.group_masks.get(i) if self.group_masks else None,
            rng=None if self.rng is None else jax.random.fold_in(self.rng, i),
        )
