"""Documents from text files, JSON lines, parquet and Hugging Face datasets."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import lzma
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.data.tokenizer import tokenizer_digest

Files = str | Path | Sequence[str | Path]

_HUB_PREFIX = "hf:"
_EXTRA = 'pip install "moe_jax[data]"'
_FORMATS = ".txt, .jsonl (either may end in .gz or .xz), .parquet"


class Document(NamedTuple):
    """One text and the file (or ``hf:`` name) it comes from."""

    text: str
    source: str


def expand_files(files: Files) -> list[str]:
    """Files behind names and globs, each once, in the given order and sorted within a glob.

    Raises:
        FileNotFoundError: a name or a glob matches nothing.
        ValueError: no names at all, a folder, or a file of an unknown kind.
    """
    names = [files] if isinstance(files, (str, Path)) else list(files)
    expanded: list[str] = []
    for name in map(str, names):
        if name.startswith(_HUB_PREFIX):
            expanded.append(name)
            continue
        path = os.path.expanduser(name)
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise FileNotFoundError(f"no file matches {name!r}")
        for match in matches:
            if os.path.isdir(match):
                raise ValueError(f"{match} is a folder; name its files, as in {match}/*.jsonl")
            _check_format(match)
        expanded.extend(matches)
    if not expanded:
        raise ValueError("files must name at least one file, got none")
    return list(dict.fromkeys(expanded))


def read_documents(
    files: Files, max_documents: int | None = None, *, text_key: str = "text"
) -> Iterator[Document]:
    """Reads documents one by one, file after file; texts of white space only are left out.

    Args:
        files: names or globs. ``.txt``: one document per file. ``.jsonl``: one object per line.
            Both may be compressed (``.gz``, ``.xz``). ``.parquet``: one row per document.
            ``hf:name[:config][:split]``: a dataset of the Hugging Face hub, streamed (split
            ``train`` if not given; ``hf:name::test`` names a split without a configuration).
        max_documents: stop after so many, over all files.
        text_key: name of the JSON key or of the column that holds the text.

    Raises:
        FileNotFoundError: a name matches nothing. It and the next three are raised at the call,
            what concerns the contents while iterating.
        ValueError: a broken line (named by file and number), no ``text_key`` in it, or no text
            at all; a file of an unknown kind; ``max_documents`` below 1.
        ImportError: parquet or ``hf:`` without the ``data`` extra.
    """
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents must be at least 1, got {max_documents}")
    return _documents(expand_files(files), max_documents, text_key)


def domain_names(names: Sequence[str]) -> list[str]:
    """A short, unique name for each file: its stem, with folders in front where stems collide."""
    if len(set(names)) < len(names):
        raise ValueError(f"files must differ, got {list(names)}")
    parts = [_name_parts(name) for name in names]
    for depth in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-depth:]) for part in parts]
        if len(set(short)) == len(short):
            return short
    return list(names)


def fingerprint(files: Files, tokenizer: Any = None, **settings: Any) -> str:
    """Sha256 (hex) over file contents, the tokenizer and settings: equal if a result can be reused.

    Where the files lie does not matter; their order does. A ``hf:`` dataset counts by its name.

    Args:
        files: as in ``read_documents``.
        tokenizer: what ``load_tokenizer`` returns, or None where tokens play no part.
        settings: anything that JSON can hold.

    Raises:
        FileNotFoundError: a name matches nothing.
        ValueError: a setting that JSON cannot hold.
    """
    try:
        text = json.dumps(settings, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"settings must be JSON values, got {settings}: {error}") from error
    digest = hashlib.sha256(text.encode())
    if tokenizer is not None:
        digest.update(tokenizer_digest(tokenizer).encode())
    for name in expand_files(files):
        digest.update(_content_digest(name).encode())
    return digest.hexdigest()


def _documents(names: list[str], limit: int | None, text_key: str) -> Iterator[Document]:
    count = 0
    for name in names:
        for text in _texts(name, text_key):
            if not text.strip():
                continue
            yield Document(text, name)
            count += 1
            if count == limit:
                return
    if count == 0:
        raise ValueError(f"no text in {', '.join(names)}: every document is empty")


def _texts(name: str, text_key: str) -> Iterator[str]:
    if name.startswith(_HUB_PREFIX):
        yield from _hub_texts(name, text_key)
    elif name.endswith(".parquet"):
        yield from _parquet_texts(name, text_key)
    else:
        try:
            with _open(name) as file:
                yield from [file.read()] if _kind(name) == ".txt" else _lines(file, name, text_key)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} must be UTF-8 text: {error}") from error
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise ValueError(f"{name} is broken or incomplete: {error}") from error


def _lines(file: io.TextIOWrapper, name: str, text_key: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number}: broken JSON: {error}") from error
        yield _text(record, text_key, f"{name}, line {number}")


def _parquet_texts(name: str, text_key: str) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"reading {name} needs pyarrow: {_EXTRA}") from error
    with pyarrow.parquet.ParquetFile(name) as file:
        columns = file.schema_arrow.names
        if text_key not in columns:
            raise ValueError(f"{name}: no column {text_key!r}; its columns are {columns}")
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield _text({text_key: text}, text_key, f"{name}, row {number}")


def _hub_texts(name: str, text_key: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"reading {name} needs the datasets library: {_EXTRA}") from error
    dataset, config, split = _hub_parts(name)
    rows = datasets.load_dataset(dataset, config, split=split, streaming=True)
    for number, row in enumerate(rows, 1):
        yield _text(row, text_key, f"{name}, row {number}")


def _hub_parts(name: str) -> tuple[str, str | None, str]:
    dataset, *rest = name.removeprefix(_HUB_PREFIX).split(":")
    if not dataset or len(rest) > 2:
        raise ValueError(f"a dataset must be named hf:name[:config][:split], got {name!r}")
    config, split = (*rest, "", "")[:2]
    return dataset, config or None, split or "train"


def _text(record: Any, text_key: str, place: str) -> str:
    if not isinstance(record, dict) or text_key not in record:
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{place}: no key {text_key!r}, got {found}")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{place}: {text_key!r} must be text, got {type(text).__name__}")
    return text


def _kind(name: str) -> str:
    return Path(name.removesuffix(".gz").removesuffix(".xz")).suffix


def _check_format(name: str) -> None:
    if not name.endswith(".parquet") and _kind(name) not in (".txt", ".jsonl"):
        raise ValueError(f"{name}: unknown kind of file; known are {_FORMATS}")


def _open(name: str) -> io.TextIOWrapper:
    # "utf-8-sig" drops the byte order mark that some editors write, which breaks JSON.
    if name.endswith(".xz"):
        return io.TextIOWrapper(lzma.open(name), encoding="utf-8-sig")
    if name.endswith(".gz"):
        return io.TextIOWrapper(gzip.open(name), encoding="utf-8-sig")
    return open(name, encoding="utf-8-sig", newline="\n")


def _name_parts(name: str) -> list[str]:
    if name.startswith(_HUB_PREFIX):
        return [name.removeprefix(_HUB_PREFIX)]
    path = Path(name)
    stem = path.name
    for suffix in (".gz", ".xz", ".jsonl", ".txt", ".parquet"):
        stem = stem.removesuffix(suffix)
    return [*path.parts[:-1], stem]


def _content_digest(name: str) -> str:
    if name.startswith(_HUB_PREFIX):
        return hashlib.sha256(name.encode()).hexdigest()
    with open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
