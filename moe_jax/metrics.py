"""Numbers over time: JSON lines always, TensorBoard and Weights & Biases when asked."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moe_jax.files import replacing_file
from moe_jax.processes import is_writer


class MetricsWriter:
    """Appends one JSON object per step to ``folder/metrics.jsonl``.

    Args:
        after_step: records of later steps, which a killed run left, are dropped; None keeps all.
        tensorboard: also write event files (needs ``tensorboardX``).
        wandb_project: also log to this Weights & Biases project (needs ``wandb``).

    Raises:
        ImportError: a tracker that was asked for is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        after_step: int | None = None,
        tensorboard: bool = False,
        wandb_project: str = "",
    ) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if after_step is not None and self.path.exists():
            kept = [r for r in read_metrics(self.path) if r["step"] <= after_step]
            with replacing_file(self.path) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115  lives as long as the writer
        self._trackers: list[Any] = []
        self._closing: list[Any] = []
        if tensorboard:
            from tensorboardX import SummaryWriter

            events = SummaryWriter(str(self.path.parent / "tensorboard"))
            self._trackers.append(
                lambda step, values: [events.add_scalar(k, v, step) for k, v in values.items()]
            )
            self._closing.append(events.close)
        if wandb_project:
            import wandb

            # A run per training: steps of several stages would not increase within one.
            name = "/".join(self.path.parent.absolute().parts[-3:])
            run = wandb.init(
                project=wandb_project, dir=str(self.path.parent), name=name, reinit=True
            )
            self._trackers.append(lambda step, values: run.log(values, step=step))
            self._closing.append(run.finish)

    def write(self, step: int, **values: float) -> None:
        """Records ``values`` under ``step``."""
        numbers = {name: float(value) for name, value in values.items()}
        record = {"step": step, "time": round(time.time(), 3), **numbers}
        self._file.write(json.dumps(record) + "\n")
        for tracker in self._trackers:
            tracker(step, numbers)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        for close in self._closing:
            close()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Records of a metrics file; a half-written last line (a killed run) is left out."""
    records = []
    for line in Path(path).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def progress_bar(total: int | None, description: str, unit: str, initial: int = 0) -> tqdm:
    """A bar on a terminal, of one process; silent where standard error is a file."""
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        unit_scale=True,
        disable=not (sys.stderr.isatty() and is_writer()),
    )
