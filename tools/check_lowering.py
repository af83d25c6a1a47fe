"""Lowers every jitted step for machines that are not here, and prints what each takes.

    python tools/check_lowering.py

One line for each step of two tiny models, on one device and on meshes of eight, for GPUs (cuda and
rocm) and TPUs: the lines of its StableHLO, the loops in it, and the grouped products by
``ragged_dot``. A step that cannot be lowered ends the program. Takes about two minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import conftest  # noqa: E402, F401, eight host devices
from lowered_steps import MODELS, lowered, steps_of  # noqa: E402

from moe_jax.processes import make_mesh  # noqa: E402

PLATFORMS = ("cuda", "rocm", "tpu")
MESHES = (None, {"data": 2, "fsdp": 2, "expert": 2}, {"fsdp": 2, "expert": 2, "tensor": 2})


def main() -> None:
    for name, config in MODELS.items():
        for shape in MESHES:
            steps = steps_of(config, shape and make_mesh(shape))
            print(f"\n{name} on {shape or 'one device'}: lines, loops, ragged products")
            for step_name, step in steps.items():
                counts = []
                for platform in PLATFORMS:
                    text, _ = lowered(step, platform)
                    numbers = (text.count(part) for part in ("\n", "stablehlo.while", "ragged_dot"))
                    counts.append(f"{platform} {' '.join(f'{n:6,}' for n in numbers)}")
                print(f"  {step_name:18}", *counts, sep="  ", flush=True)


if __name__ == "__main__":
    main()
