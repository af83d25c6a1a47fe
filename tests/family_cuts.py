"""Every kind of cut of a family's model, exported and loaded by transformers again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tiny_hf import VOCAB, torch_logits

from moe_jax import calibrate, forward, load_hf, save_hf
from moe_jax.params import Model
from moe_jax.plan import Cut, plan_cut
from moe_jax.prune import apply_plan, refit

# Name -> fields of a cut.
CUTS: dict[str, dict[str, Any]] = {
    "MoNE": {"method": "mone", "keep_ratio": 0.5},
    "REAP": {"method": "reap", "replacement": "delete", "keep_ratio": 0.75},
    "slim": {"method": "slim", "importance": "lm", "width_ratio": 0.5},
    "OBS": {"method": "obs", "width_ratio": 0.5, "repair": True},
    "own widths": {
        "method": "token_fisher",
        "neuron_scope": "model",
        "own_widths": True,
        "width_ratio": 0.6,
        "refit": True,
    },
    "merge": {"method": "m_smoe", "keep_ratio": 0.5},
    # Of families that share an expert: as wide as a routed one then, which all can write down.
    "shared": {"method": "obs", "width_ratio": 0.5, "shared_width": 4},
    "shared, own widths": {
        "method": "token_fisher",
        "neuron_scope": "layer",
        "own_widths": True,
        "rank_shared": True,
        "width_ratio": 0.5,
    },
}


def random_batches(seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Two batches of random text, some of it padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCAB, (2, 4, 24)).astype(np.int32)
    mask = np.arange(24) < rng.integers(12, 25, (2, 4, 1))
    return [{"tokens": t, "mask": m} for t, m in zip(tokens, mask, strict=True)]


def make_cut(original: Model, name: str | dict[str, Any]) -> Model:
    """The cut of that name, or of these fields, by the functions that a run cuts by."""
    fields = CUTS[name] if isinstance(name, str) else name
    cut, batches = Cut.from_dict(fields), random_batches()
    params, config = original
    stats = calibrate(
        params, config, batches, importance=("lm",), second_moments=True,
        shared_moments=cut.needs_shared_moments, warn=False,
    )  # fmt: skip
    plan = plan_cut(cut, stats, config, params=params).plan
    config, params = apply_plan(params, config, plan, stats)
    return Model(refit(original, Model(params, config), batches) if cut.refit else params, config)


def export_error(source: Path, out: Path, name: str | dict[str, Any]) -> tuple[float, bool]:
    """Largest difference of logits between a cut and its export in torch, and whether it is stock.

    What is read back is compared to the bit on the way.
    """
    config, params = load_hf(source)
    cut = make_cut(Model(params, config), name)
    save_hf(out, cut.params, cut.config, source=source)
    again, loaded = load_hf(out)
    if again != cut.config:
        raise ValueError(f"{name}: read back as {again}, written as {cut.config}")
    jax.tree.map(np.testing.assert_array_equal, loaded, cut.params)
    tokens = random_batches(1)[0]["tokens"]
    stock = "auto_map" not in json.loads((out / "config.json").read_text())
    theirs = torch_logits(out, tokens, **({} if stock else {"trust_remote_code": True}))
    ours = jax.jit(lambda weights: forward(weights, cut.config, tokens)[0])(cut.params)
    return float(np.abs(theirs - np.asarray(ours)).max()), stock
