"""A model of transformers with novices, and with layers and experts that differ in shape.

Shipped inside a checkpoint and loaded by transformers (version 5) with ``trust_remote_code=True``.
A novice is an expert whose output is a constant vector (MoNE, arXiv 2507.00390): a token that is
routed to it adds the router weight times that vector, and no matrix is multiplied. The other
experts may differ in width, and may add a constant too: the bias of their down projection. Router,
expert ids, weights and shared experts are those of the stock classes.

Read from ``config.json``:
    approximate_experts: layer -> ids of its novices.
    moe_jax_layers: per layer, the shapes in which it differs from the rest of the file;
        ``expert_widths``, hidden neurons by expert id (0 for novices), where experts differ; and
        ``expert_bias``, whether they add a constant.
    longrope_switch_factor: use longrope's long factors beyond the original context.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import StockConfig, StockForCausalLM  # type: ignore[attr-defined]
from transformers.activations import ACT2FN
from transformers.models.stock_type import modeling_stock_type as stock

# What this family calls things: attributes of a layer's shapes, the gate, up and down projections
# of an expert, whether all of these have biases, where the file says how experts clamp (the limit
# and the gain of the sigmoid), names on disk of the MoE part of a layer and of its router (and the
# stock attributes that hold them), of its shared expert and of what the router holds in memory
# only, and whether norms of queries and keys run over all heads.
FACTS: Any = "FACTS"


class Novice(nn.Module):
    """A constant vector in the place of an expert."""

    def __init__(self, width):
        super().__init__()
        self.approx_value = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return self.approx_value


class Expert(nn.Module):
    """A gated feed-forward expert of ``width`` neurons."""

    def __init__(self, config, width):
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.clamp = [getattr(config, name) for name in FACTS["clamp"]]
        hidden, biases = config.hidden_size, FACTS["biases"]
        gate, up, down = FACTS["projections"]
        self.add_module(gate, nn.Linear(hidden, width, bias=biases))
        self.add_module(up, nn.Linear(hidden, width, bias=biases))
        bias = biases or getattr(config, "expert_bias", False)
        self.add_module(down, nn.Linear(width, hidden, bias=bias))

    def forward(self, x):
        gate, up, down = (getattr(self, name) for name in FACTS["projections"])
        gated, upped = gate(x), up(x)
        if not self.clamp:
            return down(self.act(gated) * upped)
        limit, alpha = self.clamp
        gated, upped = gated.clamp(max=limit), upped.clamp(-limit, limit)
        return down((upped + 1) * gated * torch.sigmoid(alpha * gated))


class Experts(nn.ModuleList):
    """Experts and novices by id, called as the stock block calls its experts."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for e in torch.unique(top_k_index).tolist():
            token, slot = torch.where(top_k_index == e)
            value = self[e](hidden_states[token]) * top_k_weights[token, slot, None]
            output.index_add_(0, token, value.to(output.dtype))
        return output


class SwitchingRotaryEmbedding(stock.StockRotaryEmbedding):
    """Longrope as in Phi-3.5-MoE's own modelling code: factors and scale switch together."""

    @torch.no_grad()
    def forward(self, x, position_ids=None):
        rope: Any = self.config.rope_parameters
        length = int(position_ids.max()) + 1
        long = length > rope["original_max_position_embeddings"]
        frequency, _ = self.rope_init_fn(self.config, x.device, seq_len=length if long else None)
        scale = rope["long_mscale"] if long else rope["short_mscale"]
        angle = position_ids[..., None].float() * frequency.to(x.device, torch.float)
        angle = torch.cat((angle, angle), dim=-1)
        return (angle.cos() * scale).to(x.dtype), (angle.sin() * scale).to(x.dtype)


def _layer_config(config, i):
    """A copy of ``config`` with the shapes, and the facts about experts, of layer ``i``."""
    layer = copy.copy(config)
    # Fixed before the number of heads changes: where it is absent, the model's heads imply it.
    layer.head_dim = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    shapes = (getattr(config, "moe_jax_layers", None) or {i: {}})[i]
    for fact, value in shapes.items():
        for name in FACTS["attributes"].get(fact, [fact]):
            setattr(layer, name, value)
    return layer


def _experts(config, i):
    """Experts and novices of layer ``i``, whose shapes ``config`` has, by their id."""
    listed = getattr(config, "approximate_experts", None) or {}
    novices = set(listed.get(str(i), listed.get(i, ())))
    width, count = (
        getattr(config, FACTS["attributes"][fact][0]) for fact in ("expert_width", "num_experts")
    )
    widths = getattr(config, "expert_widths", None) or [width] * count
    return Experts(
        Novice(config.hidden_size) if e in novices else Expert(config, own)
        for e, own in enumerate(widths)
    )


def _rename(module, stock_name, name):
    """Registers a part under its name on disk; stock code still finds it under its own."""
    part = getattr(module, stock_name)
    if name != stock_name:
        delattr(module, stock_name)
        setattr(module, name, part)
        object.__setattr__(module, stock_name, part)
    return part


def _rebuild(model):
    """Makes each layer anew with its own shapes, and its experts one by one."""
    for i, stock_layer in enumerate(model.model.layers):
        config = _layer_config(model.config, i)
        layer = type(stock_layer)(config, i)
        model.model.layers[i] = layer
        if FACTS["norms_over_heads"]:  # stock ones are as wide as the model
            for norm, projection in (("q_norm", "q_proj"), ("k_norm", "k_proj")):
                old = getattr(layer.self_attn, norm)
                width = getattr(layer.self_attn, projection).out_features
                setattr(layer.self_attn, norm, type(old)(width, eps=old.variance_epsilon))
        block = getattr(layer, FACTS["stock_block"])
        if hasattr(block, "experts"):
            block.experts = _experts(config, i)
            shared = getattr(block, FACTS["shared"], None) if FACTS["shared"] else None
            if shared is not None and getattr(config, "shared_width", None) is not None:
                own = type(shared)(config, intermediate_size=config.shared_width)
                setattr(block, FACTS["shared"], own)
            _rename(layer, FACTS["stock_block"], FACTS["block"])
            router = _rename(block, *FACTS["router"])
            if "moved" in FACTS:
                part = getattr(router, FACTS["moved"])
                delattr(router, FACTS["moved"])
                setattr(block, FACTS["moved"], part)
                object.__setattr__(router, FACTS["moved"], part)
    if getattr(model.config, "longrope_switch_factor", False):
        model.model.rotary_emb = SwitchingRotaryEmbedding(model.config)
    model.post_init()


class StockCompressedConfig(StockConfig):
    model_type = "stock_type_compressed"


class StockCompressedForCausalLM(StockForCausalLM):
    config_class = StockCompressedConfig

    def __init__(self, config):
        super().__init__(config)
        _rebuild(self)
