"""Trains a small Mixture-of-Experts teacher from scratch and writes it as a Hugging Face folder.

    python tools/prepare_text.py --data=DATA --output=outputs/text
    python tools/train_teacher.py --config=configs/teacher_olmoe.py --config.output=outputs/olmoe

Run it again to go on after an interruption.
"""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app
from ml_collections import config_flags

from moe_jax.data import load_tokenizer, training_dataset
from moe_jax.distill import TrainingRun, TrainSettings, train
from moe_jax.hf.config_import import model_config
from moe_jax.hf.writer import save_hf
from moe_jax.model import init_params
from moe_jax.params import count_params
from moe_jax.settings import TrainingConfig

_CONFIG = config_flags.DEFINE_config_file("config", None, "Teacher configuration.")


def main(_: list[str]) -> None:
    config = _CONFIG.value
    logging.basicConfig(level=logging.INFO)
    output = Path(config.output)
    model = model_config(config.model.to_dict())
    counts = count_params(model)
    logging.info(
        "%s: %.1fM parameters, %.1fM active, %.0f%% in experts",
        model.family,
        counts.total / 1e6,
        counts.active / 1e6,
        100 * counts.experts / counts.total,
    )
    tokenizer = load_tokenizer(config.tokenizer)
    sources = {f"{config.text}/{name}.jsonl.xz": weight for name, weight in config.sources.items()}
    dataset = training_dataset(
        TrainingConfig(
            files=sources,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            cache_dir=config.cache or str(output / "tokens"),
        ),
        tokenizer,
        seed=config.seed,
        vocab_size=model.vocab_size,
    )
    params = init_params(model, jax.random.key(config.seed))
    settings = TrainSettings(**config.train.to_dict())
    params = train(params, model, dataset, settings, TrainingRun(output))
    source = output / "tokenizer"
    tokenizer.save_pretrained(source)
    (source / "config.json").write_text(config.model.to_json())
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    save_hf(output / "model", params, model, source=source)
    logging.info("wrote %s", output / "model")


if __name__ == "__main__":
    app.run(main)
