"""Compression of a model larger than the memory it may take, layer by layer from disk, measured.

    python tools/check_layerwise.py --model=qwen3_30b_a3b --layers=16 --folder=DIR
    python tools/check_layerwise.py --model=phi_3_5_moe --layers=8 --dtype=bfloat16 --folder=DIR
    python tools/check_layerwise.py --kills --folder=DIR

The first two make a checkpoint of a public model's true layer shapes, random numbers in bfloat16
(20 GB each, kept in DIR), and carry out every cut on 16 x 512 tokens of real text, each in a
process of its own: seconds by step, peak memory (resident without mapped files, which the system
takes back when it needs to, and with them), and the time that ``cp`` and ``sync`` of the checkpoint
take. With --limit_gb, and where a memory cgroup can be made, each process is kept to it.

The third kills a run on a shipped teacher with SIGKILL in every phase, starts it again, and
compares every byte of the result with that of a run that was left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from public_models import PUBLIC  # noqa: E402

from moe_jax import save_hf  # noqa: E402
from moe_jax.hf.config_import import model_config  # noqa: E402
from moe_jax.params import Leaf, abstract_params  # noqa: E402
from moe_jax.stored import StoredLeaf  # noqa: E402
from moe_jax.text import aligned, byte_size  # noqa: E402

TEACHER = REPOSITORY / "moe_jax/assets/olmoe"
TEXT = REPOSITORY / "moe_jax/assets/text"
REFITTED = {"method": "token_fisher", "width_ratio": 0.5, "refit": True}
CUTS: dict[str, dict[str, dict[str, Any]]] = {
    "qwen3_30b_a3b": {
        "MoNE, half": {"method": "mone", "keep_ratio": 0.5},
        "REAP, three quarters": {"method": "reap", "replacement": "delete", "keep_ratio": 0.75},
        "token cost, half, refit": REFITTED,
    },
    "phi_3_5_moe": {
        "MoNE, half": {"method": "mone", "keep_ratio": 0.5},
        "REAP, three quarters": {"method": "reap", "replacement": "delete", "keep_ratio": 0.75},
        "OBS to 960, in turn": {"method": "obs", "expert_width": 960, "sequential": True},
    },
}
KILLED = {"fisher": REFITTED, "obs": {"method": "obs", "width_ratio": 0.5, "sequential": True}}


def make_checkpoint(name: str, layers: int, folder: Path) -> Path:
    """A checkpoint of a public model's shapes, of so many layers, with a tokenizer."""
    source = folder / f"{name}-{layers}"
    if (source / "config.json").exists():
        return source
    config = model_config({**PUBLIC[name].hf, "num_hidden_layers": layers})
    params = jax.tree.map(
        lambda leaf: StoredLeaf(leaf.shape, ml_dtypes.bfloat16, partial(drawn, leaf)),
        abstract_params(config),
        is_leaf=lambda node: isinstance(node, Leaf),
    )
    files = {file.name: file.read_bytes() for file in TEACHER.glob("tokenizer*")}
    save_hf(source, params, config, max_shard_bytes=2e9, extra_files=files)
    return source


def drawn(leaf: Leaf, window: tuple[slice, ...]) -> np.ndarray:
    """Numbers of a fixed seed, made block by block."""
    found = np.zeros(leaf.shape, ml_dtypes.bfloat16)
    if leaf.init != "normal":
        found[...] = leaf.init == "ones"
        return found[window]
    rng, flat = np.random.default_rng(leaf.size), found.reshape(-1)
    for start in range(0, flat.size, 1 << 24):
        part = flat[start : start + (1 << 24)]
        part[:] = 0.02 * rng.standard_normal(part.size, np.float32)
    return found[window]


def write_config(source: Path, stage: dict[str, Any], output: Path, dtype: str) -> Path:
    """The configuration of a run, as a file."""
    text = {"seq_len": 512, "batch_size": 1}
    values = {
        "model": str(source),
        "output": str(output),
        "dtype": dtype,
        "calibration": {
            "files": (f"{TEXT}/calibration/*.jsonl.xz",), "num_sequences": 16, "mode": "layerwise",
            **text,
        },
        "evaluation": {"files": (f"{TEXT}/evaluation/*.jsonl.xz",), "max_bytes": 400, **text},
        "stages": (stage,),
    }  # fmt: skip
    file = output.with_suffix(".py")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({values!r})\n"
    )
    return file


def start(config: Path) -> subprocess.Popen:
    with config.with_suffix(".log").open("a") as log:
        command = [sys.executable, "-m", "moe_jax.compress", f"--config={config}"]
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)


@contextmanager
def memory_limit(nbytes: int) -> Iterator[Path | None]:
    """A cgroup to put a process in, if one can be made; None without a limit."""
    group = Path(f"/sys/fs/cgroup/memory/moe_jax-{os.getpid()}")
    if not nbytes:
        yield None
        return
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(nbytes))
    try:
        yield group
    finally:
        group.rmdir()


def watched(config: Path, limit: int) -> tuple[float, int, int]:
    """Seconds that a run took, and its peaks: resident without mapped files, and with them."""
    begin, alone, all_pages = time.perf_counter(), 0, 0
    with memory_limit(limit) as group:
        process = start(config)
        if group is not None:
            (group / "cgroup.procs").write_text(str(process.pid))
        while process.poll() is None:
            rows = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            sizes = {row.split(":")[0]: row.split()[1] for row in rows if row.endswith("kB")}
            alone = max(alone, 1024 * int(sizes.get("RssAnon", 0)))
            all_pages = max(all_pages, 1024 * int(sizes.get("VmRSS", 0)))
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"the run failed, see {config.with_suffix('.log')}")
    return time.perf_counter() - begin, alone, all_pages


def measure(name: str, layers: int, folder: Path, dtype: str, limit: int) -> None:
    """Every cut of a model, and one table."""
    source = make_checkpoint(name, layers, folder)
    nbytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    copy = folder / "copy"
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", source, copy], check=True)
    subprocess.run(["sync"], check=True)
    print(f"{name}, {layers} layers, {byte_size(nbytes)}; cp and sync", end=" ")
    print(f"{time.perf_counter() - begin:.0f} s")
    shutil.rmtree(copy)
    for title, stage in CUTS[name].items():
        output = folder / title.replace(" ", "_").replace(",", "")
        seconds, alone, pages = watched(write_config(source, stage, output, dtype), limit)
        report = json.loads((output / "report.json").read_text())
        steps = ", ".join(f"{step} {spent:.0f}" for step, spent in report["seconds"].items())
        losses = [report[when]["evaluation"]["mean"]["nll"] for when in ("before", "after")]
        print(f"{title}: {seconds:.0f} s; peak {byte_size(alone)}, with files {byte_size(pages)}")
        print(f"  seconds: {steps}; mean loss {losses[0]:.4f} to {losses[1]:.4f}", flush=True)
        shutil.rmtree(output)


def phases(folder: Path) -> list[str]:
    """What a run has written so far, in words that say where it is."""
    names = [file.name for file in folder.rglob("*") if file.is_file()]
    return sorted(name for name in names if not name.startswith("."))


def kills(folder: Path) -> None:
    """Runs that are killed again and again against runs that are not."""
    rows = [("cut", "kills", "first files that the runs left", "same bytes")]
    for title, stage in KILLED.items():
        whole, killed = folder / f"{title}-whole", folder / f"{title}-killed"
        for output in (whole, killed):
            shutil.rmtree(output, ignore_errors=True)
        watched(write_config(TEACHER, stage, whole, "float32"), 0)
        config, seen, count = write_config(TEACHER, stage, killed, "float32"), [], 0
        while True:
            process, left = start(config), phases(killed)
            while process.poll() is None:
                now = phases(killed)
                if (new := [n for n in now if n not in left]) and len(new) > 2:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    seen.append(new[0])
                    break
                time.sleep(0.02)
            if process.returncode != -signal.SIGKILL:
                if process.returncode:
                    raise SystemExit(f"the run failed, see {config.with_suffix('.log')}")
                break
            count += 1
        same = contents(whole / "model") == contents(killed / "model")
        rows.append((title, str(count), " ".join(seen), str(same)))
    print(aligned(rows))
    if any(row[-1] == "False" for row in rows):
        raise SystemExit(1)


def contents(folder: Path) -> dict[str, bytes]:
    """Weights and configuration of an export."""
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.suffix != ".md"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CUTS, default="qwen3_30b_a3b")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit_gb", type=float, default=0.0)
    parser.add_argument("--kills", action="store_true")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    if asked.kills:
        kills(asked.folder)
    else:
        limit = int(asked.limit_gb * 1e9)
        measure(asked.model, asked.layers, asked.folder, asked.dtype, limit)
