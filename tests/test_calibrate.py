"""Statistics against a plain float64 computation, and their invariances."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import EXPERTS, VOCAB, tiny_config, tiny_model, token_batches
from tiny_run import save_model, save_text

from moe_jax import statistics
from moe_jax.calibrate import calibrate, check_tokens, domain_batches
from moe_jax.data import load_tokenizer
from moe_jax.losses import distill_loss, next_token_labels
from moe_jax.model import forward, init_params
from moe_jax.ops.grouped_moments import grouped_moments
from moe_jax.processes import make_mesh, spec_tree
from moe_jax.settings import CalibrationConfig
from moe_jax.statistics import Stats

# Sums of a few hundred float32 numbers.
ROUNDING = {"rtol": 2e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def batches():
    return token_batches()


@pytest.fixture(scope="module")
def measured(batches):
    params, config = tiny_model()
    return calibrate(params, config, batches, importance=("lm", "kd_topk"))


def moe_input(weights, config, aux):
    """What experts read, [T, D]: the normed stream behind attention, from that before the layer."""
    out = {name: np.asarray(leaf, np.float64) for name, leaf in weights["attention"]["out"].items()}
    attended = np.einsum("bsnh,nhd->bsd", np.asarray(aux["mixed"], np.float64), out["kernel"])
    x = np.asarray(aux["layer_input"], np.float64) + attended + out.get("bias", 0)
    x = x.reshape(-1, config.width)
    norm = {name: np.asarray(leaf, np.float64) for name, leaf in weights["mlp_norm"].items()}
    if config.norm == "layer":
        x = x - x.mean(1, keepdims=True)
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + config.norm_eps)
    return x * norm["scale"] + norm.get("bias", 0)


def reference(params, config, batches, layer):
    """Float64 NumPy statistics of one layer, expert by expert, from ids, weights and inputs."""
    inputs, ids, weights, streams = [], [], [], []
    for batch in batches:
        segment_ids = jnp.asarray(batch["mask"], jnp.int32)
        taps = ("expert_ids", "weights", "mixed", "layer_input", "layer_output")
        _, aux = forward(params, config, batch["tokens"], segment_ids, taps)
        valid = batch["mask"].reshape(-1)
        inputs.append(moe_input(params["layers"][layer], config, aux["layers"][layer])[valid])
        ids.append(np.asarray(aux["layers"][layer]["expert_ids"])[valid])
        weights.append(np.asarray(aux["layers"][layer]["weights"], np.float64)[valid])
        depths = [part["layer_input"] for part in aux["layers"]]
        depths.append(aux["layers"][-1]["layer_output"])
        streams.append([np.asarray(x, np.float64).reshape(len(valid), -1)[valid] for x in depths])
    x, ids, weights = map(np.concatenate, (inputs, ids, weights))
    experts = {
        name: np.asarray(leaf, np.float64)
        for name, leaf in params["layers"][layer]["moe"]["experts"].items()
    }
    kernel = np.asarray(params["layers"][layer]["moe"]["router"]["kernel"], np.float64)
    logits = x @ kernel
    soft = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    weighted = np.zeros((len(x), config.moe(layer).num_experts, x.shape[1]))
    result = []
    for e in range(config.moe(layer).num_experts):
        tokens, slots = np.nonzero(ids == e)
        gate, up = x[tokens] @ experts["gate"][e], x[tokens] @ experts["up"][e]
        hidden = gate / (1 + np.exp(-gate)) * up
        output = hidden @ experts["down"][e]
        weight = weights[tokens, slots]
        norm = np.linalg.norm(output, axis=1)
        weighted[tokens, e] = weight[:, None] * output
        result.append(
            {
                "count": len(tokens),
                "routing_mass": weight.sum(),
                "output_mean": output.mean(0) if len(tokens) else np.zeros(output.shape[1]),
                "output_m2": ((output - output.mean(0)) ** 2).sum(0)
                if len(tokens)
                else np.zeros(output.shape[1]),
                "output_norm": norm.sum(),
                "gated_norm": (weight * norm).sum(),
                "gated_square": ((weight * norm) ** 2).sum(),
                "gated_output": (weight[:, None] * output).sum(0),
                "hidden_gram": second_moments(hidden, weight),
                "router_norm": np.linalg.norm(kernel[:, e]),
                "weight_sum": sum(
                    np.abs(experts[name][e]).sum(axis)
                    for name, axis in (("gate", 0), ("up", 0), ("down", 1))
                ),
                "output_peak": norm.max(initial=0),
                "down_norm": np.linalg.norm(experts["down"][e], axis=1),
                "down_sum": np.abs(experts["down"][e]).sum(1),
                "gated_energy": ((weight[:, None] * hidden) ** 2).sum(0),
                "gated_peak": np.abs(weight[:, None] * hidden).max(0, initial=0),
                "neuron_mean": hidden.mean(0) if len(tokens) else np.zeros(hidden.shape[1]),
                "neuron_m2": ((hidden - hidden.mean(0)) ** 2).sum(0)
                if len(tokens)
                else np.zeros(hidden.shape[1]),
            }
        )
    chosen = np.zeros((len(x), config.moe(layer).num_experts))
    np.put_along_axis(chosen, ids, 1, 1)
    stacked = {name: np.stack([r[name] for r in result]) for name in result[0]}
    return stacked | {
        "coactivation": chosen.T @ chosen,
        "soft_count": soft.sum(0),
        "router_gram": logits.T @ logits,
        "output_gram": np.einsum("ted,tfd->ef", weighted, weighted),
        **shared_reference(params["layers"][layer]["moe"].get("shared"), x),
    }, angular(np.concatenate(streams, 1))


def shared_reference(weights, x):
    """Of a shared expert with a gate, where there is one."""
    if weights is None:
        return {}
    gate, up, down = (np.asarray(weights[n], np.float64) for n in ("gate", "up", "down"))
    kernel = np.asarray(weights["output_gate"]["kernel"], np.float64)
    gated = x @ gate
    hidden = gated / (1 + np.exp(-gated)) * (x @ up) / (1 + np.exp(-x @ kernel))[:, None]
    found = {
        "count": len(x),
        "neuron_mean": hidden.mean(0),
        "neuron_m2": ((hidden - hidden.mean(0)) ** 2).sum(0),
        "gated_energy": (hidden**2).sum(0),
        "gated_peak": np.abs(hidden).max(0),
        "hidden_gram": second_moments(hidden, np.ones(len(x))),
        "weight_norm": np.sqrt((gate**2).sum(0) + (up**2).sum(0) + (down**2).sum(1)),
        "weight_sum": np.abs(gate).sum(0) + np.abs(up).sum(0) + np.abs(down).sum(1),
        "down_norm": np.linalg.norm(down, axis=1),
        "down_sum": np.abs(down).sum(1),
    }
    return {f"shared_{name}": np.asarray(values)[None] for name, values in found.items()}


def second_moments(hidden, weight):
    rows = weight[:, None] * np.concatenate([hidden, np.ones((len(hidden), 1))], 1)
    return rows.T @ rows


def angular(stream):
    """Sums over tokens of arccos(cosine) / pi between states [L + 1, T, D]."""
    unit = stream / np.linalg.norm(stream, axis=-1, keepdims=True)
    return (np.arccos(np.clip(np.einsum("itd,jtd->ijt", unit, unit), -1, 1)) / np.pi).sum(-1)


@pytest.mark.parametrize(
    ("family", "chosen"),
    [("olmoe", 2), ("phimoe", 2), ("qwen3_moe", 2), ("olmoe", 1), ("qwen2_moe", 2)],
)
def test_statistics_equal_a_float64_computation(family, chosen, batches):
    params, config = tiny_model(family)
    for i in config.moe_layers:
        config = config.replace_moe(i, experts_per_token=chosen)
    stats = calibrate(params, config, batches, second_moments=True, shared_moments=True, warn=False)
    for layer in config.moe_layers:
        experts, distance = reference(params, config, batches, layer)
        for name, expected in experts.items():
            np.testing.assert_allclose(
                stats.layers[layer][name], expected, err_msg=name, **ROUNDING
            )
        np.testing.assert_allclose(stats.stream["angular_distance"], distance, **ROUNDING)
        missing = set(stats.layers[layer]) - set(experts) - {"weight_norm"}
        assert not missing, f"no independent computation of {missing}"
    assert stats.tokens == sum(int(batch["mask"].sum()) for batch in batches)


def assert_same(a: Stats, b: Stats):
    streams = ({0: a.stream}, {0: b.stream})
    for mine, theirs in ((a.layers, b.layers), (a.attention, b.attention), streams):
        assert mine.keys() == theirs.keys()
        for i, layer in mine.items():
            for name, array in layer.items():
                np.testing.assert_allclose(
                    array, theirs[i][name], err_msg=f"{i} {name}", **ROUNDING
                )


def test_merged_halves_equal_the_whole(measured, batches):
    params, config = tiny_model()
    halves = [
        calibrate(params, config, part, importance=("lm", "kd_topk"), warn=False)
        for part in (batches[:1], batches[1:])
    ]
    assert_same(halves[0].merge(halves[1]), measured)
    assert_same(halves[1].merge(halves[0]), measured)


def test_batch_size_and_padding_do_not_matter(measured, batches):
    params, config = tiny_model()
    pad = ((0, 1), (0, 5))
    rows = [
        {
            "tokens": np.pad(batch["tokens"][i : i + 1], pad, constant_values=3),
            "mask": np.pad(batch["mask"][i : i + 1], pad),
        }
        for batch in batches
        for i in range(4)
    ]
    by_row = calibrate(params, config, rows, importance=("lm",), warn=False)
    # |sum within a batch| depends on the batches by definition, all else does not.
    for i, layer in by_row.layers.items():
        for name, array in layer.items():
            if not name.endswith("batch_abs"):
                np.testing.assert_allclose(
                    array, measured.layers[i][name], err_msg=name, **ROUNDING
                )
    assert (by_row.tokens, by_row.sequences) == (measured.tokens, measured.sequences)


def test_importance_is_the_derivative_of_the_loss(batches):
    """Central differences in the mask of one neuron, loss and model in float32."""
    params, config = tiny_model("phimoe")
    batch = batches[0]
    stats = calibrate(params, config, [batch], importance=("lm", "kd_topk"), warn=False)
    segment_ids = jnp.asarray(batch["mask"], jnp.int32)
    labels, counted = next_token_labels(jnp.asarray(batch["tokens"]), segment_ids)
    teacher, _ = forward(params, config, batch["tokens"], segment_ids)

    def loss(mask, kind):
        masks = {0: jnp.asarray(mask)}
        logits, _ = forward(params, config, batch["tokens"], segment_ids, neuron_masks=masks)
        value, metrics = distill_loss(logits, teacher, labels, counted, kind=kind)
        return float(value * metrics["positions"])

    ones, step = np.ones((EXPERTS, 8), np.float32), 2e-3
    for kind in ("lm", "kd_topk"):
        importance = stats.layers[0][f"{kind}.batch_abs"]
        for neuron in np.argwhere(importance >= np.sort(importance, None)[-3]):
            change = np.zeros_like(ones)
            change[tuple(neuron)] = step
            slope = (loss(ones + change, kind) - loss(ones - change, kind)) / (2 * step)
            # Float32 rounding of sums near 100; a larger step would change some token's routing.
            assert abs(abs(slope) - importance[tuple(neuron)]) < 2e-2 * importance.max()
        by_expert = stats.layers[0][f"{kind}.expert_batch_abs"]
        change = step * (np.arange(EXPERTS) == by_expert.argmax())[:, None] * ones
        slope = (loss(ones + change, kind) - loss(ones - change, kind)) / (2 * step)
        assert abs(abs(slope) - by_expert.max()) < 2e-2 * by_expert.max()


def test_a_sharded_model_is_measured_as_one_on_one_device(measured, batches):
    params, config = tiny_model()
    mesh = make_mesh({"data": 2, "expert": 2, "fsdp": 2})
    placed = jax.device_put(params, spec_tree(config, mesh))
    assert_same(calibrate(placed, config, batches, importance=("lm", "kd_topk")), measured)


def test_aggregations_follow_from_the_gradients_of_single_sequences(batches):
    params, config = tiny_model()
    batch = batches[0]
    whole = calibrate(params, config, [batch], importance=("lm",), warn=False)
    rows = [{name: array[i : i + 1] for name, array in batch.items()} for i in range(4)]
    single = [calibrate(params, config, [row], importance=("lm",), warn=False) for row in rows]
    for i in config.moe_layers:
        absolute = np.stack([s.layers[i]["lm.batch_abs"] for s in single])
        np.testing.assert_allclose(whole.layers[i]["lm.sequence_abs"], absolute.sum(0), **ROUNDING)
        np.testing.assert_allclose(
            whole.layers[i]["lm.sequence_square"], (absolute**2).sum(0), **ROUNDING
        )
        assert (whole.layers[i]["lm.batch_abs"] <= absolute.sum(0) + 1e-4).all()


@pytest.mark.parametrize("loop", [True, False])
def test_grouped_moments_of_any_grouping(loop):
    rng = np.random.default_rng(0)
    # A large mean: a formula that subtracts E[x]^2 would lose all digits of the deviations.
    x = rng.standard_normal((700, 5)).astype(np.float32) + 300
    sizes = np.array([0, 1, 250, 0, 128, 300])
    weights = rng.random(700).astype(np.float32)
    arrays = (jnp.asarray(x), jnp.asarray(x[:, :2]))
    moments, first_columns = grouped_moments(arrays, jnp.asarray(sizes), jnp.asarray(weights), loop)
    for whole, part in zip(moments, first_columns, strict=True):
        np.testing.assert_allclose(part, whole[:, :2], rtol=1e-5)
    mean, m2, weighted = moments
    start = 0
    for e, size in enumerate(sizes):
        rows = x[start : start + size].astype(np.float64)
        np.testing.assert_allclose(weighted[e], weights[start : start + size] @ rows, rtol=1e-5)
        start += size
        expected = rows.mean(0) if size else np.zeros(5)
        np.testing.assert_allclose(mean[e], expected, rtol=1e-6)
        np.testing.assert_allclose(m2[e], ((rows - expected) ** 2).sum(0), rtol=1e-3, atol=1e-3)


def test_unreached_experts_are_named(caplog):
    params, config = tiny_model()
    kernel = params["layers"][0]["moe"]["router"]["kernel"].at[:, 4].set(0)
    shifted = jax.tree.map(lambda leaf: leaf, params)
    shifted["layers"][0]["moe"]["router"]["kernel"] = kernel
    one_token = [{"tokens": np.zeros((1, 2), np.int32), "mask": np.array([[True, False]])}]
    with caplog.at_level(logging.WARNING):
        stats = calibrate(shifted, config, one_token)
    assert len(stats.unreached()) == 2 * (EXPERTS - 2)
    assert stats.unreached()[0] in caplog.text


def test_saved_statistics_come_back(tmp_path, measured):
    measured.save(tmp_path / "stats")
    loaded = Stats.load(tmp_path / "stats")
    for i, layer in measured.layers.items():
        for name, array in layer.items():
            np.testing.assert_array_equal(array, loaded.layers[i][name])
            assert array.dtype == loaded.layers[i][name].dtype
    assert loaded.attention.keys() == measured.attention.keys()
    for i, groups in measured.attention.items():
        assert groups.keys() == loaded.attention[i].keys()
        for name, array in groups.items():
            np.testing.assert_array_equal(array, loaded.attention[i][name])
    distance = "angular_distance"
    np.testing.assert_array_equal(measured.stream[distance], loaded.stream[distance])
    assert (loaded.tokens, loaded.facts) == (measured.tokens, measured.facts)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["stats.json", "stats.npz"]


def test_files_of_another_format_are_refused(tmp_path, measured, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "_FORMAT", 1)
        measured.save(tmp_path / "old")
    with pytest.raises(ValueError, match=r"old\.npz holds no usable statistics: format must be 5"):
        Stats.load(tmp_path / "old")


def test_without_losses_attention_has_its_weights_only(batches):
    params, config = tiny_model("qwen3_moe")
    stats = calibrate(params, config, batches, warn=False)
    assert {i: list(groups) for i, groups in stats.attention.items()} == {
        i: ["weight_norm"] for i in range(3)
    }


def test_bad_input_is_refused():
    params, config = tiny_model()
    batch = token_batches(1)[0]
    with pytest.raises(ValueError, match=f"vocab_size = {VOCAB}"):
        calibrate(params, config, [batch | {"tokens": batch["tokens"] + VOCAB}])
    with pytest.raises(ValueError, match="got -1"):
        check_tokens(np.array([[-1]]), VOCAB)
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(params, config, [])
    with pytest.raises(ValueError, match="padding"):
        calibrate(params, config, [batch | {"mask": np.zeros_like(batch["mask"])}], warn=False)
    with pytest.raises(ValueError, match=r"second_moments must be among \(0, 1\), got \[2\]"):
        calibrate(params, config, [batch], second_moments=(0, 2))
    with pytest.raises(ValueError, match="importance must be among"):
        calibrate(params, config, [batch], importance=("kd",))
    with pytest.raises(ValueError, match="its own teacher"):
        calibrate(params, config, [batch], importance=("kd_full",))
    other = tiny_config(vocab_size=VOCAB + 1)
    with pytest.raises(ValueError, match="share a vocabulary"):
        calibrate(params, config, [batch], teacher=(init_params(other, jax.random.key(0)), other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch["tokens"].tolist(), "got list for the batch"),
        (lambda batch: {"tokens": batch["tokens"]}, "got dict for the batch"),
        (lambda batch: batch | {"tokens": batch["tokens"].tolist()}, "got list for 'tokens'"),
        (lambda batch: batch | {"tokens": torch.tensor(batch["tokens"])}, "got Tensor for"),
        (lambda batch: batch | {"tokens": batch["tokens"] / 2}, r"Int\[B, S\], got float"),
        (lambda batch: batch | {"mask": batch["tokens"]}, r"mask .* Bool\[B, S\], got int"),
        (lambda batch: batch | {"mask": batch["mask"][:, 1:]}, "must have one shape"),
    ],
)
def test_batches_that_are_no_arrays_are_refused(change, message):
    params, config = tiny_model()
    with pytest.raises(ValueError, match=message):
        calibrate(params, config, [change(token_batches(1)[0])], warn=False)


def test_nan_weights_are_named():
    params, config = tiny_model()
    broken = jax.tree.map(lambda leaf: leaf, params)
    down = broken["layers"][1]["moe"]["experts"]["down"]
    broken["layers"][1]["moe"]["experts"]["down"] = down.at[0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="statistics of layer 1"):
        calibrate(broken, config, token_batches(1), warn=False)


def test_files_that_get_no_sequence_are_named(tmp_path, caplog):
    """Eleven files, eight sequences: three are not read, and a warning says which."""
    files = [save_text(tmp_path, f"text_{n}") for n in range(11)]
    tokenizer = load_tokenizer(save_model(tmp_path / "model", num_hidden_layers=1))
    settings_ = CalibrationConfig(num_sequences=8, seq_len=8, batch_size=4)
    with caplog.at_level(logging.WARNING):
        domains = domain_batches(files, tokenizer, settings_)
    assert len(domains) == 8
    assert "nothing is read of text_8, text_9, text_10" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        domain_batches(files[:8], tokenizer, settings_)
    assert not caplog.text
