"""Compiles the steps of configs/pods at their full depth, against what two depths foretell.

    python tools/check_memory_plan.py [--pods=phi_3_5_moe_8x80gb] [--phases=calibrate,evaluate]

Prints both for every step and ends with status 1 where they differ by more than 2%. Nothing is
allocated; a full depth of 61 layers on 512 simulated devices takes most of an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from moe_jax.hf.config_import import model_config
from moe_jax.run.compiled_memory import temporaries
from moe_jax.run.config import RunConfig
from moe_jax.run.memory_plan import MemoryPlan
from moe_jax.text import byte_size

ROOT = Path(__file__).parents[1]
MODELS = {
    "qwen3_30b_a3b_one_machine": "qwen3_30b_a3b",
    "phi_3_5_moe_8x80gb": "phi_3_5_moe",
    "deepseek_v3_512_chips": "deepseek_v3",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", default=",".join(MODELS))
    parser.add_argument("--phases", default="", help="words in their names; empty: all")
    arguments = parser.parse_args()
    public = runpy.run_path(str(ROOT / "tests" / "public_models.py"))["PUBLIC"]
    worst = 0.0
    for pod in arguments.pods.split(","):
        raw = runpy.run_path(str(ROOT / "configs" / "pods" / f"{pod}.py"))["get_config"]()
        run = RunConfig.from_dict(raw.to_dict())
        model = model_config(public[MODELS[pod]].hf)
        models = (model, *run.check_against(model))
        plan = MemoryPlan(run, models, run.dtype, run.dtype, memory=80e9)
        phases = {phase.name: phase.step for phase in plan.phases()}
        for name, step in phases.items():
            words = arguments.phases.split(",")
            if name.endswith("depths") or not any(word in name for word in words):
                continue
            depth = max(model.num_layers for model in models)
            steps = {"foretold": step, "whole": step._replace(base=depth)}
            end = phases.get(name.replace("calibrate", "compare depths"), step)
            found, _ = temporaries({**steps, "end": end}, plan.mesh.shape)
            found["foretold"] = max(found["foretold"], found.pop("end"))
            error = abs(found["foretold"] / found["whole"] - 1)
            sizes = ", ".join(f"{key} {byte_size(size)}" for key, size in found.items())
            print(f"{pod}: {name}: {sizes}, apart by {error:.2%}", flush=True)
            worst = max(worst, error)
    return int(worst > 0.02)


if __name__ == "__main__":
    sys.exit(main())
