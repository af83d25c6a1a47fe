"""The card of a teacher: written from a model, the log of its training and text."""

import json
import lzma
import random
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from moe_jax.hf import save_hf
from moe_jax.hf.config_import import model_config
from moe_jax.model import init_params

REPOSITORY = Path(__file__).parents[1]
WORDS = ["expert", "router", "token", "layer", "novice", "width"]
MODEL = {
    "model_type": "olmoe",
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
CONFIG = f"""
from ml_collections import ConfigDict


def get_config():
    train = {{
        "steps": 30,
        "learning_rate": 0.001,
        "warmup_steps": 5,
        "weight_decay": 0.1,
        "balance_weight": 0.01,
        "compute_dtype": "float32",
    }}
    sources = {{"books": 3.0, "web": 1.0}}
    return ConfigDict(
        dict(model={MODEL!r}, train=train, sources=sources, seq_len=16, batch_size=4)
    )
"""


def save_text(folder, name, seed):
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with lzma.open(folder / f"{name}.jsonl.xz", "wt") as lines:
        for _ in range(6):
            lines.write(json.dumps({"text": " ".join(generator.choices(WORDS, k=20))}) + "\n")


@pytest.fixture
def trained(tmp_path):
    config = model_config(MODEL)
    save_hf(tmp_path / "model", init_params(config, jax.random.key(0)), config)
    vocabulary = {word: i for i, word in enumerate(["<|endoftext|>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    for n, domain in enumerate(("books", "web")):
        save_text(tmp_path / "text" / "calibration", domain, n)
        save_text(tmp_path / "text" / "evaluation", domain, n + 2)
    # Interrupted after step 20, resumed from step 10.
    steps = [10, 20, 20, 30]
    lines = [{"step": s, "lm": 3 - s / 20, "tokens_per_second": 16.0} for s in steps]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "config.py").write_text(CONFIG)
    return tmp_path


@pytest.mark.slow
def test_card_holds_what_was_measured(trained):
    folder = trained / "model"
    subprocess.run(
        [
            sys.executable,
            REPOSITORY / "tools" / "teacher_card.py",
            f"--model={folder}",
            f"--training={trained}",
            f"--config={trained / 'config.py'}",
            f"--text={trained / 'text'}",
            "--hardware=1 abacus",
            "--sequences=8",
        ],
        cwd=REPOSITORY,
        check=True,
    )
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name:")
    lines = [line.strip("| ") for line in card.splitlines() if line.startswith("| ")]
    rows = dict(line.split(" | ", 1) for line in lines if " | " in line)
    assert rows["steps"] == "30"
    assert rows["tokens in all"] == f"{30 * 4 * 16:,}"
    assert rows["hardware"] == "1 abacus"
    # 30 steps of 64 tokens at 16 tokens a second.
    assert rows["wall time"] == "about 2 minutes"
    assert "undertrained" in card
    # An untrained model knows nothing: each of the 16 entries is as likely as the others.
    perplexity = float(rows["**all text**"].split(" | ")[1])
    assert np.isclose(perplexity, MODEL["vocab_size"], rtol=0.1)
    assert 0 <= float(rows["0"].split(" | ")[0]) <= 1
    for picture in ("loss.png", "routing.png"):
        assert 1_000 < (folder / picture).stat().st_size < 100_000
