"""Programs that a signal ends: their status, what they say, and that they end at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A program whose compilation takes longer than any test has patience for.
COMPILING = """
import sys
import jax
import jax.numpy as jnp
from moe_jax import cli

def main(_):
    def f(x):
        for i in range(300):
            x = jnp.sin(x @ x) + jnp.roll(x, i) * jnp.cumsum(x, 0) @ jnp.sort(x, 1)
        return x

    print("begun")
    try:
        lowered = jax.jit(f).lower(jnp.ones((8, 8)))
        print("compiling", file=sys.stderr, flush=True)
        lowered.compile()
    finally:
        print("cleaned up", file=sys.stderr, flush=True)

cli.run(main)
"""
SLEEPING = """
import sys, time
from moe_jax import cli

def main(_):
    print("begun")
    try:
        print("compiling", file=sys.stderr, flush=True)
        time.sleep(600)
    finally:
        print("cleaned up", file=sys.stderr, flush=True)

cli.run(main)
"""
# Python drops what is raised in such a callback.
COLLECTING = """
import gc, signal, sys
from moe_jax import cli

def main(_):
    first = iter([True])
    gc.callbacks.append(lambda *_: next(first, None) and signal.raise_signal(signal.SIGTERM))
    gc.collect()
    print("compiling", file=sys.stderr, flush=True)
    while True:
        signal.pause()

cli.run(main)
"""


def ended(program: str, number: signal.Signals, seconds: float) -> tuple[int, str, str]:
    """Status, standard output and error of a program that gets a signal while it works."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # or it would be compiled already
    # SIGINT is ignored where this was started from a background job.
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr.readline() == "compiling\n"
    time.sleep(seconds)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("number", "status", "line"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "stopped; run it again to go on"),
    ],
)
def test_a_signal_has_its_own_status(number, status, line):
    assert ended(SLEEPING, number, 0) == (status, "begun\n", f"cleaned up\n{line}\n")


def test_a_signal_in_a_garbage_collection_is_not_lost():
    assert ended(COLLECTING, signal.SIGCONT, 0)[0] == 143


def test_an_interrupt_during_a_compilation_ends_the_program():
    """With its status and its output, where Python alone ends in a segmentation fault."""
    status, out, err = ended(COMPILING, signal.SIGINT, 1)
    assert status == 130, err
    assert out == "begun\n"
    assert err.endswith("interrupted\n")
