"""Converts a checkpoint between a Hugging Face folder and an orbax folder.

    python -m moe_jax.convert --config=configs/convert.py --config.source=MODEL --config.output=DIR

The direction follows from the source: an orbax folder written by this command becomes a Hugging
Face folder, anything else (a folder, or the id of a hub repository) is read as Hugging Face and
becomes orbax. Tokenizer, templates and ``config.json`` travel along, and there and back gives the
same tensors, names and files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from absl import logging
from ml_collections import ConfigDict

from moe_jax.checkpoint import open_params, save_params
from moe_jax.cli import run_with_config
from moe_jax.config import ModelConfig
from moe_jax.files import MARKER, check_apart, check_output_folder, replacing_folder
from moe_jax.hf.folder import CONFIG, file_inside, find_folder, read_json, sidecar_files
from moe_jax.hf.nested import text_prefix
from moe_jax.hf.reader import open_hf
from moe_jax.hf.source import stored_layout
from moe_jax.hf.writer import save_hf
from moe_jax.params import count_params
from moe_jax.settings import DTYPES, check_dtype, field_help, section, setting


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert."""

    source: str = setting("", "Folder, or hub id, to read.")
    output: str = setting(
        "", "Folder to write: absent, empty, or an earlier output of this package."
    )
    dtype: str = setting("", "Of the result; empty keeps that of each tensor.", choices=DTYPES)
    max_shard_bytes: int = setting(
        5_000_000_000, "Largest file of weights in a Hugging Face folder.", bounds=">= 1"
    )


__doc__ = f"{__doc__}\n{field_help(ConvertConfig)}\n"

# Content of an orbax folder: the architecture, the weights, and the small files of the original.
MODEL_CONFIG = "model_config.json"
PARAMS = "params"
SIDECARS = "huggingface"


def convert(
    source: str | Path, output: str | Path, dtype: str | None = None, max_shard_bytes: float = 5e9
) -> ModelConfig:
    """Reads ``source`` in either format and writes ``output``, atomically, in the other.

    Raises:
        FileNotFoundError: no such source.
        FileExistsError: ``output`` holds something else.
        ValueError: a damaged or unsupported source, see ``load_hf``.
    """
    check_dtype(dtype or "")
    check_output_folder(output)
    folder = find_folder(source)
    check_apart(folder, output)
    if (folder / MODEL_CONFIG).exists():
        return _orbax_to_hf(folder, output, dtype, max_shard_bytes)
    return _hf_to_orbax(folder, output, dtype)


def _hf_to_orbax(source: Path, output: str | Path, dtype: str | None) -> ModelConfig:
    if text_prefix(read_json(file_inside(source, CONFIG))):
        raise ValueError(
            f"{source}: what surrounds the text model has no place in an orbax folder; compress "
            "and evaluate read such a checkpoint as it is"
        )
    config, params = open_hf(source, dtype=dtype)
    layout = stored_layout(config, source)
    nbytes = sum(array.nbytes for array in jax.tree.leaves(params))
    with replacing_folder(output, nbytes) as temporary:
        (temporary / MODEL_CONFIG).write_text(config.to_json(), encoding="utf-8")
        save_params(temporary / PARAMS, params)
        sidecars = temporary / SIDECARS
        sidecars.mkdir()
        for name, file in {CONFIG: file_inside(source, CONFIG), **sidecar_files(source)}.items():
            (sidecars / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, sidecars / name)
        marker = json.dumps({"format": 1, **layout}) + "\n"
        (sidecars / MARKER).write_text(marker, encoding="utf-8")
        (temporary / MARKER).write_text(marker, encoding="utf-8")
    return config


def _orbax_to_hf(
    source: Path, output: str | Path, dtype: str | None, max_shard_bytes: float
) -> ModelConfig:
    config = ModelConfig.from_json((source / MODEL_CONFIG).read_text(encoding="utf-8"))
    params = open_params(source / PARAMS, config)
    save_hf(
        output,
        params,
        config,
        source=source / SIDECARS,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )
    return config


def main(settings: ConfigDict, _: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # orbax tells every step otherwise
    asked = section(ConvertConfig, settings.to_dict())
    for field in ("source", "output"):
        if not getattr(asked, field):
            raise ValueError(f"--config.{field} must name a folder, got none")
    config = convert(asked.source, asked.output, asked.dtype or None, asked.max_shard_bytes)
    print(f"{asked.output}: {config.family}, {count_params(config).total:,} parameters")


if __name__ == "__main__":
    run_with_config(main, "What to convert, such as configs/convert.py.")
