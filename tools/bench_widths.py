"""Times a layer whose experts differ in width against one of equal width and against the original.

    python tools/bench_widths.py [--repeats=10]

Random weights, float32; measurements are taken in turn, and the best of each counts. All smaller
layers hold the same number of neurons, half of the original's: ``one width`` in equal shares,
``buckets`` in four widths of equally many experts, ``padded`` the same experts filled up with zeros
to the widest, which is what a format of one width has to store.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import MoeConfig
from moe_jax.kinds import SoftmaxRouter
from moe_jax.model import BlockOptions
from moe_jax.model.moe import moe_layer

# Experts, chosen per token, model width, expert width, tokens.
SHAPES = {
    "64 narrow experts": (64, 8, 512, 256, 4096),
    "16 wide experts": (16, 2, 512, 1024, 4096),
}


def layers(experts: int, chosen: int, width: int) -> dict[str, MoeConfig]:
    shares = (7 / 8, 5 / 8, 3 / 8, 1 / 8)  # half of the neurons on average
    widths = tuple(int(width * share) for share in shares) * (experts // len(shares))
    return {
        "original": MoeConfig(experts, chosen, width),
        "one width": MoeConfig(experts, chosen, width // 2),
        "buckets": MoeConfig(experts, chosen, max(widths), expert_widths=widths),
        "padded": MoeConfig(experts, chosen, max(widths)),
    }


def random_params(moe: MoeConfig, width: int) -> dict:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(0, width**-0.5, shape), jnp.float32)

    buckets = [
        {
            "gate": normal(len(ids), width, neurons),
            "up": normal(len(ids), width, neurons),
            "down": normal(len(ids), neurons, width),
        }
        for neurons, ids in moe.buckets
    ]
    router = {"kernel": normal(width, moe.num_experts)}
    return {"router": router, "experts": buckets if moe.expert_widths else buckets[0]}


def calls(moe: MoeConfig, width: int, x) -> dict[str, Callable[[], object]]:
    params = random_params(moe, width)

    def layer(params, x):
        return moe_layer(params, moe, SoftmaxRouter(), x, options=BlockOptions())[0]

    forward = jax.jit(layer)
    gradient = jax.jit(jax.grad(lambda params, x: layer(params, x).sum(), argnums=(0, 1)))
    return {"forward": lambda: forward(params, x), "gradient": lambda: gradient(params, x)}


def bench(name: str, shape: tuple[int, ...], repeats: int) -> None:
    experts, chosen, width, neurons, tokens = shape
    x = jnp.asarray(np.random.default_rng(1).normal(size=(tokens, width)), jnp.float32)
    every = {kind: calls(moe, width, x) for kind, moe in layers(experts, chosen, neurons).items()}
    best = {(kind, call): float("inf") for kind in every for call in every[kind]}
    for _ in range(repeats + 1):  # the first round compiles
        for kind, call in best:
            start = time.perf_counter()
            jax.block_until_ready(every[kind][call]())
            best[kind, call] = min(best[kind, call], time.perf_counter() - start)
    print(f"{name}: E={experts} K={chosen} D={width} F={neurons}, {tokens} tokens")
    for kind in every:
        found = {call: (best[kind, call], best["original", call]) for call in every[kind]}
        cells = [
            f"{call} {1e3 * own:.0f} ms ({own / first:.2f})" for call, (own, first) in found.items()
        ]
        print(f"  {kind:10}", ", ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10, help="measurements of each")
    options = parser.parse_args()
    for name, shape in SHAPES.items():
        bench(name, shape, options.repeats)


if __name__ == "__main__":
    main()
