"""Selects freely licensed documents for the teachers and the text that ships with the package.

Reads ``{train,train_more,valid,test}/*.jsonl.xz`` under ``--data`` (one ``{"id", "text"}`` a
line; the id starts with its source) and writes one file per domain:

    python tools/prepare_text.py --data=DATA --output=outputs/text
    python tools/prepare_text.py --data=DATA --output=moe_jax/assets/text --ship

Sources kept are in the public domain or under CC0, MIT, BSD or Apache licences.
"""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags

_DATA = flags.DEFINE_string("data", None, "Folder of the source files.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
_SHIP = flags.DEFINE_bool("ship", False, "Write the small sets of the package only.")

# Domain -> (file stem, sources): licences in moe_jax/assets/text/README.md.
DOMAINS: dict[str, tuple[str, tuple[str, ...]]] = {
    "books": ("books", ("books",)),
    "web": ("web", ("digitalgov", "18f")),
    "encyclopedia": ("encyclopedia", ("eb4", "factbook")),
    "code_python": ("code_python", ("networkx", "sympy")),
    "code_go_js": ("code_c_go_js", ("prometheus", "eslint")),
    "techdocs": ("techdocs", ("peps", "rustbook", "rustblog")),
    "math_word": ("math", ("gsm8k",)),
    "math_symbolic": ("math_synth", ("dm_math",)),
}
# Part of the shipped text -> the split it is drawn from, bytes per domain.
SHIPPED = {
    "training": ("train", 700_000),
    "calibration": ("valid", 300_000),
    "evaluation": ("test", 110_000),
}
PIECE_BYTES = 6_000
# Published under the Open Publication License, or without a statement.
EXCLUDED_PEPS = [
    "3145",
    "0437",
    "0551",
    "0578",
    "0042",
    "0211",
    "0217",
    "0225",
    "0227",
    "0233",
    "0235",
    "0350",
    "0600",
    "0720",
    "0772",
    "3106",
]


def documents(data: Path, split: str, domain: str) -> Iterator[dict[str, str]]:
    """Documents of one domain and split, with an allowed source."""
    stem, sources = DOMAINS[domain]
    paths = [data / split / f"{stem}.jsonl.xz"]
    if split == "train":
        paths.append(data / "train_more" / f"{stem}_more.jsonl.xz")
    for path in paths:
        if not path.exists():
            continue
        with lzma.open(path, "rt") as lines:
            for line in lines:
                document = json.loads(line)
                source, name = document["id"].split("/", 1)
                excluded = source == "peps" and name[len("pep-") :][:4] in EXCLUDED_PEPS
                if source in sources and not excluded:
                    yield document


def write(path: Path, chosen: list[dict[str, str]], preset: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(path, "wt", preset=preset) as out:
        for document in chosen:
            out.write(json.dumps(document, ensure_ascii=False) + "\n")
    size = sum(len(document["text"].encode()) for document in chosen)
    print(f"{path}: {len(chosen)} documents, {size:,} bytes, {path.stat().st_size:,} compressed")


def sample(candidates: list[dict[str, str]], budget: int, seed: int) -> list[dict[str, str]]:
    """Random pieces of documents, cut at line ends, until ``budget`` bytes."""
    pieces = [piece for document in candidates for piece in cut(document)]
    random.Random(seed).shuffle(pieces)
    chosen: list[dict[str, str]] = []
    for piece in pieces:
        chosen.append(piece)
        budget -= len(piece["text"].encode())
        if budget <= 0:
            break
    return chosen


def cut(document: dict[str, str]) -> list[dict[str, str]]:
    """Consecutive pieces of about ``PIECE_BYTES``."""
    pieces: list[str] = [""]
    for line in document["text"].splitlines(keepends=True):
        if len(pieces[-1].encode()) >= PIECE_BYTES:
            pieces.append("")
        pieces[-1] += line
    return [
        {"id": document["id"] + (f"#part{n}" if n else ""), "text": text}
        for n, text in enumerate(pieces)
    ]


def main(_: list[str]) -> None:
    data, output = Path(_DATA.value), Path(_OUTPUT.value)
    for domain in DOMAINS:
        if _SHIP.value:
            for part, (split, size) in SHIPPED.items():
                candidates = list(documents(data, split, domain))
                chosen = sample(candidates, size, seed=0)
                write(output / part / f"{domain}.jsonl.xz", chosen, preset=9)
        else:
            write(output / f"{domain}.jsonl.xz", list(documents(data, "train", domain)), preset=1)


if __name__ == "__main__":
    app.run(main)
