"""What a run would do, from ``config.json`` alone: no weight, text or tokenizer is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.config import ModelConfig
from moe_jax.hf.config_export import needs_modeling_file
from moe_jax.hf.config_import import model_config
from moe_jax.hf.folder import find_config, read_json
from moe_jax.hf.nested import text_part
from moe_jax.hf.packed import scheme_of
from moe_jax.hf.source import Source
from moe_jax.inspect import describe
from moe_jax.params import ITEM_BYTES, count_params
from moe_jax.run.config import RunConfig
from moe_jax.run.devices import DEVICES
from moe_jax.run.memory_plan import MemoryPlan
from moe_jax.run.serving import serving_command, serving_warnings
from moe_jax.run.stored_bytes import stored_bytes
from moe_jax.run.target import stage_table
from moe_jax.text import byte_size


def dry_run(
    run: RunConfig,
    *,
    compiles: bool = False,
    device: str = "",
    memory: float | None = None,
    devices: int = 0,
) -> str:
    """Sizes, passes over the text, memory and steps, as text for a terminal.

    Args:
        run: whose ``model`` may be a ``config.json`` alone. A stage that applies a plan file is
            refused: what it leaves is in that file.
        compiles: also what XLA needs for the steps, which takes up to a minute or two.
        device: a name in ``devices.DEVICES``.
        memory: bytes of a device; None: that device's, if one is named.
        devices: if positive, a mesh of so many is proposed, which takes minutes.

    Raises:
        FileNotFoundError: no such model.
        ValueError: a stage that the model cannot go through; plans from files; a mesh that does
            not divide the weights.
    """
    hf = read_json(find_config(run.model))
    model = model_config(hf)
    run = run.for_model(model)
    if any(stage.plan for stage in run.stages):
        raise ValueError("dry_run knows no stage that applies a plan file: inspect the plan itself")
    models = run.check_against(model)
    stored = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    stored = stored if stored in ITEM_BYTES else "float32"
    dtype = run.dtype or stored
    size = ITEM_BYTES[dtype]
    if memory is None and device:
        memory = DEVICES[device].memory
    plan = MemoryPlan(run, (model, *models), dtype, stored, memory, device)
    sequences, length = run.calibration.num_sequences, run.calibration.seq_len
    lines = [
        describe(hf),
        "",
        stage_table(run.stages, run.training, model, models),
        "",
        f"weights in {dtype}: {_weights(model, size)} before, {_weights(models[-1], size)} after",
        f"calibration: {sequences} x {length} = {sequences * length:,} tokens a pass",
        *_stored(hf, run, (model, *models)),
        *(
            f"stage {i}: gradients of {', '.join(stage.losses) or 'none'}; "
            f"{plan.moments(i) if plan.moments(i).passes else 'no second moments'}"
            for i, stage in enumerate(run.stages)
            if stage.cut is not None
        ),
        plan.text(compiles),
    ]
    if devices:
        lines.append(plan.proposal(devices))
    stock = not needs_modeling_file(models[-1])
    loads = "the stock class loads it" if stock else "it needs the modelling file that is shipped"
    lines += [
        f"the result: {loads}; to serve it: {serving_command(models[-1], run.serve)}",
        *serving_warnings(models[-1], run.serve),
    ]
    return "\n".join(lines)


def _stored(hf: Mapping[str, Any], run: RunConfig, models: Sequence[ModelConfig]) -> list[str]:
    """Bytes of a packed checkpoint and of what will be written, which those of a dtype are not."""
    if scheme_of(text_part(hf), run.model) is None:
        return []
    return [stored_bytes(Source.described(hf), run.stages, models, run.export)]


def _weights(model: ModelConfig, size: int) -> str:
    return byte_size(count_params(model).total * size)
