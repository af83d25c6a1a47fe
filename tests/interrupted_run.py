"""A run that is ended again and again at random moments, until one is let through.

    python interrupted_run.py RUN.json ENDS SEED [PATTERN ...]

Each attempt is a fork of this process, so that imports are paid for once. First, for each pattern,
one is killed as soon as the output folder has a matching file; then ends at random moments follow,
SIGKILL and SIGINT in turn. After each the output folder is checked: what has a final name is whole.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from moe_jax.compress import compress
from moe_jax.hf import load_hf
from moe_jax.plan import read_plan
from moe_jax.run.config import RunConfig
from moe_jax.statistics import Stats


def attempt(run: RunConfig, seconds: float, how: signal.Signals | None, pattern: str = "") -> int:
    """Runs in a child that is sent ``how`` some ``seconds`` after ``pattern``; its exit status."""
    child = os.fork()
    if child == 0:
        # Ignored where this was started from a background job.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            compress(run)
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    deadline = None if pattern else time.monotonic() + seconds
    while how is None or deadline is None or time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if deadline is None and any(Path(run.output).glob(pattern)):
            deadline = time.monotonic() + seconds
        time.sleep(0.001)
    os.kill(child, how)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check_whole(output: Path) -> None:
    """Raises if something with a final name cannot be read; loads no model in this process."""
    for file in output.glob("statistics/[!.]*.npz"):
        Stats.load(file)
    for file in output.glob("plans/[!.]*"):
        read_plan(file)
    for file in [*output.glob("[!.]*.json"), *output.glob("*/[!.]*.json")]:
        json.loads(file.read_text())


def main() -> None:
    run = RunConfig.from_dict(json.loads(Path(sys.argv[1]).read_text()))
    rng = random.Random(int(sys.argv[3]))
    statuses = []
    for pattern in sys.argv[4:]:
        statuses.append(attempt(run, rng.uniform(0, 0.1), signal.SIGKILL, pattern))
        check_whole(Path(run.output))
    for n in range(int(sys.argv[2])):
        how = (signal.SIGKILL, signal.SIGINT)[n % 2]
        statuses.append(attempt(run, rng.uniform(0.2, 3), how))
        check_whole(Path(run.output))
        if statuses[-1] == 0:  # the end came too late: start afresh
            shutil.rmtree(run.output)
    last = attempt(run, 0, None)
    check_whole(Path(run.output))
    if last == 0:
        load_hf(Path(run.output) / "model")
    print(json.dumps([*statuses, last]))


if __name__ == "__main__":
    main()
