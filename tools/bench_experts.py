"""Times one Mixture-of-Experts layer against the machine's matmul peak and against torch.

    python tools/bench_experts.py [--repeats=10] [--shape=NAME]

Both sides get the same weights, tokens and routing, in float32. Measurements are taken in turn and
the best of each counts, so that other work on the machine disturbs them alike; on a busy machine
the CPU times (of all threads together) say more than the wall times, except that torch's threads
also count while they wait for each other, unless OMP_WAIT_POLICY=PASSIVE is set. ``layer`` includes
the router; ``experts`` is what follows it. Torch's side is ``transformers``' OlmoeExperts and
OlmoeSparseMoeBlock, with the eager implementation and with its grouped product.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from moe_jax.config import MoeConfig
from moe_jax.kinds import SoftmaxRouter
from moe_jax.model import BlockOptions
from moe_jax.model.moe import moe_layer, stored_index
from moe_jax.model.router import route
from moe_jax.ops.expert_mlp import expert_mlp
from moe_jax.ops.expert_rows import Experts, rows_of_groups

PEAK_SIZE = 2048


@dataclass(frozen=True)
class Shape:
    """E experts, K per token, D width, F expert width, T tokens."""

    num_experts: int
    experts_per_token: int
    width: int
    expert_width: int
    tokens: int

    @property
    def flops(self) -> int:
        """Of a forward pass through the experts."""
        return 6 * self.tokens * self.experts_per_token * self.width * self.expert_width


SHAPES = {
    "reference": Shape(64, 8, 512, 256, 4096),
    "olmoe_teacher": Shape(64, 8, 256, 40, 4096),
    "phimoe_teacher": Shape(16, 2, 256, 144, 4096),
    "few_rows": Shape(128, 8, 256, 128, 1024),
}
IMPLEMENTATIONS = ("eager", "grouped_mm")


@dataclass
class Timing:
    """Best wall and CPU time in ms, and the time of the first call, which compiles."""

    call: Callable[[], object]
    wall: float = float("inf")
    cpu: float = float("inf")
    first: float = 0.0

    def run(self) -> None:
        start, cpu_start = time.perf_counter(), time.process_time()
        self.call()
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        if not self.first:
            self.first = wall * 1e3
        else:
            self.wall, self.cpu = min(self.wall, wall * 1e3), min(self.cpu, cpu * 1e3)


def jax_call(function: Callable, *arguments) -> Callable[[], object]:
    jitted = jax.jit(function)
    return lambda: jax.block_until_ready(jitted(*arguments))


def jax_side(shape: Shape, weights: dict[str, np.ndarray]) -> dict[str, Callable[[], object]]:
    moe = MoeConfig(shape.num_experts, shape.experts_per_token, shape.expert_width)
    router = SoftmaxRouter()
    x = jnp.asarray(weights["x"])
    gate, up = np.split(weights["gate_up"], 2, axis=1)
    stacked = [jnp.asarray(w.swapaxes(1, 2)) for w in (gate, up, weights["down"])]
    params = {
        "router": {"kernel": jnp.asarray(weights["router"].T)},
        "experts": Experts(*stacked)._asdict(),
    }

    def layer(params, x):
        return moe_layer(params, moe, router, x, options=BlockOptions())[0]

    @jax.jit
    def routed(params, x):
        ids, slot_weights = route(x @ params["router"]["kernel"], moe.experts_per_token, router)
        return slot_weights, rows_of_groups(stored_index(moe, ids, None), moe.num_experts)

    slot_weights, rows = routed(params, x)

    def experts(x, slot_weights, experts, rows):
        return expert_mlp(x, slot_weights, (experts,), rows, keep=())[0]

    def loss(params, x):
        return layer(params, x).sum()

    square = jnp.ones((PEAK_SIZE, PEAK_SIZE))
    return {
        "peak": jax_call(jnp.dot, square, square),
        "experts": jax_call(experts, x, slot_weights, Experts(*stacked), rows),
        "layer": jax_call(layer, params, x),
        "forward_backward": jax_call(jax.grad(loss, argnums=(0, 1)), params, x),
    }


def torch_side(
    shape: Shape, weights: dict[str, np.ndarray], implementation: str
) -> dict[str, Callable[[], object]]:
    config = OlmoeConfig(
        hidden_size=shape.width,
        intermediate_size=shape.expert_width,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.experts_per_token,
        norm_topk_prob=False,
        experts_implementation=implementation,
    )
    block = OlmoeSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(torch.from_numpy(weights["router"]))
        block.experts.gate_up_proj.copy_(torch.from_numpy(weights["gate_up"]))
        block.experts.down_proj.copy_(torch.from_numpy(weights["down"]))
    x = torch.from_numpy(weights["x"])
    _, slot_weights, ids = (part.detach() for part in block.gate(x))
    tracked = x[None].clone().requires_grad_()

    def forward_backward():
        block.zero_grad()
        block(tracked).sum().backward()

    return {
        "experts": torch.no_grad()(lambda: block.experts(x, ids, slot_weights)),
        "layer": torch.no_grad()(lambda: block(x[None])),
        "forward_backward": forward_backward,
    }


def random_weights(shape: Shape) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    e, d, f = shape.num_experts, shape.width, shape.expert_width
    sizes = {
        "x": (shape.tokens, d),
        "router": (e, d),
        "gate_up": (e, 2 * f, d),
        "down": (e, d, f),
    }
    return {
        name: rng.normal(0, 1 if name == "x" else d**-0.5, size).astype(np.float32)
        for name, size in sizes.items()
    }


def bench(name: str, shape: Shape, repeats: int) -> None:
    weights = random_weights(shape)
    ours = {key: Timing(call) for key, call in jax_side(shape, weights).items()}
    theirs = {
        name: {key: Timing(call) for key, call in torch_side(shape, weights, name).items()}
        for name in IMPLEMENTATIONS
    }
    for _ in range(repeats + 1):
        for side in (ours, *theirs.values()):
            for timing in side.values():
                timing.run()
        gc.collect()
    peak = ours["peak"]
    peak_flops = 2 * PEAK_SIZE**3
    print(f"\n{name}: {shape}")
    print(
        f"float32 matmul peak {peak_flops / peak.wall / 1e6:.0f} GFLOP/s, "
        f"{peak_flops / peak.cpu / 1e6:.0f} per CPU second"
    )
    for key, passes in (("experts", 1), ("layer", 1), ("forward_backward", 3)):
        mine = ours[key]
        ratio = passes * shape.flops / peak_flops
        print(
            f"{key:17} moe_jax {mine.wall:7.1f} ms = {ratio * peak.wall / mine.wall:.2f} of peak, "
            f"CPU {mine.cpu:7.1f} ms = {ratio * peak.cpu / mine.cpu:.2f} | "
            f"first call (compiles) {mine.first / 1e3:.1f} s"
        )
        for implementation, side in theirs.items():
            other = side[key]
            print(
                f"{'':6} torch {implementation:10} {other.wall:7.1f} ms, CPU {other.cpu:7.1f} ms | "
                f"torch / moe_jax {other.wall / mine.wall:.2f}, CPU {other.cpu / mine.cpu:.2f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10, help="measurements of each")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="one shape; default: all")
    arguments = parser.parse_args()
    device, threads = jax.devices()[0].device_kind, torch.get_num_threads()
    print(f"jax {jax.__version__} on {device}, torch {torch.__version__} with {threads} threads")
    for name in [arguments.shape] if arguments.shape else SHAPES:
        bench(name, SHAPES[name], arguments.repeats)


if __name__ == "__main__":
    main()
