"""The models that ship with the package: exact in transformers, specialised, of the stated size."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.data import calibration_batches, load_tokenizer
from moe_jax.params import count_params
from moe_jax.settings import CalibrationConfig

ASSETS = Path(moe_jax.__file__).parent / "assets"
TEXT = sorted(map(str, (ASSETS / "text" / "calibration").glob("*.jsonl.xz")))
TEACHERS = ["olmoe", "phimoe"]
_forward = jax.jit(moe_jax.forward, static_argnums=(1, 4))


@pytest.fixture(scope="module", params=TEACHERS)
def teacher(request):
    folder = ASSETS / request.param
    config, params = moe_jax.load_hf(folder, dtype="float32")
    text = CalibrationConfig(tuple(TEXT), num_sequences=8, seq_len=96)
    batch = calibration_batches(text, load_tokenizer(folder))[0]
    return folder, params, config, batch


def torch_logits(folder, tokens, mask, remote=False):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=remote
    ).eval()
    with torch.no_grad():
        ids = torch.tensor(tokens, dtype=torch.long)
        return model(ids, attention_mask=torch.tensor(mask)).logits.numpy()


def assert_parity(ours, theirs, mask):
    """Both bounds of the design: the largest logit error, and the mean KL."""
    ours, theirs = (np.asarray(a, np.float64)[mask] for a in (ours, theirs))
    assert np.abs(ours - theirs).max() <= 2e-4
    log_p, log_q = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (theirs, ours))
    assert (np.exp(log_p) * (log_p - log_q)).sum(-1).mean() <= 1e-8


def logits_of(params, config, batch):
    segment_ids = jnp.asarray(batch["mask"], jnp.int32)
    return jax.jit(lambda p: moe_jax.forward(p, config, batch["tokens"], segment_ids)[0])(params)


def test_logits_equal_transformers(teacher):
    folder, params, config, batch = teacher
    theirs = torch_logits(folder, batch["tokens"], batch["mask"])
    assert_parity(logits_of(params, config, batch), theirs, batch["mask"])


def test_compressed_exports_give_our_logits_in_transformers(teacher, tmp_path):
    folder, params, config, batch = teacher
    stats = moe_jax.calibrate(params, config, [batch], warn=False)
    novices = moe_jax.make_plan(moe_jax.score(stats, "mone"), config, keep_ratio=0.75)
    neurons = moe_jax.score(stats, "activation_norm")
    slim = moe_jax.make_plan(neurons, config, width_ratio=0.5, round_to=4)
    for name, plan in (("novices", novices), ("slim", slim)):
        small, pruned = moe_jax.apply_plan(params, config, plan, stats)
        moe_jax.save_hf(tmp_path / name, pruned, small, source=folder)
        theirs = torch_logits(
            tmp_path / name, batch["tokens"], batch["mask"], remote=name == "novices"
        )
        assert_parity(logits_of(pruned, small, batch), theirs, batch["mask"])


def test_masked_neurons_equal_sliced_ones_to_the_bit(teacher):
    """Every width of the tables; contractions this short are summed in one block, in order.

    Of one layer: the others are like it, and compile as long again.
    """
    _, params, config, batch = teacher
    params, config = {**params, "layers": params["layers"][:1]}, config.keep_layers((0,))
    segments = jnp.ones_like(batch["tokens"])
    stats = moe_jax.calibrate(params, config, [batch], warn=False)
    for ratio in (0.75, 0.5, 0.25, 0.15):
        plan = moe_jax.make_plan(moe_jax.score(stats, "activation_norm"), config, width_ratio=ratio)
        small, sliced = moe_jax.apply_plan(params, config, plan)
        masks = {}
        for i, layer in plan.layers.items():
            mask = np.zeros((config.moe(i).num_experts, config.moe(i).expert_width), np.float32)
            for e, kept in layer.neurons.items():
                mask[e, list(kept)] = 1
            masks[i] = jnp.asarray(mask)
        masked, _ = _forward(params, config, batch["tokens"], segments, (), neuron_masks=masks)
        direct, _ = _forward(sliced, small, batch["tokens"], segments, ())
        np.testing.assert_array_equal(direct, masked)


def test_most_parameters_are_in_experts_and_the_files_are_small(teacher):
    folder, _, config, _ = teacher
    counts = count_params(config)
    assert counts.experts > counts.total / 2
    assert sum(file.stat().st_size for file in folder.iterdir()) < 25e6


def test_experts_specialise_by_domain(teacher):
    """Routing differs between domains far more than between halves of one domain."""
    folder, params, config, _ = teacher
    tokenizer = load_tokenizer(folder)

    def frequencies(file, seed):
        text = CalibrationConfig((file,), num_sequences=8, seq_len=256)
        batches = calibration_batches(text, tokenizer, seed=seed)
        layers = moe_jax.calibrate(params, config, batches, warn=False).layers.values()
        return np.stack([layer["count"] / layer["count"].sum() for layer in layers])

    def distance(a, b):
        return np.abs(a - b).sum(-1).mean() / 2

    code, books = (next(f for f in TEXT if name in f) for name in ("code_python", "books"))
    between = distance(frequencies(code, 0), frequencies(books, 0))
    within = distance(frequencies(books, 1), frequencies(books, 2))
    assert between > 1.5 * within
