"""What a caller may ask of a forward pass beside its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
from jaxtyping import Array, Float

from moe_jax.ops.expert_mlp import TAPS as EXPERT_TAPS

# Intermediates that a block can return: the residual stream [B, S, D] before and behind it;
# ``key`` and ``value`` [B, S, G, H] as attention reads them and ``mixed`` [B, S, N, H], what its
# output projection reads; ``feed_forward_input`` [B, S, D], behind its norm, and
# ``feed_forward_output`` [B, S, D], what this part adds to the stream; ``shared_hidden``
# [B, S, U], the hidden activations of a shared expert times its gate; of a dense layer ``hidden``
# [B, S, F]; the others are described in ``moe.moe_layer``.
TAPS = (
    "layer_input",
    "key",
    "value",
    "mixed",
    "feed_forward_input",
    "feed_forward_output",
    "shared_hidden",
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
        attention_offset, feed_forward_offset: [B, S, D], added to what these parts add to the
            stream: the gradient at zero is the loss's in what they add at each token.
        rng: train mode (sampling routers, input jitter) when given.
    """

    taps: tuple[str, ...] = field(default=(), metadata={"static": True})
    backend: str = field(default="auto", metadata={"static": True})
    neuron_mask: Float[Array, "E_kept F"] | None = None
    group_mask: Float[Array, " G"] | None = None
    attention_offset: Float[Array, "B S D"] | None = None
    feed_forward_offset: Float[Array, "B S D"] | None = None
    rng: Array | None = None


@dataclass(frozen=True)
class ForwardOptions:
    """How a whole model is run: keywords of ``forward`` and ``hidden_states``.

    Attributes:
        neuron_masks, group_masks, attention_offsets, feed_forward_offsets: by layer index, see
            ``BlockOptions``.
        rng: train mode when given; each layer folds its index in.
        remat: keep each block's input only and compute the rest again in the backward pass.
        backend: of ``ops.grouped_matmul``.
    """

    neuron_masks: Mapping[int, Array] | None = None
    group_masks: Mapping[int, Array] | None = None
    attention_offsets: Mapping[int, Array] | None = None
    feed_forward_offsets: Mapping[int, Array] | None = None
    rng: Array | None = None
    remat: bool = False
    backend: str = "auto"

    @property
    def by_layer(self) -> bool:
        """Whether anything is given by layer."""
        masks = (self.neuron_masks, self.group_masks)
        return any((*masks, self.attention_offsets, self.feed_forward_offsets))

    def of_layer(self, i, taps: tuple[str, ...]) -> BlockOptions:
        """The part of layer ``i``, which may be traced if nothing is given by layer."""

        def own(by_layer: Mapping[int, Array] | None) -> Array | None:
            return by_layer.get(i) if by_layer else None

        return BlockOptions(
            taps=taps,
            backend=self.backend,
            neuron_mask=own(self.neuron_masks),
            group_mask=own(self.group_masks),
            attention_offset=own(self.attention_offsets),
            feed_forward_offset=own(self.feed_forward_offsets),
            rng=None if self.rng is None else jax.random.fold_in(self.rng, i),
        )
