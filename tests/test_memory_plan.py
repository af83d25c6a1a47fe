"""What a run takes is known before weights are read: against real arrays and closed forms."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from models import tiny_config
from public_models import PUBLIC

from moe_jax.calibrate.gradients import Objective, mask_gradients
from moe_jax.calibrate.sums import batch_sums
from moe_jax.distill.step import initial_state
from moe_jax.hf.config_export import export_config
from moe_jax.hf.config_import import model_config
from moe_jax.model import init_params
from moe_jax.params import abstract_params, leaves_with_path
from moe_jax.processes import make_mesh, place_batch, spec_tree
from moe_jax.run.compiled_memory import Step
from moe_jax.run.config import RunConfig
from moe_jax.run.devices import parse_bytes
from moe_jax.run.memory_plan import MemoryPlan, Phase
from moe_jax.settings import CalibrationConfig

PODS = Path(__file__).parents[1] / "configs" / "pods"
# With a mesh of 8 devices in the place of their own.
POD_MODELS = {
    "qwen3_30b_a3b_one_machine": ("qwen3_30b_a3b", {}),
    "phi_3_5_moe_8x80gb": ("phi_3_5_moe", {"tensor": 8}),
    "deepseek_v3_512_chips": ("deepseek_v3", {"fsdp": 4, "tensor": 2}),
}
SLICED = (
    "count", "stored_count", "routing_mass", "soft_count", "output_gram", "output_mean",
    "output_m2", "output_norm", "output_peak", "gated_norm", "gated_square",
)  # fmt: skip
TEXT = {"files": ("a.txt",), "num_sequences": 8, "seq_len": 16, "batch_size": 4}
TRAIN = {"files": ("a.txt",), "seq_len": 16}
STAGE = {"method": "token_fisher", "expert_width": 4, "distill": {"steps": 2, "loss": "kd_full"}}


def planned(mesh: dict[str, int]) -> MemoryPlan:
    config = tiny_config("qwen3_moe", vocab_size=64)
    raw = {"model": "m", "output": "o", "calibration": TEXT, "training": TRAIN}
    run = RunConfig.from_dict({**raw, "stages": (STAGE,), "mesh": mesh})
    return MemoryPlan(run, (config, *run.check_against(config)), "float32", "float32")


def on_first_device(arrays) -> int:
    """Bytes that the arrays take there."""
    shards = (shard for array in jax.tree.leaves(arrays) for shard in array.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tensor": 2}])
def test_weights_optimizer_and_statistics_are_what_lives_on_a_device(sizes):
    plan = planned(sizes)
    calibrate, _, gradients, distil = plan.phases()
    model, student = plan.models
    mesh = make_mesh(sizes) if sizes else None
    weights = init_params(model, jax.random.key(0))
    small = init_params(student, jax.random.key(0))
    if mesh is not None:
        weights = jax.device_put(weights, spec_tree(model, mesh))
        small = jax.device_put(small, spec_tree(student, mesh))
    assert calibrate.weights == gradients.weights == on_first_device(weights)

    settings = plan.run.stages[0].distill
    assert settings is not None
    state, _ = initial_state(small, student, settings)
    assert distil.optimizer + distil.gradients == on_first_device(state)
    assert distil.weights == on_first_device((weights, small, state["params"]))

    batch = {"tokens": jnp.ones((4, 16), jnp.int32), "mask": jnp.ones((4, 16), bool)}
    sums = batch_sums(weights, model, place_batch(batch, mesh), "auto")
    objective = Objective(model, model, "lm", 8, "auto")
    more = jax.eval_shape(
        lambda: mask_gradients(weights, weights, batch, jax.random.key(0), objective)
    )
    kept = [sums[0][i][name] for i in sums[0] for name in SLICED]
    kept += [a for layer in more[0].values() for n, a in layer.items() if n.startswith("expert_")]
    # Where they lie on a mesh is left to the compiler: each device is taken to have all.
    whole, slices = (
        4 * sum(a.size for a in jax.tree.leaves(tree)) for tree in ((sums, more), kept)
    )
    assert plan.slices == 2
    assert calibrate.statistics == 2 * whole + plan.slices * slices


@pytest.mark.parametrize("pod", POD_MODELS)
def test_a_pod_compiles_and_one_more_layer_of_a_kind_takes_as_much_as_the_last(pod):
    name, mesh = POD_MODELS[pod]
    model = model_config(PUBLIC[name].hf)
    raw = runpy.run_path(str(PODS / f"{pod}.py"))["get_config"]().to_dict()
    if "mode" not in CalibrationConfig.__dataclass_fields__:
        raw["calibration"].pop("mode", None)
    raw["calibration"]["batch_size"], raw["calibration"]["seq_len"] = 8, 64
    run = RunConfig.from_dict({**raw, "mesh": mesh})
    plan = MemoryPlan(run, (model, *run.check_against(model)), "bfloat16", "bfloat16")
    parts = {letter: mesh.get("tensor", 1) for letter in "VNGFMU"} | {"D": mesh.get("fsdp", 1)}
    each = [
        leaf.size
        * (4 if leaf.exact else 2)
        // math.prod(parts.get(letter, 1) for letter in leaf.axes)
        for _, leaf in leaves_with_path(abstract_params(model))
    ]
    assert plan.weights(model) == sum(each)

    step = next(plan.phases()).step
    shallow = step.shortened({step.kinds[0]: 1} | {step.kinds[-1]: 3})
    step = Step(shallow, step.lower)
    devices = make_mesh(mesh) if mesh else None
    found, whole = (step._replace(base=n).temporaries(devices) for n in (1, 3))
    assert found == pytest.approx(whole, rel=0.01)


def test_kinds_of_layers_are_counted_and_extrapolated_apart():
    config = tiny_config("qwen3_moe")
    moe, dense, _ = config.layers
    deep = dataclasses.replace(config, layers=(dense, dense, dense, *[moe] * 5))
    sizes = {dense: 10, moe: 3}

    class Lowered(int):
        compile = memory_analysis = lambda self: self
        temp_size_in_bytes = property(int)

    step = Step((deep,), lambda models, _: Lowered(7 + sum(sizes[i] for i in models[0].layers)))
    assert step.temporaries(None) == 7 + 3 * 10 + 5 * 3
    assert [len(m.layers) for m in step.shortened({(dense,): 1, (moe,): 2})] == [3]


def test_totals_count_gradients_among_temporaries():
    phase = Phase("x", Step((), lambda *_: None), 100, 10, gradients=20, temporaries=50)
    assert phase.total == 160
    assert dataclasses.replace(phase, temporaries=None).total == 130


@pytest.mark.parametrize(("text", "size"), [("80GB", 80e9), ("1.5 tb", 1.5e12), ("512", 512.0)])
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size
    for wrong in ("GB", "-1GB", "80GiB"):
        with pytest.raises(ValueError, match="must be a number"):
            parse_bytes(wrong)


def test_the_command_plans_and_proposes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(export_config(tiny_config())))
    cut = {"method": "reap", "keep_ratio": 0.5}
    raw = {"model": str(tmp_path / "config.json"), "output": "o", "calibration": TEXT}
    body = f"from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({raw!r} | "
    (tmp_path / "c.py").write_text(body + f"dict(stages=({cut!r},)))\n")
    command = [sys.executable, "-m", "moe_jax.inspect", f"--config={tmp_path}/c.py"]
    more = ["--device_memory=100MB", "--devices=2"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "stage 0: calibrate" in done.stdout
    assert "of 100 MB: fits" in done.stdout
    assert "proposal: mesh {'data': 2}, calibration.batch_size = 16" in done.stdout
