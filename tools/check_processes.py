"""A run in many processes against the same run in one, and what happens where one of them is lost.

    python tools/check_processes.py                       # all of it, half an hour on two cores
    python tools/check_processes.py --parts quickstart,slimmoe --processes 2

The quickstart and the two-stage quickstart, on less text and with few steps. Of each number of
processes: how many decisions of the plans are not those of one process, and the largest difference
of an exported weight, as a share of the largest of its tensor. The part ``lost`` ends processes of
one run of a tiny model again and again, each time goes on with another number of them, and compares
its export as well. Exits with 1 where a bound is passed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import config_flags
from safetensors.numpy import load_file

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from tiny_run import save_model, save_text, settings  # noqa: E402

from moe_jax.plan import read_plan  # noqa: E402

MESHES = {1: {}, 2: {"data": 2}, 4: {"data": 2, "fsdp": 2}}
STOPPED_WITHIN = 60.0  # seconds
# Training divides by the square root of second moments that start near zero: a rounding error of a
# gradient may grow to a share of a step.
ROUNDING = {"quickstart": 1e-5, "slimmoe": 1e-3, "lost": 1e-3}
CONFIG = """
import json
from pathlib import Path
from ml_collections import ConfigDict

def get_config():
    config = json.loads(Path(__file__).with_suffix(".json").read_text())
    return ConfigDict(config | {"stages": tuple(config["stages"])})
"""


def small_config(name: str, folder: Path) -> dict[str, Any]:
    """One of the quickstarts, with little text and few steps, or a run of a tiny model."""
    if name == "lost":
        training: dict[str, Any] = {
            "files": [save_text(folder, "training", 40)],
            "seq_len": 16,
            "batch_size": 4,
        }
        training["cache_dir"] = str(folder / "tokens")
        save_model(folder / "model", "phimoe")
        distill = {"steps": 400, "checkpoint_every": 20, "learning_rate": 1e-5}
        stages = [{"method": "slim", "width_ratio": 0.5, "distill": distill}] * 2
        mesh = dict.fromkeys(("data", "fsdp", "expert", "tensor"), 1)
        config = settings(folder, *stages, training=training, dtype="float32", mesh=mesh)
        for text in ("calibration", "evaluation"):
            config[text]["batch_size"] = 4
        return config
    file = {"quickstart": "quickstart.py", "slimmoe": "quickstart_slimmoe.py"}[name]
    loader = config_flags.config_flags._ConfigFileParser("config", lock_config=False)
    config = json.loads(loader.parse(str(REPOSITORY / "configs" / file)).to_json_best_effort())
    config["calibration"] |= {"num_sequences": 16, "seq_len": 128}
    config["evaluation"] |= {"seq_len": 128, "max_bytes": 8000}
    for stage in config["stages"]:
        if "distill" in stage:
            stage["distill"] |= {"steps": 6, "learning_rate": 1e-4}
            config["training"] |= {"seq_len": 128}
    return config


def start(folder: Path, config: Path, number: int, output: Path) -> list[subprocess.Popen]:
    """So many processes of one run, with one device each; their output goes to ``folder``."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    arguments = [f"--config={config}", f"--config.output={output}"]
    arguments += [f"--config.mesh.{axis}={size}" for axis, size in MESHES[number].items()]
    together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(number)}
    own = {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    processes = []
    for i in range(number):
        joined = {**together, "JAX_PROCESS_ID": str(i)} if number > 1 else {}
        with open(folder / f"log.{i}", "w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "moe_jax.compress", *arguments],
                    cwd=REPOSITORY,
                    env={**os.environ, **own, **joined},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes


def finish(folder: Path, processes: list[subprocess.Popen]) -> None:
    """Waits for a run that should end well."""
    statuses = [process.wait() for process in processes]
    if any(statuses):
        logs = "\n".join((folder / f"log.{i}").read_text() for i in range(len(processes)))
        sys.exit(f"{logs}\nstatuses {statuses}")


def weights(output: Path) -> dict[str, np.ndarray]:
    """The export, in float64."""
    return {
        name: array.astype(np.float64)
        for file in sorted((output / "model").glob("*.safetensors"))
        for name, array in load_file(file).items()
    }


def decisions(output: Path) -> list[set[tuple]]:
    """What each plan removes: experts and neurons, by layer."""
    found = []
    for file in sorted((output / "plans").glob("*.json"), key=lambda file: int(file.name[0])):
        layers = read_plan(file).layers.items()
        gone = {(i, e) for i, layer in layers for e in (*layer.deleted, *layer.novices)}
        kept = {(i, e, n) for i, x in layers for e, all in x.neurons.items() for n in all}
        found.append(gone | kept)
    return found


def compare(name: str, one: Path, many: Path) -> bool:
    """Prints how a run's result differs from that of one process; whether it may."""
    pairs = list(zip(decisions(one), decisions(many), strict=True))
    different = sum(len(a ^ b) for a, b in pairs)
    a, b = weights(one), weights(many)
    if a.keys() != b.keys():
        print("  the exports have other tensors")
        return False
    largest = max(np.abs(a[key] - b[key]).max() / np.abs(a[key]).max() for key in a)
    total = sum(len(a | b) for a, b in pairs)
    print(f"  decisions that differ: {different} of {total}; weights by at most {largest:.1e}")
    return different == 0 and largest < ROUNDING[name]


def lose(
    folder: Path,
    output: Path,
    processes: list[subprocess.Popen],
    pattern: str,
    victim: int,
    how: int,
) -> bool:
    """Ends a process once the output has such a file, and tells how the others end."""
    while not list(output.glob(pattern)):
        if any(process.poll() is not None for process in processes):
            finish(folder, processes)
        time.sleep(0.05)
    processes[victim].send_signal(how)
    since, seconds = time.monotonic(), {}
    while len(seconds) < len(processes) and time.monotonic() - since < 3 * STOPPED_WITHIN:
        for i, process in enumerate(processes):
            if process.poll() is not None:
                seconds.setdefault(i, time.monotonic() - since)
        time.sleep(0.05)
    for process in processes:
        process.kill()
    statuses = [process.wait() for process in processes]
    after = [round(seconds.get(i, np.inf), 1) for i in range(len(statuses))]
    print(
        f"  {signal.Signals(how).name} to process {victim} of {len(processes)} at {pattern}: "
        f"statuses {statuses}, after {after} s",
        flush=True,
    )
    for i in range(len(processes)):
        told = re.findall(
            "^.*(?:error in process|stopped|Terminating process).*$",
            (folder / f"log.{i}").read_text(),
            re.MULTILINE,
        )
        print(f"    {i}: {told[-1][:150] if told else 'nothing'}")
    in_time = len(seconds) == len(processes) and max(seconds.values()) < STOPPED_WITHIN
    return in_time and (how != signal.SIGTERM or set(statuses) == {128 + signal.SIGTERM})


# Number of processes, what is waited for, which one is ended and how; then what is left is done.
LOSSES = (
    (2, "statistics/*.partial-*", 1, signal.SIGKILL),
    (2, "plans/0-*.json", 1, signal.SIGTERM),
    (4, "training/0/checkpoints/40", 1, signal.SIGTERM),
    (2, "training/0/checkpoints/1[0-9][0-9]", 1, signal.SIGKILL),
    (4, "training/1/checkpoints/40", 0, signal.SIGKILL),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="quickstart,slimmoe,lost")
    parser.add_argument("--processes", default="2,4", help="of the quickstarts")
    parser.add_argument("--folder", type=Path, help="keep the runs here; default: a temporary one")
    arguments = parser.parse_args()
    fine = True
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="processes_"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.parts.split(","):
        config = folder / f"{name}.py"
        config.write_text(CONFIG)
        config.with_suffix(".json").write_text(json.dumps(small_config(name, folder)))
        one, many = folder / f"{name}_1", folder / f"{name}_many"
        finish(folder, start(folder, config, 1, one))
        if name == "lost":
            print("one run, its processes lost again and again", flush=True)
            for number, pattern, victim, how in LOSSES:
                processes = start(folder, config, number, many)
                fine &= lose(folder, many, processes, pattern, victim, how)
            finish(folder, start(folder, config, 1, many))
            fine &= compare(name, one, many)
            continue
        for number in map(int, arguments.processes.split(",")):
            since = time.monotonic()
            finish(folder, start(folder, config, number, many))
            print(f"{name}, {number} processes, {time.monotonic() - since:.0f} s", flush=True)
            fine &= compare(name, one, many)
            shutil.rmtree(many)
    if arguments.folder is None:
        shutil.rmtree(folder)
    sys.exit(not fine)


if __name__ == "__main__":
    main()
