"""Every jitted step is lowered, from this host, for machines that it does not have."""

import pytest
from lowered_steps import MESHES, MODELS, ROUTED, lowered, steps_of

from moe_jax.processes import make_mesh


@pytest.mark.parametrize(
    ("platform", "model", "mesh"), [("cuda", "everything", "one"), ("tpu", "uniform", "2x2x2")]
)
def test_steps_are_lowered_with_the_platforms_own_products(platform, model, mesh):
    devices = MESHES[mesh] and make_mesh(MESHES[mesh])
    steps = steps_of(MODELS[model], devices)
    for name, step in steps.items():
        text, number = lowered(step, platform)
        assert ("chlo.ragged_dot" in text) == (platform == "tpu" and name in ROUTED), name
        if devices is not None and name in ROUTED:
            assert number == devices.size, name
    # The loops over groups and their blocks, which are the CPU's.
    on_cpu, there = (lowered(steps["layer output"], p)[0] for p in ("cpu", platform))
    assert on_cpu.count("stablehlo.while") > there.count("stablehlo.while") + 1
