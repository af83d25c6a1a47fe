"""What a checkpoint's configuration says about its size; no weight is read.

    python -m moe_jax.inspect FOLDER_OR_CONFIG_JSON
    python -m moe_jax.inspect --config=configs/quickstart.py
    python -m moe_jax.inspect --config=configs/pods/phi_3_5_moe_8x80gb.py --device=h100
    python -m moe_jax.inspect --config=... --device_memory=80GB --devices=8

With ``--config`` the model named by its ``model`` field is shown. Of a run with stages the rest is
told, too: bytes on each device of the mesh, from the shapes and from what XLA's compiler needs for
the steps, with as many devices simulated as the mesh has; bytes on hosts and disks; passes, steps
and tokens; and the time that a calibration token takes at least on named devices. ``--devices``
proposes a mesh of so many, and a batch, for the memory of one device.

Parameters that one token reads ("active") count both embedding matrices whole and K of the E
experts, the widest where they differ; the table then gives their widths as a span, such as 16-64.
The width of a shared expert, which every token reads, follows after a plus sign.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from moe_jax.cli import run_with_config
from moe_jax.config import LayerConfig, ModelConfig, MoeConfig
from moe_jax.hf.config_import import model_config
from moe_jax.hf.folder import find_config, read_json
from moe_jax.hf.nested import text_part
from moe_jax.hf.source import Source
from moe_jax.params import ITEM_BYTES, abstract_params, count_params, leaves_with_path

_COLUMNS = ("layers", "heads", "kv heads", "experts", "novices", "per token", "width", "parameters")


def describe(hf: dict[str, Any]) -> str:
    """A report on a parsed ``config.json``: totals, bytes, and a table of its layers.

    Raises:
        ValueError: an unsupported or impossible configuration.
    """
    config = model_config(hf)
    counts = count_params(config)
    dtype = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    packed = "quantization_config" in text_part(hf)
    lines = [
        f"{config.family}: {config.num_layers} layers, width {config.width}, "
        f"head_dim {config.head_dim}, vocabulary {config.vocab_size}, "
        f"context {config.max_positions}",
        f"parameters  {counts.total:>18,}",
        f"  active    {counts.active:>18,}",
        f"  experts   {counts.experts:>18,}  ({counts.experts / counts.total:.1%})",
    ]
    for name, size in ITEM_BYTES.items():
        stored = "  (as stored)" if name == dtype and not packed else ""
        lines.append(f"{name:<9} {counts.total * size:>18,} bytes{stored}")
    with contextlib.suppress(ValueError):  # a packed form whose weights would be refused
        if packed:
            nbytes = Source.described(hf).nbytes
            lines.append(f"packed    {nbytes:>18,} bytes  (as stored, by its shapes)")
    return "\n".join([*lines, "", *_table(_rows(config))])


def _rows(config: ModelConfig) -> list[tuple[str, ...]]:
    """One row per run of equal layers."""
    sizes = [
        sum(leaf.size for _, leaf in leaves_with_path(layer))
        for layer in abstract_params(config)["layers"]
    ]
    rows: list[tuple[str, ...]] = []
    start = 0
    for i in range(1, config.num_layers + 1):
        if i == config.num_layers or config.layers[i] != config.layers[start]:
            indices = str(start) if i - 1 == start else f"{start}-{i - 1}"
            rows.append((indices, *_cells(config.layers[start]), f"{sizes[start]:,}"))
            start = i
    return rows


def _cells(layer: LayerConfig) -> tuple[str, ...]:
    heads = (str(layer.num_heads), str(layer.num_kv_heads))
    feed_forward = layer.feed_forward
    if not isinstance(feed_forward, MoeConfig):
        return (*heads, "-", "-", "-", str(feed_forward.width))
    return (
        *heads,
        str(feed_forward.num_experts),
        str(len(feed_forward.novice_ids)),
        str(feed_forward.experts_per_token),
        _span(feed_forward),
    )


def _span(moe: MoeConfig) -> str:
    """Narrowest and widest of the experts that have neurons, once if they agree."""
    widest, narrowest = moe.buckets[0].width, moe.buckets[-1].width
    span = str(widest) if widest == narrowest else f"{narrowest}-{widest}"
    return span if moe.shared is None else f"{span}+{moe.shared.width}"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    cells = [_COLUMNS, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(_COLUMNS))]
    return ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in cells]


def main(settings: ConfigDict | None, arguments: Sequence[str]) -> None:
    if len(arguments) + (settings is not None) != 1:
        raise app.UsageError("give one folder, config.json or hub id, or --config")
    if settings is not None and (settings.get("stages") or settings.get("target")):
        # Imported here: it imports what describes a model from here.
        from moe_jax.run.config import RunConfig
        from moe_jax.run.devices import parse_bytes
        from moe_jax.run.dry_run import dry_run

        given = flags.FLAGS
        memory = parse_bytes(given.device_memory) if given.device_memory else None
        if given.devices and not (memory or given.device):
            raise app.UsageError("--devices needs --device or --device_memory")
        run = RunConfig.from_dict(settings.to_dict())
        device, devices = given.device or "", given.devices
        print(dry_run(run, compiles=True, device=device, memory=memory, devices=devices))
        return
    target = str(settings.model) if settings is not None else arguments[0]
    print(describe(read_json(find_config(target))))


if __name__ == "__main__":
    from moe_jax.run.devices import DEVICES

    flags.DEFINE_enum("device", None, sorted(DEVICES), "Kind of device to plan for.")
    flags.DEFINE_string("device_memory", None, "Memory of a device, such as 80GB.")
    flags.DEFINE_integer("devices", 0, "Propose a mesh of so many devices.", lower_bound=0)
    run_with_config(
        main, "Configuration file whose field `model` names the checkpoint.", required=False
    )
