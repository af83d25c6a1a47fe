"""Tiny checkpoints with a tokenizer, tiny text, and the settings of a run on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tiny_hf import save_tiny
from tokenizers import Tokenizer, models, pre_tokenizers

from moe_jax.run.config import RunConfig

WORDS = [
    *("the", "expert", "router", "keeps", "some", "neurons", "of", "every", "layer"),
    *("and", "drops", "a", "novice"),
]
END, UNKNOWN = "<|endoftext|>", "<unk>"


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words."""
    vocabulary = {word: i for i, word in enumerate([END, UNKNOWN, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def save_model(folder: Path, family: str = "olmoe", **changes: Any) -> Path:
    """A random model that can read text."""
    save_tiny(folder, family, **changes)
    save_tokenizer(folder)
    return folder


def save_text(folder: Path, name: str, documents: int = 4, seed: int = 0) -> str:
    """JSON lines of random words; the name of the file."""
    rng = random.Random(f"{name} {seed}")
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(4, 30))) for _ in range(documents)]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def settings(folder: Path, *stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run's configuration: ``folder/model`` to ``folder/out``, two domains, held-out text."""
    text = [save_text(folder, name) for name in ("prose", "code", "held_out")]
    return {
        "model": str(folder / "model"),
        "output": str(folder / "out"),
        "calibration": {"files": text[:2], "num_sequences": 8, "seq_len": 16, "batch_size": 2},
        "evaluation": {"files": text[2:], "seq_len": 16, "batch_size": 2},
        "stages": stages,
        **changes,
    }


def make_run(folder: Path, *stages: dict[str, Any], **changes: Any) -> RunConfig:
    """The same as a checked configuration."""
    return RunConfig.from_dict(settings(folder, *stages, **changes))
