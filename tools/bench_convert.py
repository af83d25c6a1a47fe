"""Conversion between the two formats against the disk: ``cp`` and ``sync`` of the same files.

    python tools/bench_convert.py --folder=DIR                 # one layer of Qwen3-30B-A3B, 2.5 GB
    python tools/bench_convert.py --folder=DIR --layers=8

Each is done in turn, three times, in a process of its own, from files that the system holds in
memory as far as it can; the best counts. Prints seconds, the share of the copy's speed, and peak
memory without mapped files.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from check_layerwise import REPOSITORY, make_checkpoint

from moe_jax.text import aligned, byte_size


def timed(command: list[str], result: Path) -> tuple[float, int]:
    """Seconds of a command and a sync, and its peak of memory that is no mapped file."""
    shutil.rmtree(result, ignore_errors=True)
    subprocess.run(["sync"], check=True)
    begin, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        rows = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peak = max(peak, *(int(row.split()[1]) for row in rows if row.startswith("RssAnon")), 0)
        time.sleep(0.05)
    subprocess.run(["sync"], check=True)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - begin, 1024 * peak


def converting(source: Path, output: Path) -> list[str]:
    settings = ["--config=configs/convert.py", f"--config.source={source}"]
    return [sys.executable, "-m", "moe_jax.convert", *settings, f"--config.output={output}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    source = make_checkpoint("qwen3_30b_a3b", asked.layers, asked.folder)
    copy, orbax, back = (asked.folder / name for name in ("copy", "orbax", "back"))
    commands = {
        "cp": (["cp", "-r", str(source), str(copy)], copy),
        "to orbax": (converting(source, orbax), orbax),
        "back": (converting(orbax, back), back),
    }
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    for _ in range(asked.repetitions):
        for name, (command, result) in commands.items():
            found[name].append(timed(command, result))
    best = {name: min(runs) for name, runs in found.items()}
    rows = [("", "seconds", "of cp's speed", "memory")]
    for name, (seconds, peak) in best.items():
        share = f"{best['cp'][0] / seconds:.2f}"
        rows.append((name, f"{seconds:.1f}", share, byte_size(peak)))
    nbytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(f"{byte_size(nbytes)}\n{aligned(rows)}")


if __name__ == "__main__":
    main()
