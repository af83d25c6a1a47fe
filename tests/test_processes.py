"""Weights and batches on a mesh, as on one device, and what processes do together."""

import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from models import tiny_config, tiny_model, token_batches
from safetensors.numpy import load_file
from tiny_run import save_model, save_text, settings

from moe_jax import apply_plan, calibrate, forward, init_params
from moe_jax.compress import compress
from moe_jax.config import LayerConfig, ModelConfig, MoeConfig
from moe_jax.data.evaluation import EvaluationWindows, TextSize
from moe_jax.evaluate import evaluate
from moe_jax.kinds import GroupedQueryAttention, SoftmaxRouter
from moe_jax.model.generate import generate
from moe_jax.params import Leaf, abstract_params, leaves_with_path
from moe_jax.plan import Cut, LayerPlan, Plan, plan_cut
from moe_jax.processes import (
    MESH_AXES,
    agree,
    any_of,
    barrier,
    gather,
    initialise,
    is_writer,
    leaf_shardings,
    make_mesh,
    mesh_of,
    place_batch,
    spec_tree,
)
from moe_jax.run.config import RunConfig

CONFIG = ModelConfig(
    family="olmoe",
    vocab_size=64,
    width=16,
    attention=GroupedQueryAttention(8, qk_norm="full"),
    layers=(LayerConfig(4, 2, MoeConfig(8, 2, 8)),),
    router=SoftmaxRouter(renormalize=True),
    init_std=0.3,
)


def test_axes_left_out_have_size_one():
    mesh = make_mesh({"expert": 4})
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "expert": 4, "tensor": 1}


def test_minus_one_takes_the_remaining_devices():
    assert make_mesh({"fsdp": 2, "tensor": -1}).shape["tensor"] == jax.device_count() // 2
    assert make_mesh().shape["data"] == jax.device_count()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"model": 2}, "model"),
        ({"fsdp": 0}, "positive"),
        ({"fsdp": -1, "tensor": -1}, "at most one"),
        ({"fsdp": 64}, "64"),
        ({"fsdp": 3, "tensor": -1}, "divide"),
    ],
)
def test_impossible_mesh(shape, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(shape)


def test_rules():
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    leaves = {
        "gate": Leaf((8, 16, 8), "EDF", "experts"),
        "constant": Leaf((3, 16), "CD", "novices"),
    }
    found = leaf_shardings(leaves, mesh)
    assert found["gate"].spec == PartitionSpec("expert", "fsdp", "tensor")
    assert found["constant"].spec == PartitionSpec(None, "fsdp")


def test_spec_tree_is_shaped_as_the_weights():
    specs = spec_tree(CONFIG, make_mesh({"expert": 2}))
    paths = [path for path, _ in leaves_with_path(abstract_params(CONFIG))]
    assert [path for path, _ in leaves_with_path(specs)] == paths
    assert all(isinstance(leaf, NamedSharding) for leaf in jax.tree.leaves(specs))


def test_dimension_that_does_not_divide_names_leaf_axes_and_numbers():
    mesh = make_mesh({"tensor": 4})
    with pytest.raises(
        ValueError, match=r"layers\.0\.attention\.key\.kernel: axis G \(.*'tensor'.* 2 "
    ):
        spec_tree(CONFIG, mesh)
    leaves = {"bias": Leaf((12,), "E", "experts")}
    with pytest.raises(ValueError, match=r"axis E .*'expert'.*12 over 8 devices, remainder 4"):
        leaf_shardings(leaves, make_mesh({"expert": 8}))


@pytest.mark.parametrize(
    "shape",
    [
        {"data": 2, "expert": 4},
        {"fsdp": 2, "expert": 2, "tensor": 2},
        {"data": 4, "tensor": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("split_tokens", [True, False], ids=["tokens split", "tokens whole"])
def test_sharded_forward_equals_one_device(shape, split_tokens):
    params = init_params(CONFIG, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 16), 1, CONFIG.vocab_size)
    segment_ids = jnp.ones_like(tokens).at[0, 10:].set(0).at[1, 7:].set(2)
    step = jax.jit(lambda params, tokens, ids: forward(params, CONFIG, tokens, ids)[0])
    expected = np.asarray(step(params, tokens, segment_ids))
    mesh = make_mesh(shape)
    sharded = jax.device_put(params, spec_tree(CONFIG, mesh))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    if split_tokens:
        tokens, segment_ids = jax.device_put((tokens, segment_ids), rows)
    got = step(sharded, tokens, segment_ids)
    assert len(got.sharding.device_set) == mesh.size
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_batch_lies_where_its_weights_do():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    params = {"scale": jax.device_put(np.zeros(4), NamedSharding(mesh, PartitionSpec("fsdp")))}
    assert mesh_of(params) == mesh
    batch = {"tokens": np.arange(8).reshape(4, 2), "mask": np.ones((4, 2), bool)}
    placed = place_batch(batch, mesh_of(params))
    assert placed["tokens"].sharding.spec == PartitionSpec(("data", "fsdp"))
    jax.tree.map(np.testing.assert_array_equal, gather(placed), batch)
    assert place_batch(batch, None)["tokens"] is batch["tokens"]
    assert mesh_of({"scale": np.zeros(4)}) is mesh_of({"scale": jnp.zeros(4)}) is None
    with pytest.raises(ValueError, match="data x fsdp = 4, got 6, remainder 2"):
        place_batch({"tokens": np.zeros((6, 2))}, mesh)


def test_one_process_is_all_there_is():
    initialise()
    initialise("localhost:1", 1, 0)
    assert is_writer()
    barrier("nobody else")
    assert agree(True) is True
    assert agree({"a": 2**60}) == {"a": 2**60}
    assert any_of(True)
    assert not any_of(False)


PROGRAM = """
import sys
import jax, numpy as np
from moe_jax.processes import (
    agree, any_of, barrier, gather, initialise, is_writer, make_mesh, place_batch
)
port, index = sys.argv[1:]
if port != "0":
    initialise(f"localhost:{port}", 2, int(index))
else:
    initialise()
assert jax.process_count() == 2 and jax.device_count() == 4
assert is_writer() == (index == "0")
assert agree(2**40 + int(index)) == 2**40
assert agree("none" if index == "0" else {"another": "value"}) == "none"
assert any_of(index == "1") and not any_of(False)
rows = np.arange(8).reshape(4, 2)
for shape in ({"data": 4}, {"data": 2, "expert": 2}, {"expert": 4}):
    placed = place_batch({"tokens": rows}, make_mesh(shape))["tokens"]
    assert not placed.is_fully_addressable
    np.testing.assert_array_equal(gather(placed), rows)
barrier("the end")
print("agreed")
"""


def run_both(commands: list[list[str]], environments: list[dict[str, str]]) -> list[str]:
    """What two processes of Python print, which must end well."""
    both = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, environment in zip(commands, environments, strict=True)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(outputs)
    return outputs


def meeting() -> list[dict[str, str]]:
    """What tells two processes of each other."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    return [
        {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        for index in range(2)
    ]


def test_two_processes_agree():
    """One is told whom to meet by arguments, the other by its environment."""
    told = meeting()
    port = told[0]["JAX_COORDINATOR_ADDRESS"].split(":")[1]
    devices = {"JAX_NUM_CPU_DEVICES": "2"}
    commands = [["-c", PROGRAM, port, "0"], ["-c", PROGRAM, "0", "1"]]
    assert all("agreed" in text for text in run_both(commands, [devices, devices | told[1]]))


CONFIG_FILE = """
import json
from pathlib import Path
from ml_collections import ConfigDict

def get_config():
    config = json.loads(Path(__file__).with_suffix(".json").read_text())
    return ConfigDict(config | {"stages": tuple(config["stages"])})
"""


@pytest.mark.slow
def test_two_processes_compress_as_one_does(tmp_path):
    """Weights and batches lie on both: plan, losses and export are those of one process."""
    save_model(tmp_path / "model", num_hidden_layers=1)
    training = {"files": [save_text(tmp_path, "training", 20)], "seq_len": 16, "batch_size": 2}
    config = settings(
        tmp_path,
        {"method": "mone", "keep_experts": 2, "distill": {"steps": 2}},
        training=training | {"cache_dir": str(tmp_path / "tokens")},
        dtype="float32",
    )
    expected, _ = compress(RunConfig.from_dict(config))
    (tmp_path / "run.py").write_text(CONFIG_FILE)
    changes = {"output": str(tmp_path / "two"), "mesh": {"fsdp": 2}}
    (tmp_path / "run.json").write_text(json.dumps(config | changes))
    command = ["-m", "moe_jax.compress", f"--config={tmp_path}/run.py"]
    environments = [{"JAX_NUM_CPU_DEVICES": "1"} | told for told in meeting()]
    first, second = run_both([command, command], environments)
    assert "report.html" in first
    assert "report.html" not in second
    plans = [next((tmp_path / name / "plans").iterdir()).read_bytes() for name in ("out", "two")]
    assert plans[0] == plans[1]
    report = json.loads((tmp_path / "two/report.json").read_text())
    for name in ("before", "after"):
        nll = [found[name]["evaluation"]["total"]["nll"] for found in (expected, report)]
        assert nll[0] == pytest.approx(nll[1], rel=1e-5)
    one, two = (load_file(tmp_path / name / "model/model.safetensors") for name in ("out", "two"))
    for name in one.keys() | two.keys():
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5)


def on_mesh(family="olmoe"):
    """A tiny model on one device and on eight."""
    params, config = tiny_model(family)
    mesh = make_mesh({"data": 2, "fsdp": 2, "expert": 2})
    return params, jax.device_put(params, spec_tree(config, mesh)), config


def test_sharded_evaluation_equals_one_device():
    params, sharded, config = on_mesh()
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 4, 13), np.int32)
    batches = [
        {
            "tokens": rows[:, :-1],
            "targets": rows[:, 1:],
            "segment_ids": np.ones((4, 12), np.int32),
            "mask": np.arange(12) < np.array([[12], [7], [12], [3]]),
        }
        for rows in tokens
    ]
    text = EvaluationWindows({"a": TextSize(100, 68, 8)}, batches, np.zeros(8, int))
    one, eight = (
        evaluate(model, config, text, reference=(model, config), with_speed=False)
        for model in (params, sharded)
    )
    assert one.domains["a"].nll == pytest.approx(eight.domains["a"].nll, rel=1e-5)
    assert eight.domains["a"].top1_agreement == 1


@pytest.mark.parametrize("shape", [{"fsdp": 2, "expert": 2}, {"data": 2, "tensor": 2}], ids=str)
def test_sharded_cut_equals_one_device(shape):
    """Second moments, costs, plan, repaired weights and generated tokens."""
    layer = LayerConfig(2, 2, MoeConfig(6, 2, 8))
    config = tiny_config("olmoe", vocab_size=64, layers=(layer,))
    params = init_params(config, jax.random.key(1))
    mesh = make_mesh(shape)
    cut = Cut("obs", expert_width=4)
    found = []
    for model in (params, jax.device_put(params, spec_tree(config, mesh))):
        stats = calibrate(model, config, token_batches(1), second_moments=True, warn=False)
        planned = plan_cut(cut, stats, config, params=model)
        _, small = apply_plan(model, config, planned.plan, stats)
        tokens = generate(model, config, [[1, 2, 3], [4]], 3)
        found.append((planned.plan, tokens, (planned.scores, small)))
    (plan, tokens, one), (same_plan, same_tokens, many) = found
    assert (plan, tokens) == (same_plan, same_tokens)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        # Where neurons of an expert are alike, the condition of its second moments is large.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(a).max())


def test_a_cut_that_a_mesh_does_not_divide_is_refused():
    params, config = tiny_model("olmoe")
    sharded = jax.device_put(params, spec_tree(config, make_mesh({"expert": 2})))
    plan = Plan({0: LayerPlan(deleted=(1,))})
    with pytest.raises(ValueError, match=r"axis E .*'expert', got 5 over 2 devices, remainder 1"):
        apply_plan(sharded, config, plan)
