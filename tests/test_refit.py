"""Refit of a cut layer against the joint least squares in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import EXPERT_WIDTH, EXPERTS, tiny_config, token_batches
from test_compress import finished_work
from tiny_run import make_run, save_model

from moe_jax import load_hf
from moe_jax.compress import compress
from moe_jax.config import SharedExpert
from moe_jax.model import forward, init_params
from moe_jax.params import Model
from moe_jax.plan import Cut, LayerPlan, Plan
from moe_jax.processes import make_mesh, spec_tree
from moe_jax.prune import apply_plan, refit

RIDGE = 1e-2
_forward = jax.jit(forward, static_argnums=(1, 4))
BATCHES = token_batches(4, batch=4, length=16)


def _original(shared: SharedExpert | None = None, bias: bool = False) -> Model:
    config = tiny_config("qwen3_moe", vocab_size=64)
    for i in config.moe_layers:
        config = config.replace_moe(i, shared=shared, expert_bias=bias)
    return Model(init_params(config, jax.random.key(5)), config)


def _cut(original: Model, **changes) -> Model:
    """Half of every expert's neurons stay, unless ``changes`` says otherwise."""
    half = {e: tuple(range(e % 2, EXPERT_WIDTH, 2)) for e in range(EXPERTS)}
    layers = {i: LayerPlan(**{"neurons": half, **changes}) for i in original.config.moe_layers}
    config, params = apply_plan(*original, Plan(layers))
    return Model(params, config)


def _joint(original: Model, cut: Model, i: int) -> dict[str, np.ndarray]:
    """The definition, in float64: one system of all features of layer ``i``."""
    taps = ("feed_forward_input", "feed_forward_output")
    features, targets = [], []
    moe = cut.config.moe(i)
    experts = jax.tree.map(lambda w: np.asarray(w, np.float64), cut.params["layers"][i]["moe"])
    for batch in BATCHES:
        segments = jnp.asarray(batch["mask"], jnp.int32)
        _, aux = _forward(*original, batch["tokens"], segments, taps)
        valid = batch["mask"].reshape(-1)
        x, y = (
            np.asarray(aux["layers"][i][tap], np.float64).reshape(len(valid), -1)[valid]
            for tap in taps
        )
        logits = x @ experts["router"]["kernel"]
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        odds /= odds.sum(-1, keepdims=True)
        chosen = np.argsort(-odds, axis=-1)[:, : moe.experts_per_token]
        weight = np.zeros_like(odds)
        np.put_along_axis(weight, chosen, np.take_along_axis(odds, chosen, -1), -1)
        parts = []
        if moe.shared:
            hidden = _hidden(experts["shared"], x)
            if moe.shared.gated:
                gate = x @ experts["shared"]["output_gate"]["kernel"]
                hidden = hidden / (1 + np.exp(-gate))[:, None]
            parts.append(hidden)
        for row, e in enumerate(moe.expert_ids):
            own = {n: experts["experts"][n][row] for n in ("gate", "up")}
            parts.append(_hidden(own, x) * weight[:, e, None])
            if moe.expert_bias:
                parts.append(weight[:, e, None])
        parts += [weight[:, e, None] for e in moe.novice_ids]
        features.append(np.concatenate(parts, 1))
        targets.append(y)
    z, y = np.concatenate(features), np.concatenate(targets)
    start = _rows(cut, i)
    gram = z.T @ z
    pull = RIDGE * np.diag(np.diag(gram))
    # A feature that is never active stays as it was.
    pull[np.diag_indices_from(pull)] += np.diag(gram) == 0
    return np.linalg.solve(gram + pull, z.T @ y + pull @ start), z, y


def _hidden(weights, x):
    gate = x @ weights["gate"]
    return gate / (1 + np.exp(-gate)) * (x @ weights["up"])


def _rows(model: Model, i: int) -> np.ndarray:
    """All that layer ``i``'s output is linear in, one below the other."""
    moe = jax.tree.map(lambda w: np.asarray(w, np.float64), model.params["layers"][i]["moe"])
    parts = [moe["shared"]["down"]] if "shared" in moe else []
    for row, down in enumerate(moe["experts"]["down"]):
        parts.append(down)
        if "expert_bias" in moe:
            parts.append(moe["expert_bias"][row][None])
    return np.concatenate([*parts, moe["novices"]["constant"]] if "novices" in moe else parts)


CASES = {
    "neurons": ({}, {}),
    "gated shared expert": ({"shared": SharedExpert(6, True)}, {}),
    "shared expert, constants": ({"shared": SharedExpert(6), "bias": True}, {}),
    "novices": ({}, {"novices": (1, 4), "novice_value": "zero", "neurons": {}}),
    "removal": ({"shared": SharedExpert(6, True)}, {"deleted": (0, 5), "neurons": {}}),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_reach_the_joint_solution(case):
    changes, plan = CASES[case]
    original = _original(**changes)
    cut = _cut(original, **plan)
    fitted = Model(refit(original, cut, BATCHES, ridge=RIDGE, sweeps=200), cut.config)
    for i in cut.config.moe_layers:
        wanted, z, y = _joint(original, cut, i)
        found = _rows(fitted, i)
        # What matters is the output. Float32 products of a few hundred tokens.
        scale = np.abs(y).max()
        np.testing.assert_allclose(z @ found, z @ wanted, rtol=0, atol=2e-3 * scale)
        before = np.square(z @ _rows(cut, i) - y).sum()
        assert np.square(z @ found - y).sum() < 0.9 * before


def test_few_sweeps_never_lose():
    original = _original(SharedExpert(6, True))
    cut = _cut(original)
    errors = []
    for sweeps in (1, 2, 4):
        fitted = Model(refit(original, cut, BATCHES, ridge=1e-6, sweeps=sweeps), cut.config)
        _, z, y = _joint(original, cut, 0)
        errors.append(np.square(z @ _rows(fitted, 0) - y).sum())
    assert errors[0] >= errors[1] >= errors[2] > 0


def test_nothing_cut_is_nothing_changed():
    original = _original(SharedExpert(6, True))
    fitted = refit(original, original, BATCHES)
    for new, old in zip(jax.tree.leaves(fitted), jax.tree.leaves(original.params), strict=True):
        np.testing.assert_array_equal(new, old)


def test_own_widths_and_padded_ones_are_refitted_alike():
    original = _original()
    neurons = {e: tuple(range(EXPERT_WIDTH - e)) for e in range(EXPERTS)}  # stored in one order
    own = _cut(original, neurons=neurons, own_widths=True)
    padded = _cut(original, neurons=neurons, padded_width=EXPERT_WIDTH)
    logits = []
    for cut in (own, padded):
        fitted = refit(original, cut, BATCHES)
        logits.append(_forward(fitted, cut.config, BATCHES[0]["tokens"], None, ())[0])
    # Products of other shapes, added up in another order.
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-4 * np.abs(logits[0]).max())


def test_sharded_is_refitted_as_on_one_device():
    original = _original(SharedExpert(8, True))
    cut = _cut(original)
    mesh = make_mesh({"data": 2, "expert": 2, "tensor": 2})
    placed = [
        m._replace(params=jax.device_put(m.params, spec_tree(m.config, mesh)))
        for m in (original, cut)
    ]
    one, many = refit(original, cut, BATCHES), refit(*placed, BATCHES)
    for (path, new), old in zip(jax.tree.leaves_with_path(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(
            new, old, rtol=0, atol=1e-4 * float(jnp.abs(old).max()), err_msg=str(path)
        )
    assert many["layers"][0]["moe"]["experts"]["down"].sharding.is_equivalent_to(
        placed[1].params["layers"][0]["moe"]["experts"]["down"].sharding, 3
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": []}, "needs text"),
        ({"ridge": 0}, "ridge must be positive"),
        ({"sweeps": 0}, "sweeps must be at least 1"),
    ],
)
def test_refuses(changes, message):
    original = _original()
    batches = changes.pop("batches", BATCHES)
    with pytest.raises(ValueError, match=message):
        refit(original, original, batches, **changes)


def test_refuses_a_model_with_other_layers():
    original = _original()
    config = original.config.keep_layers((0, 1))
    fewer = Model({**original.params, "layers": original.params["layers"][:2]}, config)
    with pytest.raises(ValueError, match="needs the layers"):
        refit(original, fewer, BATCHES)


def test_a_run_refits_and_a_rerun_does_not(tmp_path):
    save_model(tmp_path / "model", "qwen2_moe")
    stage = {"method": "token_fisher", "width_ratio": 0.5, "refit": True, "refit_sequences": 12}
    run = make_run(tmp_path, stage, dtype="float32")
    report, paths = compress(run)
    assert report["stages"][0]["settings"]["refit"] is True
    before = finished_work(tmp_path / "out")
    again, _ = compress(run)
    assert finished_work(tmp_path / "out") == before
    assert again["stages"] == report["stages"]
    plain, _ = compress(
        make_run(tmp_path, stage | {"refit": False, "refit_sequences": None}, dtype="float32",
                 output=str(tmp_path / "plain"))
    )  # fmt: skip
    kl = [one["after"]["evaluation"]["mean"]["kl"] for one in (report, plain)]
    assert kl[0] < kl[1]
    # The plan that it leaves does the same again.
    (plan,) = (tmp_path / "out/plans").iterdir()
    _, planned = compress(
        make_run(tmp_path, {"plan": str(plan)}, dtype="float32", output=str(tmp_path / "planned"))
    )
    for (path, old), new in zip(
        jax.tree.leaves_with_path(load_hf(paths["checkpoint"])[1]),
        jax.tree.leaves(load_hf(planned["checkpoint"])[1]),
        strict=True,
    ):
        np.testing.assert_array_equal(new, old, err_msg=str(path))


def test_a_sequential_cut_takes_no_refit():
    with pytest.raises(ValueError, match="it takes no refit"):
        Cut.from_dict({"method": "obs", "width_ratio": 0.5, "sequential": True, "refit": True})
