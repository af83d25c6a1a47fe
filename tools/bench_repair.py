"""Times the closed-form steps of one expert at real sizes, and the memory that they take.

    python tools/bench_repair.py [--neurons=6400] [--width=4096] [--tokens=4096] [--experts=16]

Random weights and correlated random activations, float32: accumulating second moments over
``--tokens`` routed tokens, choosing the order of removal (OBS), and solving for the repair at half
of the neurons. Beside each: floating-point operations per second of the step's matrix products as a
share of what one large matrix product reaches in the same run, and the share of the expert's own
forward pass over those tokens. Steps are per expert; the last column is for a layer of
``--experts``.
"""

from __future__ import annotations

import argparse
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.repair import removal_costs, repaired_down


def seconds(call, repeats: int = 2) -> float:
    """Best wall time after one call that compiles."""
    jax.block_until_ready(call())
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        best = min(best, time.perf_counter() - start)
    return best


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--neurons", type=int, default=6400)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=16)
    options = parser.parse_args()
    neurons, width, tokens = options.neurons, options.width, options.tokens
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((tokens, width), np.float32))
    gate, up = (
        jnp.asarray(rng.standard_normal((width, neurons), np.float32)) / width**0.5
        for _ in range(2)
    )
    down = jnp.asarray(rng.standard_normal((neurons, width), np.float32)) / neurons**0.5
    hidden = jax.nn.silu(x @ gate) * (x @ up)
    product = jax.jit(jnp.dot)
    square = jnp.asarray(rng.standard_normal((4096, 4096), np.float32))
    peak = 2 * 4096**3 / seconds(lambda: product(square, square))
    print(f"matrix product: {peak / 1e9:.0f} GFLOP/s; memory before: {peak_gib():.1f} GiB")

    forward = jax.jit(lambda x: (jax.nn.silu(x @ gate) * (x @ up)) @ down)
    moments = jax.jit(lambda h: h.T @ h)
    gram = moments(hidden)
    kept = jnp.arange(neurons) % 2 == 0
    steps = {
        "expert's forward pass": (6 * tokens * width * neurons, lambda: forward(x)),
        "second moments": (2 * tokens * neurons**2, lambda: moments(hidden)),
        # The inverse, the products of the rows, and three updates of both matrices.
        "removal costs (OBS)": (
            2 * neurons**3 + 2 * neurons**2 * width + 6 * neurons**3,
            lambda: removal_costs(gram, down),
        ),
        "repair": (
            neurons**3 / 3 + 4 * neurons**2 * width,
            lambda: repaired_down(gram, down, kept),
        ),
    }
    base = 0.0
    for name, (operations, call) in steps.items():
        spent = seconds(call)
        base = base or spent
        print(
            f"{name:22} {spent:7.2f} s  {operations / spent / peak:5.2f} of a matrix product  "
            f"{spent / base:6.2f} x forward  peak memory {peak_gib():.1f} GiB  "
            f"layer of {options.experts}: {spent * options.experts:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
