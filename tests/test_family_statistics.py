"""Scores of the families against float64, from activations and weights captured in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from family_cuts import random_batches
from test_repair import plain_obs
from tiny_hf import save_tiny, torch_model

from moe_jax import calibrate, load_hf, score
from moe_jax.repair import RIDGE


def captured(source, layers, batches):
    """By layer: the experts of transformers, and of valid tokens inputs, weights and ids."""
    model, taken = torch_model(source), {i: [] for i in layers}
    blocks = {i: model.model.layers[i].mlp for i in layers}
    for i, block in blocks.items():
        router = block.gate if hasattr(block, "gate") else block.router

        def keep(module, args, output, i=i):
            _, weights, ids = output
            taken[i].append([a.reshape(-1, a.shape[-1]) for a in (args[0], weights, ids)])

        router.register_forward_hook(keep)
    masks = [torch.tensor(batch["mask"]) for batch in batches]
    for batch, mask in zip(batches, masks, strict=True):
        with torch.no_grad():
            model(torch.tensor(batch["tokens"]).long(), attention_mask=mask.long())
    valid = torch.cat([mask.reshape(-1) for mask in masks])
    found = {}
    for i, parts in taken.items():
        x, weights, ids = (torch.cat(part)[valid] for part in zip(*parts, strict=True))
        found[i] = blocks[i].experts.double(), x.double(), weights.double().numpy(), ids.numpy()
    return found


def hidden_and_down(experts, x, e):
    """An expert's hidden activations [T, F] and down-projection [F, D], and its bias, if any."""
    if hasattr(experts, "gate_up_proj_bias"):  # of gpt-oss, stored the other way round
        product = x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
        return experts._apply_gate(product), experts.down_proj[e], experts.down_proj_bias[e]
    gate, up = (x @ experts.gate_up_proj[e].T).chunk(2, -1)
    return torch.nn.functional.silu(gate) * up, experts.down_proj[e].T, None


# A grouped sigmoid with correction and scale, one without groups, a gated shared expert, biases.
@pytest.mark.parametrize("family", ["deepseek_v3", "minimax_m2", "qwen2_moe", "gpt_oss"])
def test_scores_are_of_the_weights_and_outputs_of_the_layer(tmp_path, family):
    source = save_tiny(tmp_path, family)
    config, params = load_hf(source)
    batches = [batch for seed in range(4) for batch in random_batches(seed)]
    stats = calibrate(params, config, batches, second_moments=True, warn=False)
    model = (params, config)
    scores = {name: score(stats, name, model=model) for name in ("mone", "reap", "obs")}
    for i, (experts, x, weights, ids) in captured(source, config.moe_layers, batches).items():
        found = stats.layers[i]
        checked = 0
        for e in range(config.moe(i).num_experts):
            token, slot = np.nonzero(ids == e)
            assert found["count"][e] == len(token)
            if len(token) == 0:
                assert not any(values[i][e].any() for values in scores.values())
                continue
            weight = weights[token, slot][:, None]
            with torch.no_grad():
                alone = torch.full((len(token), 1), e)
                y = experts(x[token], alone, torch.ones(len(token), 1).double()).numpy()
                hidden, down, bias = (
                    None if part is None else part.numpy()
                    for part in hidden_and_down(experts, x[token], e)
                )
            np.testing.assert_allclose(found["routing_mass"][e], weight.sum(), rtol=1e-4)
            np.testing.assert_allclose(found["output_mean"][e], y.mean(0), rtol=1e-4, atol=1e-5)
            expected = {"reap": np.linalg.norm(weight * y, axis=1).mean(), "mone": 0.0}
            if len(token) > 1:
                expected["mone"] = np.sqrt(y.var(0, ddof=1).sum()) * weight.sum()
            read = down
            if bias is not None:
                hidden = np.concatenate([hidden, np.ones((len(token), 1))], 1)
                read = np.concatenate([down, bias[None]])
            np.testing.assert_allclose(hidden @ read, y, atol=1e-10)
            if len(token) > 2 * len(down):  # or rounding decides the order in which neurons go
                rows = weight * hidden
                # A bias is not removed: it stays, and takes over what it can.
                zeros = np.zeros((0 if bias is None else 1, config.width))
                start = np.concatenate([down, zeros])
                expected["obs"] = plain_obs(rows.T @ rows, start, RIDGE, len(down))
                checked += 1
            for name, values in expected.items():
                atol = 1e-4 * np.max(values)
                np.testing.assert_allclose(
                    scores[name][i][e], values, rtol=1e-3, atol=atol, err_msg=f"{name} {i} {e}"
                )
        assert checked >= config.moe(i).num_experts / 2
