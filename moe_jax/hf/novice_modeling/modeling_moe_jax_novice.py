"""Phi-MoE, OLMoE and Qwen3-MoE with novices, and with layers and experts that differ in shape.

Shipped inside a checkpoint and loaded by transformers (version 5) with ``trust_remote_code=True``.
A novice is an expert whose output is a constant vector (MoNE, arXiv 2507.00390): a token that is
routed to it adds the router weight times that vector, and no matrix is multiplied. The other
experts may differ in width, and may add a constant too: the bias of their down projection. Router,
expert ids and weights are those of the stock classes.

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
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.activations import ACT2FN
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.phimoe import modeling_phimoe as phimoe
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe


class Novice(nn.Module):
    """A constant vector in the place of an expert."""

    def __init__(self, width):
        super().__init__()
        self.approx_value = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return self.approx_value


class Expert(nn.Module):
    """A gated feed-forward expert; ``names`` are those of its gate, up and down projections.

    ``bias``: whether it adds a constant vector to its output.
    """

    def __init__(self, hidden, width, act, names, bias):
        super().__init__()
        self.names, self.act = names, ACT2FN[act]
        gate, up, down = names
        self.add_module(gate, nn.Linear(hidden, width, bias=False))
        self.add_module(up, nn.Linear(hidden, width, bias=False))
        self.add_module(down, nn.Linear(width, hidden, bias=bias))

    def forward(self, x):
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.act(gate(x)) * up(x))


class NoviceMoeBlock(nn.Module):
    """Stock router, experts and novices side by side."""

    def __init__(self, router, experts):
        super().__init__()
        self.gate = router
        self.experts = nn.ModuleList(experts)

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, ids = self.gate(x)
        output = torch.zeros_like(x)
        for e in torch.unique(ids).tolist():
            token, slot = torch.where(ids == e)
            value = self.experts[e](x[token]) * weights[token, slot, None]
            output.index_add_(0, token, value.to(output.dtype))
        return output.reshape(hidden_states.shape)


class SwitchingRotaryEmbedding(phimoe.PhimoeRotaryEmbedding):
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


# What the families call things: config keys of a layer's shapes, block and projections on disk.
_SHAPE_KEYS = {
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
}
_GATED = ("gate_proj", "up_proj", "down_proj")


def _layer_config(config, i, width_key):
    """A copy of ``config`` with the shapes, and the facts about experts, of layer ``i``."""
    layer = copy.copy(config)
    # Fixed before the number of heads changes: where it is absent, the model's heads imply it.
    layer.head_dim = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    shapes = (getattr(config, "moe_jax_layers", None) or {i: {}})[i]
    for fact, value in shapes.items():
        keys = {"expert_width": width_key, "dense_width": "intermediate_size", **_SHAPE_KEYS}
        setattr(layer, keys.get(fact, fact), value)
    return layer


def _novices(config, i):
    listed = getattr(config, "approximate_experts", None) or {}
    return set(listed.get(str(i), listed.get(i, ())))


def _experts(config, i, width_key, names):
    """Experts and novices of layer ``i``, whose shapes ``config`` has, by their id."""
    hidden, novices = config.hidden_size, _novices(config, i)
    same = [getattr(config, width_key)] * config.num_local_experts
    widths = getattr(config, "expert_widths", None) or same
    bias = getattr(config, "expert_bias", False)
    return [
        Novice(hidden) if e in novices else Expert(hidden, width, config.hidden_act, names, bias)
        for e, width in enumerate(widths)
    ]


def _rebuild(model, attention, router, block_name, names, width_key, dense=None):
    """Replaces attention and feed-forward of each layer by ones of that layer's own shapes."""
    for i, layer in enumerate(model.model.layers):
        config = _layer_config(model.config, i, width_key)
        layer.self_attn = attention(config, i)
        if dense is not None and isinstance(layer.mlp, dense):
            layer.mlp = dense(config, intermediate_size=config.intermediate_size)
            continue
        block = NoviceMoeBlock(router(config), _experts(config, i, width_key, names))
        del layer.mlp
        # Registered under the name on disk; the layer's forward calls it ``mlp`` in any case.
        setattr(layer, block_name, block)
        object.__setattr__(layer, "mlp", block)
    model.post_init()


class PhimoeCompressedConfig(PhimoeConfig):
    model_type = "phimoe_compressed"


class PhimoeCompressedForCausalLM(PhimoeForCausalLM):
    config_class = PhimoeCompressedConfig

    def __init__(self, config):
        super().__init__(config)
        if getattr(config, "longrope_switch_factor", False):
            self.model.rotary_emb = SwitchingRotaryEmbedding(config)
        _rebuild(
            self,
            phimoe.PhimoeAttention,
            phimoe.PhimoeTopKRouter,
            "block_sparse_moe",
            ("w1", "w3", "w2"),
            "intermediate_size",
        )


class OlmoeCompressedConfig(OlmoeConfig):
    model_type = "olmoe_compressed"


class _OlmoeAttention(olmoe.OlmoeAttention):
    """Norms as wide as the projections, which after pruning heads differ from the model."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.q_norm = olmoe.OlmoeRMSNorm(self.q_proj.out_features, eps=config.rms_norm_eps)
        self.k_norm = olmoe.OlmoeRMSNorm(self.k_proj.out_features, eps=config.rms_norm_eps)


class OlmoeCompressedForCausalLM(OlmoeForCausalLM):
    config_class = OlmoeCompressedConfig

    def __init__(self, config):
        super().__init__(config)
        _rebuild(self, _OlmoeAttention, olmoe.OlmoeTopKRouter, "mlp", _GATED, "intermediate_size")


class Qwen3MoeCompressedConfig(Qwen3MoeConfig):
    model_type = "qwen3_moe_compressed"


class Qwen3MoeCompressedForCausalLM(Qwen3MoeForCausalLM):
    config_class = Qwen3MoeCompressedConfig

    def __init__(self, config):
        super().__init__(config)
        _rebuild(
            self,
            qwen3_moe.Qwen3MoeAttention,
            qwen3_moe.Qwen3MoeTopKRouter,
            "mlp",
            _GATED,
            "moe_intermediate_size",
            dense=qwen3_moe.Qwen3MoeMLP,
        )
