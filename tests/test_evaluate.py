"""Evaluation against transformers in float64, and the accounting of tokens and bytes."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest

from moe_jax.data import EvaluationWindows, evaluation_windows, load_tokenizer
from moe_jax.evaluate import (
    DomainEvaluation,
    Evaluation,
    Reference,
    comparison_table,
    evaluate,
    evaluate_checkpoints,
    evaluate_pair,
    tasks_table,
)
from moe_jax.evaluate.__main__ import tables
from moe_jax.evaluate.checkpoints import EvaluateConfig
from moe_jax.hf import save_hf
from moe_jax.hf.config_import import model_config
from moe_jax.model import init_params
from moe_jax.settings import EvaluationConfig, section

TOKENIZER = "moe_jax/assets/olmoe/tokenizer.json"
SEQ_LEN = 16
TEXTS = {
    "latin": [
        "The river ran past the mill and on to the sea, as it always had. " * 3,
        "Short.",
    ],
    "mixed": ["Größe: 5 µm, naïve café ☕ and 漢字.", "def add(a, b):\n    return a + b\n" * 2],
}
HF_CONFIG = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "vocab_size": 8192,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "clip_qkv": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name, texts in TEXTS.items():
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return [folder / f"{name}.jsonl" for name in TEXTS]


@pytest.fixture(scope="module")
def models():
    """Two random models, far enough from uniform that their predictions differ."""
    config = dataclasses.replace(model_config(HF_CONFIG), init_std=0.2)
    return config, [init_params(config, jax.random.key(seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def checkpoints(models, tmp_path_factory):
    config, weights = models
    folder = tmp_path_factory.mktemp("checkpoints")
    source = folder / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(HF_CONFIG))
    with open(TOKENIZER, "rb") as file:
        (source / "tokenizer.json").write_bytes(file.read())
    paths = [folder / "a", folder / "b"]
    for path, params in zip(paths, weights, strict=True):
        save_hf(path, params, config, source=source)
    return paths


@pytest.fixture(scope="module")
def measured(models, files, tokenizer):
    config, (params, other) = models
    return evaluate(params, config, cut(files, tokenizer), reference=(other, config))


def cut(files, tokenizer, batch_size=3):
    text = EvaluationConfig(tuple(map(str, files)), SEQ_LEN, batch_size)
    return evaluation_windows(text, tokenizer)


def torch_sums(paths, tokenizer):
    """Per domain: targets, sum of nll, of KL(b || a), of agreement; float64, window by window."""
    import torch
    from transformers import AutoModelForCausalLM

    torch_models = [
        AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        for path in paths
    ]
    sums = {}
    for domain, texts in TEXTS.items():
        total = np.zeros(4)
        for text in texts:
            ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
            for start in range(0, len(ids) - 1, SEQ_LEN):
                window = torch.tensor([ids[start : start + SEQ_LEN + 1]])
                with torch.no_grad():
                    log_p, log_r = (
                        model(window[:, :-1]).logits.double().log_softmax(-1)[0]
                        for model in torch_models
                    )
                targets = window[0, 1:]
                total += (
                    len(targets),
                    -log_p.gather(1, targets[:, None]).sum().item(),
                    (log_r.exp() * (log_r - log_p)).sum().item(),
                    (log_p.argmax(-1) == log_r.argmax(-1)).sum().item(),
                )
        sums[domain] = total
    return sums


def test_matches_transformers_in_float64(measured, checkpoints, tokenizer):
    expected = torch_sums(checkpoints, tokenizer)
    assert list(measured.domains) == list(expected)
    for domain, (tokens, nll, kl, agree) in expected.items():
        found = measured.domains[domain]
        assert found.tokens == tokens
        np.testing.assert_allclose(found.nll, nll / tokens, rtol=1e-5)
        np.testing.assert_allclose(found.perplexity, math.exp(nll / tokens), rtol=1e-4)
        np.testing.assert_allclose(found.kl, kl / tokens, rtol=1e-4)
        np.testing.assert_allclose(found.top1_agreement, agree / tokens, atol=1e-9)


def test_bytes_and_totals(measured):
    for name, texts in TEXTS.items():
        domain = measured.domains[name]
        assert domain.bytes == sum(len(text.encode()) for text in texts)
        bits = domain.nll * domain.tokens / math.log(2) / domain.bytes
        np.testing.assert_allclose(domain.bits_per_byte, bits, rtol=1e-12)
    domains = list(measured.domains.values())
    total, mean = measured.total, measured.mean
    tokens, num_bytes = sum(d.tokens for d in domains), sum(d.bytes for d in domains)
    assert (total.tokens, total.bytes) == (mean.tokens, mean.bytes) == (tokens, num_bytes)
    by_bytes = sum(d.bits_per_byte * d.bytes for d in domains) / num_bytes
    np.testing.assert_allclose(total.bits_per_byte, by_bytes, rtol=1e-12)
    for field in ("nll", "kl", "top1_agreement"):
        values = [getattr(d, field) for d in domains]
        weighted = sum(v * d.tokens for v, d in zip(values, domains, strict=True)) / tokens
        np.testing.assert_allclose(getattr(total, field), weighted, rtol=1e-12)
        np.testing.assert_allclose(getattr(mean, field), np.mean(values), rtol=1e-12)
    assert measured.tokens_per_second > 0
    assert (measured.seq_len, measured.batch_size) == (SEQ_LEN, 3)


def test_model_is_its_own_equal(models, files, tokenizer):
    config, (params, _) = models
    windows = cut(files, tokenizer)
    found = evaluate(params, config, windows, reference=(params, config))
    assert all(d.kl == 0 and d.top1_agreement == 1 for d in found.domains.values())


def test_pair_in_one_pass(measured, models, files, tokenizer):
    config, (params, other) = models
    windows = cut(files, tokenizer)
    before, after = evaluate_pair((other, config), (params, config), windows)
    alone = evaluate(other, config, windows)
    assert after.domains == measured.domains
    for name, domain in before.domains.items():
        np.testing.assert_allclose(domain.nll, alone.domains[name].nll, rtol=1e-6)
        assert domain.kl is None


def test_batching_and_padding_do_not_matter(measured, models, files, tokenizer):
    config, (params, _) = models
    again = evaluate(params, config, cut(files, tokenizer, batch_size=7))
    for name, domain in again.domains.items():
        np.testing.assert_allclose(domain.nll, measured.domains[name].nll, rtol=1e-6)
        assert domain.kl is None
        assert domain.top1_agreement is None


def test_many_equal_layers_are_measured_as_unequal_ones(models, files, tokenizer):
    """Equal ones are scanned; a window as long as the text changes nothing but that."""
    config, (params, _) = models
    deep = dataclasses.replace(config, layers=config.layers[:1] * 12)
    params = {**params, "layers": params["layers"][:1] * 12}
    last = dataclasses.replace(deep.layers[-1], sliding_window=SEQ_LEN)
    unequal = dataclasses.replace(deep, layers=(*deep.layers[:-1], last))
    text = cut(files, tokenizer)
    scanned, unrolled = (
        evaluate(params, config, text, with_speed=False) for config in (deep, unequal)
    )
    assert scanned.total.bits_per_byte == pytest.approx(unrolled.total.bits_per_byte, rel=1e-6)


def test_nan_names_the_domain(models, files, tokenizer):
    config, (params, _) = models
    only_mixed = set(tokenizer("☕")["input_ids"]) - set(tokenizer(TEXTS["latin"])["input_ids"][0])
    embedding = params["embed"]["embedding"].at[min(only_mixed)].set(np.nan)
    broken = params | {"embed": {"embedding": embedding}}
    with pytest.raises(ValueError, match=r"the model at .* domain 'mixed'"):
        evaluate(broken, config, cut(files, tokenizer))
    with pytest.raises(ValueError, match=r"the reference at .* domain 'mixed'"):
        evaluate(params, config, cut(files, tokenizer), reference=(broken, config))


def test_texts_that_share_batches_are_as_each_alone(measured, models, files, tokenizer):
    """Three windows of batches of eight beside another text's: every text's losses stay equal."""
    config, (params, other) = models
    windows = cut(files, tokenizer, batch_size=8)
    assert len(windows.batches) < len(files) * len(cut(files[:1], tokenizer, batch_size=8).batches)
    together = evaluate(params, config, windows, reference=(other, config), with_speed=False)
    assert together.tokens_per_second is None
    for file, (name, domain) in zip(files, together.domains.items(), strict=True):
        alone = evaluate(params, config, cut([file], tokenizer, 8), reference=(other, config))
        assert alone.domains[name].nll == pytest.approx(domain.nll, rel=1e-12)
        assert alone.domains[name].kl == pytest.approx(domain.kl, rel=1e-12)


def test_a_reference_whose_predictions_are_kept(measured, models, files, tokenizer):
    config, (params, other) = models
    windows = cut(files, tokenizer)
    kept, not_kept = (Reference.keeping((other, config), windows, mib) for mib in (64, 0))
    assert len(kept.kept) == len(windows.batches)
    assert not not_kept.kept
    for reference in (kept, not_kept):
        found = evaluate(params, config, windows, reference=reference)
        for name, domain in found.domains.items():
            assert domain.kl == pytest.approx(measured.domains[name].kl, rel=1e-6)
            assert domain.top1_agreement == measured.domains[name].top1_agreement


def test_refuses_what_cannot_be_compared(models, files, tokenizer):
    config, (params, _) = models
    smaller = dataclasses.replace(config, vocab_size=100)
    with pytest.raises(ValueError, match="vocab_size = 100"):
        evaluate(params, smaller, cut(files, tokenizer))
    with pytest.raises(ValueError, match="share the model's vocab_size = 8192, got 100"):
        evaluate(params, config, cut(files, tokenizer), reference=(params, smaller))
    with pytest.raises(ValueError, match="at least one domain"):
        evaluate(params, config, EvaluationWindows({}, [], np.zeros(0, int)))


def test_round_trip(measured):
    text = json.dumps(measured.to_dict(), allow_nan=False)
    assert Evaluation.from_dict(json.loads(text)) == measured
    with pytest.raises(ValueError, match="not an evaluation"):
        Evaluation.from_dict({"domains": 3})


def settings(checkpoints, files, **changes):
    fields = {
        "models": ",".join(map(str, checkpoints)),
        "reference": str(checkpoints[0]),
        "files": tuple(map(str, files)),
        "seq_len": SEQ_LEN,
        "batch_size": 3,
    }
    return section(EvaluateConfig, fields | changes)


def test_command(checkpoints, files):
    result = evaluate_checkpoints(settings(checkpoints, files))
    json.dumps(result, allow_nan=False)
    assert list(result["models"]) == [str(path) for path in checkpoints]
    first, second = (r["evaluation"]["total"] for r in result["models"].values())
    assert first["kl"] == 0 < second["kl"]
    assert result["models"][str(checkpoints[0])]["parameters"]["total"] > 0
    assert set(result["files"]) == set(TEXTS)
    assert result["environment"]["jax"] == jax.__version__


@pytest.fixture
def other_tokenizer(checkpoints, tmp_path):
    """The second checkpoint with the tokens of the first under other numbers."""
    folder = shutil.copytree(checkpoints[1], tmp_path / "other")
    raw = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"] for token in raw["added_tokens"]}
    ids = [i for i in raw["model"]["vocab"].values() if i not in special]
    renamed = dict(zip(ids, np.random.default_rng(0).permutation(ids).tolist(), strict=True))
    raw["model"]["vocab"] = {t: renamed.get(i, i) for t, i in raw["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return folder


def test_each_model_is_measured_with_its_own_tokenizer(checkpoints, other_tokenizer, files):
    pair = [checkpoints[0], other_tokenizer]
    both = evaluate_checkpoints(settings(pair, files, reference=""))["models"]
    for model in pair:
        (alone,) = evaluate_checkpoints(settings([model], files, reference=""))["models"].values()
        for name, domain in alone["evaluation"]["domains"].items():
            assert both[str(model)]["evaluation"]["domains"][name] == domain
    as_before = evaluate_checkpoints(settings(checkpoints, files, reference=""))["models"]
    bits = [
        m["evaluation"]["total"]["bits_per_byte"] for m in (*both.values(), *as_before.values())
    ]
    assert bits[0] == bits[2]
    assert bits[1] != bits[3]
    with pytest.raises(ValueError, match=f"{other_tokenizer} and the reference .* share a tok"):
        evaluate_checkpoints(settings(pair, files))


def test_command_names_the_nearest_field(checkpoints, files):
    with pytest.raises(ValueError, match="did you mean 'models'"):
        evaluate_checkpoints(settings(checkpoints, files, modles="x"))
    with pytest.raises(ValueError, match="at least one checkpoint"):
        evaluate_checkpoints(settings(checkpoints, files, models=" , "))


def test_comparison_table():
    domain = DomainEvaluation(10, 30, 2.0, 7.389, 0.9618, 0.01234, 0.875)
    evaluation = Evaluation({"books": domain}, domain, domain, 1234.5, 16, 2)
    lines = comparison_table({"teacher": evaluation, "student": evaluation}).splitlines()
    assert lines[0].split() == ["teacher", "student"]
    assert ["books", "0.9618", "0.9618"] in [line.split() for line in lines]
    assert lines[-2].split()[-1] == "87.50%"
    assert len({len(line) for line in lines if "0." in line}) == 1


TASKS = {"tasks": "tiny_blimp", "tasks_folder": "tests/data/tasks", "limit": 3}


def test_command_with_tasks_alone(checkpoints, tmp_path):
    """A second run finds the results: what was changed in their file is what it tells."""
    folders = [shutil.copytree(path, tmp_path / path.name) for path in checkpoints]
    fields = {"reference": "", "cache_dir": str(tmp_path / "cache"), **TASKS}
    result = evaluate_checkpoints(settings(folders, [], **fields))
    assert result["files"] == {}
    assert result["task_settings"]["limit"] == 3
    for found in result["models"].values():
        assert set(found) == {"parameters", "tasks"}
        assert found["tasks"]["tiny_blimp"]["items"] == 3
    lines = tasks_table({name: found["tasks"] for name, found in result["models"].items()})
    assert lines.splitlines()[1] == "tiny_blimp (3 items)"
    assert lines.splitlines()[2].split()[0] == "acc"
    assert lines.count(" ± ") == 2
    for file in (tmp_path / "cache").glob("*/*.json"):
        kept = json.loads(file.read_text())
        kept["tasks"]["tiny_blimp"]["version"] = "as kept"
        file.write_text(json.dumps(kept))
    again = evaluate_checkpoints(settings(folders, [], log_samples=True, **fields))
    for name, found in again["models"].items():
        as_kept = result["models"][name]["tasks"]["tiny_blimp"] | {"version": "as kept"}
        assert found["tasks"]["tiny_blimp"] == as_kept
        assert len(found["samples"]["tiny_blimp"]) == 3


def test_command_with_text_and_tasks(checkpoints, files):
    result = evaluate_checkpoints(settings(checkpoints[:1], files, **TASKS))
    (found,) = result["models"].values()
    assert set(found) == {"parameters", "evaluation", "tasks"}
    text, tasks = tables(result["models"])
    assert text.lstrip().startswith(str(checkpoints[0]))
    assert "tiny_blimp" in tasks


def test_command_refuses_before_any_work(checkpoints, files):
    with pytest.raises(ValueError, match=r"files or --config\.tasks must name something"):
        evaluate_checkpoints(settings(checkpoints, []))
    with pytest.raises(FileNotFoundError, match="no such folder of tasks: nowhere"):
        evaluate_checkpoints(settings(["nowhere"], files, **TASKS | {"tasks_folder": "nowhere"}))
    with pytest.raises(ValueError, match="limit must be at least 0, got -2"):
        settings(["nowhere"], files, **TASKS | {"limit": -2})
    with pytest.raises(ValueError, match=r"dtype must be one of .*'bf16'"):
        settings(checkpoints, files, dtype="bf16")


def test_tasks_table_of_large_numbers():
    task = {"items": None, "metrics": {"perplexity": {"value": 71250241429.3, "stderr": None}}}
    assert tasks_table({"a": {"t": task}}).splitlines()[1:] == ["t", "  perplexity  7.125e+10"]
