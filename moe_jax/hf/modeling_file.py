"""The modelling file that exports carry where the stock class cannot hold the model."""

from __future__ import annotations

import importlib.resources
import json
from typing import Any

from moe_jax.hf.family import Family
from moe_jax.hf.layouts import Stored
from moe_jax.hf.rope_keys import MODELING_MODULE

MODELING_FILE = f"{MODELING_MODULE}.py"
_SHAPES = (
    "num_heads",
    "num_kv_heads",
    "dense_width",
    "num_experts",
    "experts_per_token",
    "expert_width",
    "shared_width",
)


def modeling_file(row: Family) -> str:
    """The text of the file for one family: one program, with the family's names filled in."""
    template = importlib.resources.files("moe_jax.hf") / "modeling" / MODELING_FILE
    text = template.read_text(encoding="utf-8")
    facts = json.dumps(_facts(row), indent=4).replace("true", "True").replace("false", "False")
    text = text.replace('"FACTS"\n', f"{facts}\n", 1).replace("  # type: ignore[attr-defined]", "")
    return text.replace("Stock", row.stem).replace("stock_type", row.model_type)


def _facts(row: Family) -> dict[str, Any]:
    """What ``FACTS`` in the file holds; read off the family's keys and tables."""
    named = {fact: row.keys[fact] for fact in _SHAPES if fact in row.keys}
    attributes = {fact: list(key.names) for fact, key in named.items() if key.per is None}
    facts = {"attributes": attributes, "norms_over_heads": row.fixed.get("qk_norm") == "full"}
    on_disk = row.layouts[row.own_layout]
    in_memory = row.layouts.get("fused")
    if in_memory is None:  # no experts
        return facts

    def parts(stored: Stored) -> list[str]:
        return stored.name.removeprefix("model.layers.{layer}.").removesuffix(".weight").split(".")

    def projection(name: str) -> str:
        return parts(on_disk[f"layers.{{layer}}.moe.experts.{name}"])[-1]

    router, stock_router = (
        parts(table["layers.{layer}.moe.router.kernel"]) for table in (on_disk, in_memory)
    )
    shared = on_disk.get("layers.{layer}.moe.shared.gate")
    moved = {}
    correction = "layers.{layer}.moe.router.correction"
    if correction in on_disk:
        there, here = parts(in_memory[correction]), parts(on_disk[correction])
        # A module of the router in memory that lies beside it on disk.
        if len(there) > len(here):
            moved = {"moved": there[-2]}
    return {
        **facts,
        **moved,
        "shared": parts(shared)[-2] if shared is not None else "",
        "projections": [projection(name) for name in ("gate", "up", "down")],
        "biases": row.holds_constants,
        "clamp": [row.keys[name].names[0] for name in ("limit", "alpha") if name in row.keys],
        "block": router[0],
        "stock_block": stock_router[0],
        "router": [stock_router[-1], router[-1]],
    }
