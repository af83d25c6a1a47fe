"""Warnings about sizes that serving engines refuse."""

import json
import re

import pytest
from public_models import PUBLIC

from moe_jax.hf.config_import import model_config
from moe_jax.report.markdown import model_card
from moe_jax.run.config import RunConfig
from moe_jax.run.describe import describe_loader
from moe_jax.run.dry_run import dry_run
from moe_jax.run.serving import ServeConfig, serving_warnings


def _model(**changes):
    config = model_config(PUBLIC["qwen3_30b_a3b"].hf)  # 128 experts of 768 neurons
    for i in config.moe_layers:
        config = config.replace_moe(i, **changes)
    return config


@pytest.mark.parametrize(
    ("changes", "serve", "expected"),
    [
        ({}, ServeConfig(), ()),
        ({"expert_width": 300}, ServeConfig(), ()),
        ({}, ServeConfig(2, 8), ()),
        ({}, ServeConfig(4), ("192 neurons on each of 4 devices.*FP8.*round_to = 512",)),
        ({"expert_width": 640}, ServeConfig(8), ("80 neurons on each of 8.*round_to = 512",)),
        (
            {"num_experts": 120},
            ServeConfig(1, 16),
            ("120 experts .* 16 devices",),
        ),
        ({"num_experts": 120}, ServeConfig(1, 8), ("120 experts are no multiple of 16",)),
        ({"novice_ids": (0,)}, ServeConfig(1), ("No serving engine reads it as it is. Experts",)),
    ],
)
def test_sizes_are_named_with_their_cure(changes, serve, expected):
    found = serving_warnings(_model(**changes), serve)
    assert len(found) == len(expected)
    for text, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, text), text


def test_a_dry_run_says_so(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PUBLIC["qwen3_30b_a3b"].hf))
    run = RunConfig.from_dict(
        {
            "model": str(file),
            "output": "x",
            "calibration": {"files": ["a.txt"]},
            "stages": [{"method": "token_fisher", "expert_width": 600}],
            "serve": {"tensor_parallel": 2},
        }
    )
    assert "round_to = 128" in dry_run(run)
    with pytest.raises(ValueError, match=r"serve\.tensor_parallel must be at least 0, got -1"):
        RunConfig.from_dict({**run.to_dict(), "serve": {"tensor_parallel": -1}})


@pytest.mark.parametrize(
    ("changes", "model_type", "serve", "remote", "command"),
    [
        ({}, "qwen3_moe", ServeConfig(), False, "vllm serve ."),
        (
            {},
            "qwen3_moe",
            ServeConfig(4, 8),
            False,
            "vllm serve . --tensor-parallel-size 8 --enable-expert-parallel",
        ),
        (
            {"novice_ids": (0,)},
            "",
            ServeConfig(2),
            True,
            "transformers serve . --trust-remote-code",
        ),
    ],
)
def test_a_card_says_who_reads_the_result_and_how_it_is_served(
    changes, model_type, serve, remote, command
):
    loader = describe_loader(_model(**changes), model_type, "bfloat16", serve)
    assert (loader["trust_remote_code"], loader["serve"]) == (remote, command)
    card = model_card({"loader": loader})
    assert f"```bash\n{command}\n```" in card
    assert ("vLLM and SGLang read it where they read its source." in card) is not remote


def test_a_card_says_that_kimi_brings_its_own_code():
    config = model_config({**PUBLIC["deepseek_v3"].hf, "model_type": "kimi_k2"})
    loader = describe_loader(config, "kimi_k2", "bfloat16", ServeConfig())
    assert loader["trust_remote_code"]
    assert "transformers does not know kimi_k2" in loader["notes"][0]


def test_a_card_says_that_novices_of_gpt_oss_keep_their_bytes():
    config = model_config(PUBLIC["gpt_oss_20b"].hf).replace_moe(0, novice_ids=(3,))
    loader = describe_loader(config, "gpt_oss", "bfloat16", ServeConfig())
    assert not loader["trust_remote_code"]
    assert any("they take as many bytes as before" in note for note in loader["notes"])
