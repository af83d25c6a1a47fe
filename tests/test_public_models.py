"""Sizes of public models, and dry runs of their configurations."""

import json
import runpy
from decimal import Decimal
from pathlib import Path

import pytest
from public_models import PUBLIC

from moe_jax.hf.config_import import model_config
from moe_jax.params import count_params
from moe_jax.run.config import RunConfig
from moe_jax.run.dry_run import dry_run

MODELS = Path(__file__).parents[1] / "configs" / "models"


@pytest.mark.parametrize("name", PUBLIC)
def test_parameters_are_those_published(name):
    """To one unit of the last digit; authors round and cut off, and some leave out embeddings."""
    public, config = PUBLIC[name], model_config(PUBLIC[name].hf)
    counts = count_params(config)
    assert round(counts.total / 1e9, 2) == public.total
    assert round(counts.active / 1e9, 2) == public.active
    assert public.left_out <= 2 - config.tied_embeddings
    embeddings = public.left_out * config.vocab_size * config.width
    ours = (counts.total, counts.active - embeddings)
    for count, text in zip(ours, map(Decimal, public.published), strict=True):
        assert abs(count / 1e9 - float(text)) < 10.0 ** text.as_tuple().exponent


def test_every_configuration_has_its_model_here():
    assert {file.stem for file in MODELS.glob("*.py")} - {"base"} == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_dry_run_reads_a_configuration_alone(name, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**PUBLIC[name].hf, "dtype": "bfloat16"}))
    config = runpy.run_path(str(MODELS / f"{name}.py"))["get_config"]()
    config.model, config.output, config.dry_run = str(file), str(tmp_path / "out"), True
    run = RunConfig.from_dict(config.to_dict())
    text = dry_run(run)
    total = count_params(model_config(PUBLIC[name].hf)).total
    assert f"{total:,}" in text
    assert "128 x 2048 = 262,144 tokens a pass" in text
    assert not (tmp_path / "out").exists()
    assert "dry_run" not in run.to_dict()


def test_kimi_turns_all_frequencies_alike():
    """Its file has beta_fast = beta_slow = 1, where the ramp is a step."""
    kimi = {
        **PUBLIC["deepseek_v3"].hf,
        "model_type": "kimi_k2",
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "vocab_size": 163840,
        "n_routed_experts": 384,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.827,
        "rope_scaling": {
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
    }
    counts = count_params(model_config(kimi))
    assert round(counts.total / 1e12, 2) == 1.03
    assert round(counts.active / 1e9, 1) == 32.9


def test_a_dry_run_refuses_what_the_model_cannot_go_through(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PUBLIC["deepseek_v3"].hf))
    cut = {"method": "reap", "replacement": "delete", "keep_experts": 100}
    run = RunConfig.from_dict(
        {"model": str(file), "output": "x", "calibration": {"files": ["a.txt"]}, "stages": [cut]}
    )
    with pytest.raises(ValueError, match=r"stages\[0\].*multiple of 8"):
        dry_run(run)
