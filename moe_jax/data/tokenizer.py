"""Tokenizers: loading without remote code, fast batches, what stands at a document's ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moe_jax.identity import text_sha256

# An encoding keeps offsets and masks beside its ids, some 100 bytes per token, so one call must
# not see a whole corpus, even where that is a single document.
MAX_CHARACTERS_PER_CALL = 2_000_000

Item = TypeVar("Item")

_END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")
_PADDING_NAMES = ("<|pad|>", "<pad>", "[PAD]")


def load_tokenizer(folder_or_file: str | Path) -> Any:
    """Reads a tokenizer from a model folder or from a bare ``tokenizer.json``.

    No code that comes with a checkpoint is executed. Where there is a ``tokenizer.json``, it alone
    says how text is split, whatever class ``tokenizer_config.json`` names; the latter adds special
    tokens and chat templates. A bare file does not say which token ends a text, so the usual names
    are looked up in its vocabulary.

    Args:
        folder_or_file: folder with tokenizer files, a ``*.json`` of the `tokenizers` library, or
            the id of a Hugging Face model.

    Returns:
        A ``transformers`` tokenizer whose ``eos_token`` and ``pad_token`` are set.

    Raises:
        FileNotFoundError: there is no such file or folder, or no tokenizer in the folder.
        ValueError: the tokenizer cannot be read, or no token ends a text.
    """
    path = Path(folder_or_file).expanduser()
    if not path.exists() and (path.is_absolute() or path.suffix or len(path.parts) > 2):
        raise FileNotFoundError(f"no tokenizer at {path}: neither a file nor a folder")
    # Of a folder without any, transformers would make up an empty tokenizer.
    if path.is_dir() and not any(file for name in _FILES for file in path.glob(name)):
        raise FileNotFoundError(
            f"{path} holds no tokenizer, which turns text into tokens; copy tokenizer.json and "
            "tokenizer_config.json of the model there"
        )
    try:
        tokenizer = _read(path, str(folder_or_file))
    except Exception as error:  # the Rust library raises plain Exception
        raise ValueError(
            f"{folder_or_file} must be a tokenizer, but reading it: {error}"
        ) from error
    vocabulary = tokenizer.get_vocab()
    if tokenizer.eos_token_id is None:
        end = next((name for name in _END_OF_TEXT_NAMES if name in vocabulary), None)
        if end is None:
            raise ValueError(
                f"{folder_or_file}: the tokenizer must have an end-of-text token, and none of "
                f"{', '.join(_END_OF_TEXT_NAMES)} is in its vocabulary"
            )
        tokenizer.eos_token = end
    if tokenizer.pad_token_id is None:
        names = (name for name in _PADDING_NAMES if name in vocabulary)
        tokenizer.pad_token = next(names, tokenizer.eos_token)
    return tokenizer


def _read(path: Path, name: str) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if path.is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    if (path / "tokenizer.json").is_file():
        # Not AutoTokenizer: the class that a configuration names builds a splitter of its own from
        # the vocabulary, and gives other ids without a word.
        if not (path / "tokenizer_config.json").is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
        return PreTrainedTokenizerFast.from_pretrained(str(path))
    place = str(path) if path.exists() else name
    return AutoTokenizer.from_pretrained(place, trust_remote_code=False)


def boundary_tokens(tokenizer: Any) -> tuple[int, int]:
    """Ids of the tokens that stand before and after a document.

    Before it: the beginning-of-text token where the tokenizer puts one itself, else end-of-text,
    which is what a model that was trained on joined documents has seen there.

    Raises:
        ValueError: the tokenizer has no end-of-text token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer must have an end-of-text token; set tokenizer.eos_token")
    first = tokenizer("")["input_ids"][:1]
    begins = tokenizer.bos_token_id is not None and list(first) == [tokenizer.bos_token_id]
    return (tokenizer.bos_token_id if begins else end), end


def encode_documents(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text, without any special token around them.

    Texts of more than two million characters are cut at line ends and encoded piece by piece.

    Returns:
        One Int32[N] per text.

    Raises:
        ValueError: the tokenizer meets what it has no token for.
    """
    pieces = [_pieces(text) for text in texts]
    flat = [piece for parts in pieces for piece in parts]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    encoded: list[np.ndarray] = []
    for batch in bounded_batches(flat, len):
        if backend is None:
            ids = tokenizer(batch, add_special_tokens=False)["input_ids"]
        else:
            # A tokenizer.json may carry its model's truncation, which must not cut documents.
            if backend.truncation is not None:
                backend.no_truncation()
            if backend.padding is not None:
                backend.no_padding()
            try:
                encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
            except Exception as error:  # the Rust library raises plain Exception
                raise ValueError(f"the tokenizer cannot encode the text: {error}") from error
            ids = [encoding.ids for encoding in encodings]
        encoded.extend(np.array(row, np.int32) for row in ids)
    if len(flat) == len(texts):
        return encoded
    rows = iter(encoded)
    return [np.concatenate([next(rows) for _ in parts]) for parts in pieces]


def between(
    before: Sequence[int], ids: np.ndarray, after: Sequence[int], is_chat: bool
) -> np.ndarray:
    """Int32[N], a document between its boundary tokens.

    A chat template may have written some of them into the text: these are not doubled.
    """
    if is_chat:
        before = () if list(ids[:1]) == list(before) else before
        after = () if list(ids[-1:]) == list(after) else after
    return np.concatenate((before, ids, after)).astype(np.int32)


def largest_token_id(tokenizer: Any) -> int:
    """The largest id in the tokenizer's vocabulary."""
    return max(tokenizer.get_vocab().values())


def tokenizer_digest(tokenizer: Any) -> str:
    """Sha256 (hex) over everything that decides how a tokenizer turns documents into ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        definition = json.dumps(sorted(tokenizer.get_vocab().items()))
    else:
        parts = json.loads(backend.to_str())
        # Both are ignored above, and calling the tokenizer elsewhere changes them.
        parts.pop("truncation", None)
        parts.pop("padding", None)
        definition = json.dumps(parts, sort_keys=True)
    text = f"{type(tokenizer).__name__} {boundary_tokens(tokenizer)} {definition}"
    return text_sha256(text)


def _pieces(text: str) -> list[str]:
    pieces = []
    start = 0
    while len(text) - start > MAX_CHARACTERS_PER_CALL:
        stop = text.rfind("\n", start, start + MAX_CHARACTERS_PER_CALL) + 1
        stop = stop if stop > start else start + MAX_CHARACTERS_PER_CALL
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


def bounded_batches(items: Iterable[Item], length: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Items in order, in lists of at most ``MAX_CHARACTERS_PER_CALL`` or of one that is longer."""
    batch: list[Item] = []
    size = 0
    for item in items:
        if batch and size + length(item) > MAX_CHARACTERS_PER_CALL:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += length(item)
    if batch:
        yield batch
