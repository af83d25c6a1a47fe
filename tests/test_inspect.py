"""Sizes from configurations alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.config import DenseConfig, LayerConfig, ModelConfig, MoeConfig
from moe_jax.hf.config_export import export_config
from moe_jax.hf.config_import import model_config
from moe_jax.hf.folder import read_json
from moe_jax.inspect import describe
from moe_jax.kinds import GroupedQueryAttention
from moe_jax.params import count_params

FIXTURES = Path(__file__).parent / "fixtures"
PUBLISHED = {
    "phi_3_5_moe": (41_873_153_344, 6_640_999_744),
    "phi_mini_moe": (7_647_632_704, 2_362_809_664),
    "phi_tiny_moe": (3_755_220_288, 1_288_969_536),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    hf = read_json(FIXTURES / f"{name}.json")
    counts = count_params(model_config(hf))
    assert (counts.total, counts.active) == PUBLISHED[name]
    report = describe(hf)
    assert f"{counts.total:,}" in report
    assert f"{counts.active:,}" in report
    assert f"{2 * counts.total:,} bytes  (as stored)" in report


def test_published_configs_survive_export():
    for name in PUBLISHED:
        hf = read_json(FIXTURES / f"{name}.json")
        assert export_config(model_config(hf), hf) == hf


def test_layers_that_differ_have_rows_of_their_own():
    moe = LayerConfig(2, 1, MoeConfig(4, 2, 8, novice_ids=(1,)))
    dense = LayerConfig(2, 1, DenseConfig(12))
    config = ModelConfig(
        family="qwen3_moe",
        vocab_size=8,
        width=16,
        attention=GroupedQueryAttention(8, qk_norm="head"),
        layers=(moe, moe, dense, moe),
    )
    rows = describe(export_config(config)).splitlines()[-3:]
    assert [row.split()[0] for row in rows] == ["0-1", "2", "3"]
    assert rows[0].split()[1:7] == ["2", "1", "4", "1", "2", "8"]
    assert rows[1].split()[3:7] == ["-", "-", "-", "12"]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "moe_jax.inspect", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_prints_and_reports_errors_in_one_line(tmp_path):
    done = run(str(FIXTURES / "phi_tiny_moe.json"))
    assert done.returncode == 0
    assert "3,755,220,288" in done.stdout
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    failed = run(str(tmp_path))
    assert failed.returncode != 0
    assert failed.stderr.strip().splitlines()[-1].startswith("error: model_type must be one of")
