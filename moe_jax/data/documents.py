"""Documents from text files, JSON lines, parquet and Hugging Face datasets; chats as texts."""

from __future__ import annotations

import dataclasses
import glob
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from moe_jax.data.tokenizer import tokenizer_digest
from moe_jax.identity import file_sha256, text_sha256

Files = str | Path | Sequence[str | Path]

_HUB_PREFIX = "hf:"
_EXTRA = 'pip install "moe_jax[data]"'
_FORMATS = ".txt, .jsonl (either may end in .gz or .xz), .parquet"
_WITH_COLUMN = re.compile(r"(.+\.(?:jsonl(?:\.gz|\.xz)?|parquet)):([^:/]+)(?::([^:/]+))?")
# What the decompressors raise for bytes that are not what they wrote.
_DAMAGE = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile)
# Roles in the ShareGPT layout ({"from": ..., "value": ...}) and in that of chat templates.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}


class Document(NamedTuple):
    """One text, the file (or ``hf:`` name) it comes from, and whether a chat template made it."""

    text: str
    source: str
    is_chat: bool = False


class _Source(NamedTuple):
    """An entry of ``files``, taken apart; ``column`` and ``template`` are empty where not said."""

    path: str
    column: str = ""
    template: str = ""

    @property
    def key(self) -> str:
        return self.column or "text"

    def entry(self, path: str) -> str:
        return ":".join(filter(None, (path, self.column, self.template)))


def expand_files(files: Files) -> list[str]:
    """Files behind names and globs, each once, in the given order and sorted within a glob.

    A name keeps its column and template: ``*.jsonl:messages`` gives ``a.jsonl:messages`` and so on.

    Raises:
        FileNotFoundError: a name or a glob matches nothing.
        ValueError: no names at all, a folder, or a file of an unknown kind.
    """
    names = [files] if isinstance(files, (str, Path)) else list(files)
    expanded: list[str] = []
    for name in map(str, names):
        source = _source(name)
        if name.startswith(_HUB_PREFIX):
            expanded.append(name)
            continue
        path = os.path.expanduser(source.path)
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise FileNotFoundError(f"no file matches {name!r}")
        for match in matches:
            if os.path.isdir(match):
                raise ValueError(f"{match} is a folder; name its files, as in {match}/*.jsonl")
            if not match.endswith(".parquet") and _kind(match) not in (".txt", ".jsonl"):
                raise ValueError(f"{match}: unknown kind of file; known are {_FORMATS}")
        expanded.extend(map(source.entry, matches))
    if not expanded:
        raise ValueError("files must name at least one file, got none")
    return list(dict.fromkeys(expanded))


def read_documents(
    files: Files, max_documents: int | None = None, *, tokenizer: Any = None
) -> Iterator[Document]:
    """Reads documents one by one, file after file; texts of white space only are left out.

    Args:
        files: names or globs. ``.txt``: one document per file. ``.jsonl``: one object per line.
            Both may be compressed (``.gz``, ``.xz``). ``.parquet``: one row per document.
            ``hf:name[:config][:split]``: a dataset of the Hugging Face hub, streamed (split
            ``train`` if not given; ``hf:name::test`` names a split without a configuration).
            A text is under the key or in the column ``text``, or the one that is named after the
            file: ``chat.jsonl:messages``, ``hf:name:config:split:messages``. Where such a column
            holds lists of messages (``role`` and ``content``, or ``from`` and ``value``), the
            tokenizer's chat template makes a text of each; ``chat.jsonl:messages:NAME`` takes the
            one called NAME of a tokenizer that has several.
        max_documents: stop after so many, over all files.
        tokenizer: what ``load_tokenizer`` returns; needed for messages alone.

    Raises:
        FileNotFoundError: a name matches nothing. It and the next three are raised at the call,
            what concerns the contents while iterating.
        ValueError: a broken line (named by file and number), one without its column, messages
            that the template refuses, or no text at all; a file of an unknown kind;
            ``max_documents`` below 1.
        ImportError: parquet or ``hf:`` without the ``data`` extra.
    """
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents must be at least 1, got {max_documents}")
    return _documents(expand_files(files), max_documents, tokenizer)


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
        tokenizer: what ``load_tokenizer`` returns, or None where tokens play no part.

    Raises:
        FileNotFoundError: a name matches nothing.
        ValueError: a setting that JSON cannot hold.
    """
    try:
        text = json.dumps(settings, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"settings must be JSON values, got {settings}: {error}") from error
    parts = [text]
    if tokenizer is not None:
        parts += [tokenizer_digest(tokenizer), chat_template_of(files, tokenizer)]
    parts += [_content_digest(_source(name)) for name in expand_files(files)]
    return text_sha256("".join(parts))


def text_digest(files: Files, tokenizer: Any, section: Any, **more: Any) -> str:
    """Digest of all that decides which tokens the settings of a section, a dataclass, give."""
    settings = dataclasses.asdict(section) | more
    del settings["files"]
    for name in ("second_moment_bytes", "mode"):  # how it is measured, not what
        settings.pop(name, None)
    return fingerprint(files, tokenizer, **settings)


def text_hashes(files: Sequence[str]) -> dict[str, str]:
    """Sha256 of the content of each file."""
    return {file: fingerprint([file]) for file in files}


def chat_template_of(files: Files, tokenizer: Any) -> str:
    """The tokenizer's chat templates where they play a part: where a file's column is named."""
    if any(_source(name).column for name in expand_files(files)):
        return repr(getattr(tokenizer, "chat_template", None))
    return ""


def _documents(names: list[str], limit: int | None, tokenizer: Any) -> Iterator[Document]:
    count = 0
    for name in names:
        source = _source(name)
        for place, value in _values(source):
            text, is_chat = value, False
            if source.column and isinstance(value, list):
                text, is_chat = _chat_text(value, tokenizer, source.template, place), True
            if not isinstance(text, str):
                kind = type(text).__name__
                hint = f"; {source.path}:{source.key} takes messages" if kind == "list" else ""
                raise ValueError(f"{place}: {source.key!r} must be text, got {kind}{hint}")
            if not text.strip():
                continue
            yield Document(_encodable(text), name, is_chat)
            count += 1
            if count == limit:
                return
    if count == 0:
        raise ValueError(f"no text in {', '.join(names)}: every document is empty")


def _encodable(text: str) -> str:
    """The text with U+FFFD for each lone surrogate: JSON allows them, UTF-8 does not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _chat_text(messages: list[Any], tokenizer: Any, template: str, place: str) -> str:
    """One conversation as the tokenizer's chat template writes it."""
    if tokenizer is None:
        raise ValueError(f"{place}: a tokenizer is required to read messages, got None")
    templates = getattr(tokenizer, "chat_template", None)
    if not templates:
        raise ValueError(f"{place}: the tokenizer has no chat template, which messages take")
    if template and not (isinstance(templates, dict) and template in templates):
        known = sorted(templates) if isinstance(templates, dict) else "a single one"
        raise ValueError(f"{place}: no chat template {template!r}; the tokenizer has {known}")
    try:
        conversation = [_message(message) for message in messages]
        return tokenizer.apply_chat_template(
            conversation, chat_template=template or None, tokenize=False
        )
    except Exception as error:  # a template may do anything, and jinja raises what it likes
        raise ValueError(f"{place}: the chat template refuses the messages: {error}") from error


def _message(raw: Any) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise ValueError(f"a message must be a dict, got {type(raw).__name__}")
    # Parquet gives every message all keys, and None for those that it lacks.
    message = {key: value for key, value in raw.items() if value is not None}
    if "from" in message and "role" not in message:
        role = message.pop("from")
        message = {"role": _ROLES.get(role, role), "content": message.pop("value", ""), **message}
    return message


def _values(source: _Source) -> Iterator[tuple[str, Any]]:
    """Where each value of the source's column stands, and the value."""
    if source.path.startswith(_HUB_PREFIX):
        return _hub_values(source)
    if source.path.endswith(".parquet"):
        return _parquet_values(source)
    return _file_values(source)


def _file_values(source: _Source) -> Iterator[tuple[str, Any]]:
    path, number = source.path, 0
    try:
        with _open(path) as file:
            if _kind(path) == ".txt":
                # "utf-8-sig" drops the byte order mark that some editors write.
                yield path, file.read().decode("utf-8-sig")
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield place, _value(_parsed(line, number, place), source.key, place)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from error
    except _DAMAGE as error:
        after = f" after line {number}" if number else ""
        raise ValueError(f"{path} is broken or incomplete{after}: {error}") from error


def _parsed(line: bytes, number: int, place: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} must be UTF-8 text: {error}") from error
    except (ValueError, RecursionError) as error:  # also of a number with too many digits
        raise ValueError(f"{place}: broken JSON: {error}") from error


def _parquet_values(source: _Source) -> Iterator[tuple[str, Any]]:
    path, key = source.path, source.key
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"reading {path} needs pyarrow: {_EXTRA}") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if key not in columns:
                raise ValueError(f"{path}: no column {key!r}; its columns are {columns}")
            for batch in file.iter_batches(batch_size=1024, columns=[key]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f"{path}, row {number}", value
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        after = f" after row {number}" if number else ""
        raise ValueError(f"{path} is broken or incomplete{after}: {error}") from error


def _hub_values(source: _Source) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"reading {source.path} needs the datasets library: {_EXTRA}") from error
    dataset, config, split, *_ = f"{source.path.removeprefix(_HUB_PREFIX)}::".split(":")
    rows = datasets.load_dataset(dataset, config or None, split=split or "train", streaming=True)
    for number, row in enumerate(rows, 1):
        place = f"{source.path}, row {number}"
        yield place, _value(row, source.key, place)


def _value(record: Any, key: str, place: str) -> Any:
    if not isinstance(record, dict) or key not in record:
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{place}: no key {key!r}, got {found}")
    return record[key]


def _source(name: str) -> _Source:
    if name.startswith(_HUB_PREFIX):
        dataset, *rest = name.removeprefix(_HUB_PREFIX).split(":")
        if not dataset or len(rest) > 4:
            form = "hf:name[:config][:split][:column][:template]"
            raise ValueError(f"a dataset must be named {form}, got {name!r}")
        return _Source(_HUB_PREFIX + ":".join([dataset, *rest[:2]]), *rest[2:])
    if not os.path.exists(os.path.expanduser(name)) and (found := _WITH_COLUMN.fullmatch(name)):
        return _Source(found[1], found[2], found[3] or "")
    return _Source(name)


def _kind(path: str) -> str:
    return Path(path.removesuffix(".gz").removesuffix(".xz")).suffix


def _open(path: str) -> BinaryIO:
    if path.endswith(".xz"):
        return io.BufferedReader(lzma.open(path))  # type: ignore[arg-type]
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.open(path))  # type: ignore[arg-type]
    return open(path, "rb")


def _name_parts(name: str) -> list[str]:
    source = _source(name)
    if name.startswith(_HUB_PREFIX):
        return [source.path.removeprefix(_HUB_PREFIX)]
    path = Path(source.path)
    stem = path.name
    for suffix in (".gz", ".xz", ".jsonl", ".txt", ".parquet"):
        stem = stem.removesuffix(suffix)
    return [*path.parts[:-1], stem]


def _content_digest(source: _Source) -> str:
    if source.path.startswith(_HUB_PREFIX):
        return text_sha256(source.entry(source.path))
    return source.entry(file_sha256(source.path))
