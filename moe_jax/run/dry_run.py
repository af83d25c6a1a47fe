"""What a run would do, from ``config.json`` alone: no weight, text or tokenizer is read."""

from __future__ import annotations

from moe_jax.calibrate.memory import plan_second_moments
from moe_jax.config import ModelConfig
from moe_jax.hf.config_export import needs_modeling_file
from moe_jax.hf.config_import import model_config
from moe_jax.hf.folder import find_config, read_json
from moe_jax.inspect import describe
from moe_jax.params import ITEM_BYTES, count_params
from moe_jax.plan import Cut
from moe_jax.run.config import RunConfig
from moe_jax.run.serving import serving_warnings
from moe_jax.run.target import stage_table
from moe_jax.text import byte_size


def dry_run(run: RunConfig) -> str:
    """Sizes, passes over the text, memory of second moments and steps, as text for a terminal.

    Args:
        run: whose ``model`` may be a ``config.json`` alone. A stage that applies a plan file is
            refused: what it leaves is in that file.

    Raises:
        FileNotFoundError: no such model.
        ValueError: a stage that the model cannot go through; plans from files.
    """
    hf = read_json(find_config(run.model))
    model = model_config(hf)
    run = run.for_model(model)
    if any(stage.plan for stage in run.stages):
        raise ValueError("dry_run knows no stage that applies a plan file: inspect the plan itself")
    models = run.check_against(model)
    dtype = run.dtype or hf.get("dtype") or hf.get("torch_dtype") or "float32"
    size = ITEM_BYTES.get(dtype, 4)
    sequences, length = run.calibration.num_sequences, run.calibration.seq_len
    lines = [
        describe(hf),
        "",
        stage_table(run.stages, run.training, model, models),
        "",
        f"weights in {dtype}: {_weights(model, size)} before, {_weights(models[-1], size)} after",
        f"calibration: {sequences} x {length} = {sequences * length:,} tokens a pass",
    ]
    before = model
    for i, (stage, after) in enumerate(zip(run.stages, models, strict=True)):
        cut = stage.cut
        if cut is not None:
            losses = ", ".join(sorted(stage.losses)) or "none"
            lines.append(f"stage {i}: gradients of {losses}; {_moments(before, cut)}")
        before = after
    stock = not needs_modeling_file(models[-1])
    loads = "the stock class loads it" if stock else "it needs the modelling file that is shipped"
    lines += [f"the result: {loads}", *serving_warnings(models[-1], run.serve)]
    return "\n".join(lines)


def _moments(model: ModelConfig, cut: Cut) -> str:
    """What second moments a cut needs, and whether they would fit on this machine."""
    try:
        plan = plan_second_moments(
            model, cut.needs_second_moments, attention=cut.needs_attention_moments
        )
    except ValueError as error:
        return f"refused on this machine: {error}"
    return f"{plan}" if plan.passes else "no second moments"


def _weights(model: ModelConfig, size: int) -> str:
    return byte_size(count_params(model).total * size)
