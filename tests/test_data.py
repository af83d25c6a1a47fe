"""Documents in, batches out: nothing lost, nothing twice, the same again for the same seed."""

import collections
import dataclasses
import gzip
import itertools
import json
import logging
import lzma
import math
import random
import sys
import types

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from moe_jax import data
from moe_jax.data import documents, training
from moe_jax.data import tokenizer as tokenizer_module
from moe_jax.settings import CalibrationConfig, EvaluationConfig, TrainingConfig

SENTENCE = "the expert router keeps some neurons of every layer and drops a novice"
WORDS = SENTENCE.split()


def make_texts(count, seed=0, longest=60):
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for i in range(count)]


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return str(path)


def bare_tokenizer(path, end="<|endoftext|>", vocab_size=300):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end, "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_texts(50), trainer)
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    return bare_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bpe.json")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file):
    return data.load_tokenizer(tokenizer_file)


@pytest.fixture
def train(tokenizer, tmp_path):
    """`training_dataset` with small defaults."""

    def make(sources, **changes):
        options = {"seq_len": 32, "batch_size": 4, "seed": 0, "cache_dir": str(tmp_path / "cache")}
        options |= changes
        names = [field.name for field in dataclasses.fields(TrainingConfig)]
        own = {name: options.pop(name) for name in names if name in options}
        return data.training_dataset(TrainingConfig(files=sources, **own), tokenizer, **options)

    return make


def take(dataset, count):
    return list(itertools.islice(dataset, count))


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def segments(batch):
    """Token lists of the segments of a batch, row by row."""
    for tokens, ids in zip(batch["tokens"], batch["segment_ids"], strict=True):
        for segment in range(1, ids.max(initial=0) + 1):
            yield tokens[ids == segment].tolist()


# ---------------------------------------------------------------- tokenizers


def test_a_bare_file_and_a_folder_give_the_same_tokenizer(tokenizer, tokenizer_file, tmp_path):
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    for folder in ("model", "bare"):
        again = data.load_tokenizer(tmp_path / folder)
        assert again("some neurons")["input_ids"] == tokenizer("some neurons")["input_ids"]
        assert again.eos_token_id == 0


@pytest.mark.parametrize("named", ["Qwen2Tokenizer", "GPT2Tokenizer", "T5Tokenizer", "Own", None])
def test_the_file_decides_not_the_class_that_a_configuration_names(tokenizer_file, tmp_path, named):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    special = {"eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"}
    own_code = {"auto_map": {"AutoTokenizer": ["own.Own", None]}} if named == "Own" else {}
    raw = special | own_code | ({"tokenizer_class": named} if named else {})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(raw))
    loaded = data.load_tokenizer(tmp_path)
    text = "12 experts,  don't\n\tsplit otherwise"
    expected = Tokenizer.from_file(str(tokenizer_file)).encode(text).ids
    assert tokenizer_module.encode_documents(loaded, [text])[0].tolist() == expected
    assert loaded.chat_template == special["chat_template"]


def test_load_tokenizer_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        data.load_tokenizer(tmp_path / "absent")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json must be a tokenizer"):
        data.load_tokenizer(tmp_path / "broken.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no tokenizer"):
        data.load_tokenizer(tmp_path / "empty")
    with pytest.raises(ValueError, match="must have an end-of-text token"):
        data.load_tokenizer(bare_tokenizer(tmp_path / "no_end.json", end="<|other|>"))


def test_encoding_is_that_of_the_tokenizer_without_its_truncation(tokenizer_file, tmp_path):
    limited = Tokenizer.from_file(str(tokenizer_file))
    limited.enable_truncation(3)
    limited.enable_padding(length=8)
    limited.save(str(tmp_path / "limited.json"))
    texts = make_texts(5)
    limited_tokenizer = data.load_tokenizer(tmp_path / "limited.json")
    plain = data.load_tokenizer(tokenizer_file)
    for ids, text in zip(
        tokenizer_module.encode_documents(limited_tokenizer, texts), texts, strict=True
    ):
        assert ids.tolist() == plain(text, add_special_tokens=False)["input_ids"]


def test_a_slow_tokenizer_encodes_the_same(tokenizer):
    class Slow:
        def __call__(self, texts, add_special_tokens):
            return tokenizer(texts, add_special_tokens=add_special_tokens)

    texts = make_texts(5)
    fast = tokenizer_module.encode_documents(tokenizer, texts)
    slow = tokenizer_module.encode_documents(Slow(), texts)
    assert [ids.tolist() for ids in fast] == [ids.tolist() for ids in slow]


def test_long_texts_are_encoded_piece_by_piece(tokenizer, monkeypatch):
    texts = ["\n".join(make_texts(9)), "short", "x" * 200, ""]
    monkeypatch.setattr(tokenizer_module, "MAX_CHARACTERS_PER_CALL", 60)
    encoded = tokenizer_module.encode_documents(tokenizer, texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts


def test_documents_begin_as_the_tokenizer_begins_them(tokenizer, tokenizer_file, tmp_path):
    assert tokenizer_module.boundary_tokens(tokenizer) == (0, 0)
    beginning = Tokenizer.from_file(str(tokenizer_file))
    beginning.post_processor = processors.TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", 1)]
    )
    beginning.save(str(tmp_path / "beginning.json"))
    loaded = data.load_tokenizer(tmp_path / "beginning.json")
    loaded.bos_token = "<|pad|>"
    assert tokenizer_module.boundary_tokens(loaded) == (1, 0)


# ---------------------------------------------------------------- documents


def test_every_format_reads_the_same_documents(tmp_path):
    texts = ["first text", "zweiter Text: äöü \u2028 and on", "third\nwith lines"]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n\n" for text in texts)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())  # byte order mark
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    with lzma.open(tmp_path / "a.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write(lines)
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.xz"):
        read = list(data.read_documents(tmp_path / name))
        assert [document.text for document in read] == texts
        assert {document.source for document in read} == {str(tmp_path / name)}
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    assert [d.text for d in data.read_documents(str(tmp_path / "*.txt"))] == texts


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = make_texts(2000)
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": range(2000), "text": texts}), path)
    assert [document.text for document in data.read_documents(path)] == texts
    with pytest.raises(ValueError, match="no column 'body'; its columns are"):
        list(data.read_documents(f"{path}:body"))
    parquet.write_table(pyarrow.table({"text": ["one", None]}), path)
    with pytest.raises(ValueError, match="row 2: 'text' must be text, got NoneType"):
        list(data.read_documents(path))


def test_hub_datasets_are_streamed(monkeypatch):
    calls = []

    def load_dataset(name, config, split, streaming):
        calls.append((name, config, split, streaming))
        return iter([{"text": "one", "body": "1"}, {"text": "two", "body": "2"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    names = ["hf:org/set", "hf:org/set:en", "hf:org/set:en:test", "hf:org/set::test"]
    assert len(list(data.read_documents(names))) == 8
    assert calls == [
        ("org/set", None, "train", True),
        ("org/set", "en", "train", True),
        ("org/set", "en", "test", True),
        ("org/set", None, "test", True),
    ]
    read = list(data.read_documents("hf:org/set::test:body"))
    assert [document.text for document in read] == ["1", "2"]
    assert calls[-1] == calls[-2]
    with pytest.raises(ValueError, match=r"hf:name\[:config\]\[:split\]"):
        data.read_documents("hf:a:b:c:d:e:f")


@pytest.mark.parametrize(
    ("name", "module"), [("a.parquet", "pyarrow.parquet"), ("hf:org/set", "datasets")]
)
def test_a_missing_library_names_the_extra(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.parquet").write_bytes(b"")
    source = name if name.startswith("hf:") else tmp_path / name
    with pytest.raises(ImportError, match=r"moe_jax\[data\]"):
        list(data.read_documents(source))


def test_max_documents_keys_and_empty_texts(tmp_path):
    first = write_jsonl(tmp_path / "1.jsonl", ["one", " \n", "", "two"], key="body")
    second = write_jsonl(tmp_path / "2.jsonl", ["three"], key="body")
    names = [f"{first}:body", f"{second}:body"]
    read = data.read_documents(names)
    assert [document.text for document in read] == ["one", "two", "three"]
    assert len(list(data.read_documents(names, 2))) == 2
    assert [document.text for document in data.read_documents(f"{tmp_path}/*.jsonl:body")] == [
        "one",
        "two",
        "three",
    ]
    with pytest.raises(ValueError, match="max_documents must be at least 1, got 0"):
        data.read_documents(first, 0)


# Random, so that compressed bytes are many and each matters.
LINES = b"".join(
    json.dumps({"text": str(random.Random(i).random())}).encode() + b"\n" for i in range(500)
)


def flipped(content: bytes) -> bytes:
    """A hundred bytes in the middle have other values."""
    middle = len(content) // 2
    changed = bytes(byte ^ 0x55 for byte in content[middle : middle + 100])
    return content[:middle] + changed + content[middle + 100 :]


@pytest.mark.parametrize(
    ("name", "contents", "error", "message"),
    [
        ("absent/*.jsonl", None, FileNotFoundError, r"no file matches '.*absent/\*\.jsonl'"),
        (".", None, ValueError, "is a folder"),
        ("a.csv", b"", ValueError, "unknown kind of file; known are .txt"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', ValueError, "line 2: broken JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": 1}', ValueError, r"line 3: no key 'text', got \["),
        ("a.jsonl", b"[1]", ValueError, "line 1: no key 'text', got list"),
        ("a.jsonl", b'{"text": 1}', ValueError, "line 1: 'text' must be text, got int"),
        ("a.jsonl", b'{"text": " "}\n', ValueError, "no text in .*a.jsonl"),
        ("a.txt", b"", ValueError, "no text in .*a.txt"),
        ("a.txt", b"\xff\xfe\x00", ValueError, "must be UTF-8"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], ValueError, "a.txt.gz is broken"),
        ("a.txt.xz", lzma.compress(b"text" * 99)[:-9], ValueError, "a.txt.xz is broken"),
        ("a.txt.gz", b"not gzip", ValueError, "a.txt.gz is broken"),
        ("a.jsonl", b'{"text": "x"}\n\xff\xfe', ValueError, "line 2 must be UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n' + b"[" * 200_000, ValueError, "line 2: broken JSON"),
        ("a.jsonl", b'{"text": "x", "n": ' + b"1" * 9999 + b"}", ValueError, "line 1: broken JSON"),
        ("a.jsonl", b'{"text": ["x"]}', ValueError, "got list; .*a.jsonl:text takes messages"),
        ("a.jsonl.gz", flipped(gzip.compress(LINES, mtime=0)), ValueError, "gz is broken"),
        ("a.jsonl.xz", flipped(lzma.compress(LINES)), ValueError, "xz is broken"),
        ("a.parquet", b"PAR1" + bytes(range(99)) + b"PAR1", ValueError, "a.parquet is broken"),
        ("a.parquet", b"", ValueError, "a.parquet is broken"),
    ],
)
def test_broken_files_are_named(tmp_path, name, contents, error, message):
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    with pytest.raises(error, match=message):
        list(data.read_documents(tmp_path / name))


@pytest.mark.parametrize("text", ["a\ud800b", "\udfffend", "\ud83d\ude00"])
def test_lone_surrogates_are_replaced(tokenizer, tmp_path, text):
    path = write_jsonl(tmp_path / "a.jsonl", [text])
    (document,) = data.read_documents(path)
    assert document.text == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert windows_of(path, tokenizer, seq_len=8, batch_size=1).total.num_tokens > 0


TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
CHAT = [{"role": "user", "content": "keep"}, {"role": "assistant", "content": "the router"}]


@pytest.fixture
def chat_tokenizer(tokenizer_file):
    loaded = data.load_tokenizer(tokenizer_file)
    loaded.chat_template = TEMPLATE
    return loaded


def test_chats_are_calibrated_as_they_are_used(chat_tokenizer, tmp_path):
    """Under any column, in both layouts, from both formats: the ids that the model sees in use."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"from": names[m["role"]], "value": m["content"]} for m in CHAT]
    write_jsonl(tmp_path / "a.jsonl", [CHAT], key="messages")
    write_jsonl(tmp_path / "b.jsonl", [shared], key="conversations")
    table = pyarrow.table({"turns": [[{**CHAT[0], "name": "me"}, CHAT[1]]]})
    parquet.write_table(table, tmp_path / "c.parquet")
    ids = chat_tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    for name in ("a.jsonl:messages", "b.jsonl:conversations", "c.parquet:turns"):
        (batch,) = calibrate(
            f"{tmp_path}/{name}", chat_tokenizer, num_sequences=1, batch_size=1, seq_len=99
        )
        assert batch["tokens"][batch["mask"]].tolist() == ids


def test_a_chat_has_no_boundary_token_twice(chat_tokenizer, train, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [CHAT], key="messages") + ":messages"
    ids = chat_tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    windows = windows_of(path, chat_tokenizer, seq_len=64, batch_size=1)
    (batch,) = windows.batches
    assert batch["targets"][batch["mask"]].tolist() == ids
    store = training.tokenized(path, chat_tokenizer, tmp_path / "cache")
    assert store.tokens.tolist() == [0, *ids]  # the template ends with end-of-text itself
    before = data.fingerprint(path, chat_tokenizer)
    chat_tokenizer.chat_template = TEMPLATE + "!"
    assert data.fingerprint(path, chat_tokenizer) != before


def test_named_chat_templates(chat_tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [CHAT], key="messages")
    chat_tokenizer.chat_template = {"default": TEMPLATE, "short": "{{ messages[0].content }}"}
    (document,) = data.read_documents(f"{path}:messages:short", tokenizer=chat_tokenizer)
    assert document.text == "keep"
    with pytest.raises(ValueError, match=r"line 1: no chat template 'none'; .*'default', 'short'"):
        list(data.read_documents(f"{path}:messages:none", tokenizer=chat_tokenizer))


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, CHAT, "line 1: the tokenizer has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", CHAT, "line 1: .*roles must alternate"),
        ("{{ messages[", CHAT, "line 1: the chat template refuses"),
        (TEMPLATE, ["hello"], "line 1: .*a message must be a dict, got str"),
    ],
)
def test_chats_that_cannot_be_written_are_named(
    chat_tokenizer, tmp_path, template, messages, message
):
    path = write_jsonl(tmp_path / "a.jsonl", [messages], key="messages")
    chat_tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        list(data.read_documents(f"{path}:messages", tokenizer=chat_tokenizer))
    with pytest.raises(ValueError, match="a tokenizer is required"):
        list(data.read_documents(f"{path}:messages"))


def test_no_files_at_all():
    with pytest.raises(ValueError, match="at least one file"):
        data.read_documents([])


def test_domains_with_the_same_stem_are_told_apart():
    assert documents.domain_names(["d/math.jsonl.xz", "d/v1.5.txt"]) == ["math", "v1.5"]
    assert documents.domain_names(["a/x/m.jsonl", "b/x/m.jsonl.gz", "hf:org/set"]) == [
        "a/x/m",
        "b/x/m",
        "org/set",
    ]
    assert documents.domain_names(["a.txt", "a.jsonl"]) == ["a.txt", "a.jsonl"]


def test_fingerprint_follows_contents_tokenizer_and_settings(tokenizer, tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", make_texts(3))
    base = data.fingerprint(first, tokenizer, seq_len=8)
    (tmp_path / "elsewhere").mkdir()
    moved = write_jsonl(tmp_path / "elsewhere" / "b.jsonl", make_texts(3))
    assert data.fingerprint(moved, tokenizer, seq_len=8) == base
    tokenizer("x", truncation=True, max_length=2)  # leaves its mark in the backend
    assert data.fingerprint(first, tokenizer, seq_len=8) == base

    changed = write_jsonl(tmp_path / "c.jsonl", make_texts(4))
    other = data.load_tokenizer(bare_tokenizer(tmp_path / "other.json", vocab_size=290))
    different = [
        data.fingerprint(changed, tokenizer, seq_len=8),
        data.fingerprint(first, tokenizer, seq_len=9),
        data.fingerprint(first, other, seq_len=8),
        data.fingerprint(first, seq_len=8),
        data.fingerprint([first, changed], tokenizer, seq_len=8),
    ]
    assert len({base, *different}) == 6
    with pytest.raises(ValueError, match="settings must be JSON values"):
        data.fingerprint(first, tokenizer, function=print)


# ---------------------------------------------------------------- training


def test_an_epoch_holds_every_document_once(train, tokenizer, tmp_path):
    texts = make_texts(40)
    batches = list(train([write_jsonl(tmp_path / "a.jsonl", texts)], batch_size=1, num_epochs=1))
    joined = np.concatenate([batch["tokens"][0] for batch in batches])
    total = sum(len(tokenizer(text)["input_ids"]) + 2 for text in texts)
    assert len(joined) == total // 32 * 32
    # Documents stand between two end-of-text tokens; the last may be cut off.
    found = tokenizer.decode(joined).split("<|endoftext|><|endoftext|>")
    found = [text.removeprefix("<|endoftext|>") for text in found]
    assert set(found[:-1]) <= set(texts)
    assert len(set(found[:-1])) == len(found) - 1 >= len(texts) - 3


def test_a_segment_is_a_piece_of_one_document(train, tokenizer, tmp_path):
    texts = make_texts(40)
    wholes = ["<|endoftext|>" + text + "<|endoftext|>" for text in texts]
    for batch in train([write_jsonl(tmp_path / "a.jsonl", texts)], num_epochs=2):
        assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
            "tokens": ((4, 32), np.int32),
            "segment_ids": ((4, 32), np.int32),
        }
        for ids in batch["segment_ids"]:
            assert ids[0] == 1
            assert set(np.diff(ids)) <= {0, 1}
        for tokens in segments(batch):
            assert any(tokenizer.decode(tokens) in whole for whole in wholes)


def test_the_seed_decides_the_stream_and_epochs_differ(train, tmp_path):
    sources = [write_jsonl(tmp_path / "a.jsonl", make_texts(40))]
    once = list(train(sources, batch_size=1, num_epochs=1))
    twice = list(train(sources, batch_size=1, num_epochs=2))
    assert_same(once, list(train(sources, batch_size=1, num_epochs=1)))
    assert_same(once, twice[: len(once)])
    for other in (twice[len(once) :], list(train(sources, batch_size=1, num_epochs=1, seed=1))):
        assert len(other) == len(once)
        assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(once, other, strict=True))


@pytest.mark.parametrize("position", [0, 1, 7, 60])
def test_resuming_is_exact(train, tmp_path, position):
    sources = {
        write_jsonl(tmp_path / "a.jsonl", make_texts(30)): 1.0,
        write_jsonl(tmp_path / "b.jsonl", make_texts(30, seed=1)): 2.5,
    }
    iterator = iter(train(sources))
    take(iterator, position)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 12)
    resumed = iter(train(sources))
    resumed.set_state(state)
    assert_same(take(resumed, 12), expected)
    iterator.set_state(state)
    assert_same(take(iterator, 12), expected)


def test_weights_are_shares_of_tokens(train, tokenizer, tmp_path):
    short = write_jsonl(tmp_path / "short.jsonl", ["a novice"] * 90)
    long = write_jsonl(tmp_path / "long.jsonl", ["expert " * 200] * 3)
    expert = tokenizer(" expert")["input_ids"][0]

    def share_of_long(sources, **changes):
        rows = np.concatenate([b["tokens"] for b in take(train(sources, **changes), 100)])
        return np.mean([(row == expert).sum() > 16 for row in rows])

    assert share_of_long({short: 3, long: 1}) == pytest.approx(0.25, abs=0.01)
    assert share_of_long({short: 1e-3, long: 1e-3}) == pytest.approx(0.5, abs=0.01)
    tokens = {
        path: len(np.concatenate(tokenizer_module.encode_documents(tokenizer, texts)))
        + 2 * len(texts)
        for path, texts in ((short, ["a novice"] * 90), (long, ["expert " * 200] * 3))
    }
    expected = tokens[long] / sum(tokens.values())
    share = share_of_long([short, long], num_epochs=30)
    assert share == pytest.approx(expected, abs=0.02)


def test_text_is_tokenised_once(train, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    before = take(train([path]), 5)
    calls = []
    encode = training.encode_documents
    monkeypatch.setattr(
        training, "encode_documents", lambda *args: calls.append(args) or encode(*args)
    )
    assert_same(take(train([path]), 5), before)
    assert not calls
    write_jsonl(tmp_path / "a.jsonl", make_texts(21))
    take(train([path]), 1)
    assert len(calls) == 1


def test_tokens_are_kept_in_the_user_cache_by_default(train, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    train([write_jsonl(tmp_path / "a.jsonl", make_texts(20))], cache_dir="")
    (entry,) = (tmp_path / "xdg" / "moe_jax" / "tokens").iterdir()
    assert sorted(f.name for f in entry.iterdir()) == ["facts.json", "offsets.npy", "tokens.npy"]


def test_another_column_is_another_entry(train, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a" * 200, "body": "b" * 200}))
    streams = [take(train([name], batch_size=1), 1) for name in (str(path), f"{path}:body")]
    assert (streams[0][0]["tokens"] != streams[1][0]["tokens"]).any()


def test_an_interrupted_tokenisation_leaves_nothing_behind(train, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": ')
    with pytest.raises(ValueError, match="line 2"):
        train([str(path)])
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_second_process_may_finish_first(tokenizer, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    write = training._write_store

    def overtaken(*args):
        monkeypatch.setattr(training, "_write_store", write)
        training.tokenized(path, tokenizer, tmp_path / "cache")
        write(*args)

    monkeypatch.setattr(training, "_write_store", overtaken)
    store = training.tokenized(path, tokenizer, tmp_path / "cache")
    assert store.facts["num_documents"] == 20
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_large_vocabularies_take_wider_integers(tokenizer, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    narrow = training.tokenized(path, tokenizer, tmp_path / "narrow")
    monkeypatch.setattr(training, "largest_token_id", lambda tokenizer: 2**16)
    wide = training.tokenized(path, tokenizer, tmp_path / "wide")
    assert (narrow.tokens.dtype, wide.tokens.dtype) == (np.uint16, np.uint32)
    np.testing.assert_array_equal(narrow.tokens, wide.tokens)
    assert isinstance(wide.tokens, np.memmap)


def test_a_source_shorter_than_a_row_is_padded(train, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    for batch in take(train([path]), 3):
        ids = batch["segment_ids"]
        assert sorted(ids[0].tolist()) == [0] * 26 + [1] * 3 + [2] * 3
        assert not batch["tokens"][ids == 0].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 1}, "seq_len must be at least 2, got 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_epochs": 0}, r"num_epochs must be in \(0, inf\), got 0"),
        ({"batch_size": 1000, "num_epochs": 1}, "at least one batch of batch_size = 1000"),
        ({"vocab_size": 100}, "below the model's vocab_size = 100, got"),
    ],
)
def test_training_arguments_are_checked(train, tmp_path, changes, message):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    with pytest.raises(ValueError, match=message):
        train([path], **changes)


@pytest.mark.parametrize("weight", [0, -1.0, math.inf, math.nan])
def test_weights_must_be_positive(train, tmp_path, weight):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    with pytest.raises(ValueError, match=r"weight of .*a\.jsonl must be in \(0, inf\)"):
        train({path: weight})


def test_sources_are_looked_for_before_any_is_tokenised(train, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    with pytest.raises(FileNotFoundError, match="no file matches"):
        train({path: 1, str(tmp_path / "absent.jsonl"): 1})
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="at least one file"):
        train({})


# ---------------------------------------------------------------- calibration


def calibrate(files, tokenizer, seed=0, vocab_size=None, **changes):
    options = {"num_sequences": 10, "seq_len": 24, "batch_size": 4} | changes
    settings = CalibrationConfig(files=(files,), **options)
    return data.calibration_batches(settings, tokenizer, seed=seed, vocab_size=vocab_size)


def windows_of(files, tokenizer, vocab_size=None, **options):
    settings = EvaluationConfig(files=(files,), **options)
    return data.evaluation_windows(settings, tokenizer, vocab_size=vocab_size)


@pytest.mark.parametrize("pack", [False, True])
def test_calibration_has_one_shape_and_masks_what_it_adds(tokenizer, tmp_path, pack):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(40))
    batches = calibrate(path, tokenizer, pack=pack)
    assert len(batches) == 3
    for batch in batches:
        assert batch["tokens"].shape == batch["mask"].shape == (4, 24)
        assert (batch["tokens"].dtype, batch["mask"].dtype) == (np.int32, np.bool_)
        assert (np.diff(batch["mask"].astype(int), axis=1) <= 0).all()  # padding comes last
    rows_used = np.concatenate([batch["mask"].any(1) for batch in batches])
    assert rows_used.tolist() == [True] * 10 + [False] * 2
    if pack:
        assert all(batch["mask"][batch["mask"].any(1)].all() for batch in batches)


def test_a_calibration_row_is_a_window_of_one_document(tokenizer, tmp_path):
    texts = make_texts(40)
    batches = calibrate(write_jsonl(tmp_path / "a.jsonl", texts), tokenizer)
    wholes = ["<|endoftext|>" + text for text in texts]
    first_words = []
    for batch in batches:
        for tokens, mask in zip(batch["tokens"], batch["mask"], strict=True):
            if mask.any():
                row = tokenizer.decode(tokens[mask])
                assert any(row in whole for whole in wholes)
                assert mask.all() or row in wholes
                first_words.append(row.split()[0])
    numbers = [word.removeprefix("<|endoftext|>") for word in first_words if "|" in word]
    assert len(numbers) < len(first_words)  # windows of long documents begin anywhere
    assert max(map(int, numbers)) > 10  # documents come from anywhere


def test_calibration_follows_its_seed(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(40))
    assert_same(calibrate(path, tokenizer), calibrate(path, tokenizer))
    first, second = calibrate(path, tokenizer)[0], calibrate(path, tokenizer, seed=1)[0]
    assert (first["tokens"] != second["tokens"]).any()


@pytest.mark.parametrize("pack", [False, True])
def test_calibration_is_balanced_over_files(tokenizer, tmp_path, pack):
    letters = "abc"
    counts = (50, 200, 2)
    for letter, count in zip(letters, counts, strict=True):
        write_jsonl(tmp_path / f"{letter}.jsonl", [letter * 40] * count)
    batches = calibrate(str(tmp_path / "*.jsonl"), tokenizer, num_sequences=12, pack=pack)
    rows = np.concatenate([batch["tokens"] for batch in batches])
    found = collections.Counter(
        next(letter for letter in letters if letter * 2 in tokenizer.decode(row)) for row in rows
    )
    # Two documents of 41 tokens are 2 rows, or 4 when cut into blocks of 24.
    assert found == ({"a": 4, "b": 4, "c": 4} if pack else {"a": 5, "b": 5, "c": 2})


def test_a_short_supply_is_used_and_reported(tokenizer, tmp_path, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(3))
    with caplog.at_level(logging.WARNING):
        batches = calibrate(path, tokenizer)
    assert sum(batch["mask"].any(1).sum() for batch in batches) == 3
    assert "3 of the 10 calibration sequences wanted" in caplog.text


def test_packed_documents_are_separated(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b", "c"])
    (batch,) = calibrate(path, tokenizer, num_sequences=1, batch_size=1, seq_len=6, pack=True)
    assert batch["tokens"][0, ::2].tolist() == [0, 0, 0]
    assert sorted(tokenizer.decode(batch["tokens"][0, 1::2])) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_sequences": 0}, "num_sequences must be at least 1, got 0"),
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"vocab_size": 100}, "below the model's vocab_size = 100, got"),
    ],
)
def test_calibration_arguments_are_checked(tokenizer, tmp_path, changes, message):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    with pytest.raises(ValueError, match=message):
        calibrate(path, tokenizer, **changes)


# ---------------------------------------------------------------- evaluation


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=12),
    seq_len=st.integers(1, 40),
    batch_size=st.integers(1, 5),
)
def test_every_token_is_predicted_once(tokenizer, tmp_path, lengths, seq_len, batch_size):
    texts = ["".join(random.Random(i).choices("abcdef ", k=n)) + "." for i, n in enumerate(lengths)]
    path = write_jsonl(tmp_path / "domain.jsonl", texts)
    windows = windows_of(path, tokenizer, seq_len=seq_len, batch_size=batch_size)

    expected = collections.Counter()
    for text in texts:
        ids = [0, *tokenizer(text)["input_ids"]]
        expected.update(itertools.pairwise(ids))
    found = collections.Counter()
    for batch in windows.batches:
        assert batch["mask"].any()
        for value in batch.values():
            assert value.shape == (batch_size, seq_len)
        np.testing.assert_array_equal(batch["mask"], batch["segment_ids"] > 0)
        mask = batch["mask"]
        found.update(
            zip(batch["tokens"][mask].tolist(), batch["targets"][mask].tolist(), strict=True)
        )
        # Within a segment an input is the target before it.
        same = (np.diff(batch["segment_ids"], axis=1) == 0) & mask[:, 1:]
        np.testing.assert_array_equal(batch["tokens"][:, 1:][same], batch["targets"][:, :-1][same])
    assert found == expected
    assert windows.domains == {
        "domain": data.TextSize(sum(map(len, texts)), expected.total(), len(texts))
    }


def test_short_documents_share_rows(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(200, longest=4))
    windows = windows_of(path, tokenizer, seq_len=64, batch_size=1)
    assert windows.total.num_tokens / (64 * len(windows.batches)) > 0.95

    exact = write_jsonl(tmp_path / "b.jsonl", ["1234", "12", "123", "1", "12"])
    windows = windows_of(exact, tokenizer, seq_len=4, batch_size=1)
    assert [batch["mask"].sum() for batch in windows.batches] == [4, 4, 4]


def test_bits_per_byte_of_a_uniform_model(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["äöü"])  # without merges: a token per byte
    size = windows_of(path, tokenizer, seq_len=4, batch_size=1).domains["a"]
    assert (size.num_bytes, size.num_tokens) == (6, 6)
    assert size.bits_per_byte(size.num_tokens * math.log(256)) == pytest.approx(8)


def test_domains_and_their_limit(tokenizer, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["ää", "äää", "never reached"])
    write_jsonl(tmp_path / "b.jsonl", ["one", "two"])
    windows = windows_of(str(tmp_path / "*.jsonl"), tokenizer, seq_len=8, batch_size=2, max_bytes=7)
    # A cut between two bytes of a character goes before it.
    assert windows.domains == {
        "a": data.TextSize(6, windows.domains["a"].num_tokens, 2),
        "b": data.TextSize(6, windows.domains["b"].num_tokens, 2),
    }


def test_windows_of_several_texts_share_batches(tokenizer, tmp_path):
    """Eight texts of three windows are three batches of eight, and each row knows its text."""
    texts = {f"{i}": [chr(97 + i) * n for n in (9, 8, 7)] for i in range(8)}
    for name, documents_of in texts.items():
        write_jsonl(tmp_path / f"{name}.jsonl", documents_of)
    files = str(tmp_path / "*.jsonl")
    vocabulary = {"<|endoftext|>": 0} | {letter: i for i, letter in enumerate("abcdefgh", 1)}
    plain = Tokenizer(models.WordLevel(vocabulary))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    plain.save(str(tmp_path / "letters.json"))
    letters = data.load_tokenizer(tmp_path / "letters.json")
    windows = windows_of(files, letters, seq_len=9, batch_size=8)
    assert len(windows.batches) == 3
    counted = windows.by_domain([batch["mask"].sum(-1) for batch in windows.batches])
    assert counted == dict.fromkeys(texts, 24)
    owners = iter(windows.owners)
    for batch in windows.batches:
        for targets, mask in zip(batch["targets"], batch["mask"], strict=True):
            assert set(targets[mask].tolist()) == {next(owners) + 1}


def test_text_without_tokens_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["unseen"])
    strict = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "seen": 1}))
    strict.save(str(tmp_path / "strict.json"))
    with pytest.raises(ValueError, match="cannot encode the text"):
        calibrate(path, data.load_tokenizer(tmp_path / "strict.json"))
    blind = Tokenizer(models.BPE({"<|endoftext|>": 0, "a": 1}, []))
    blind.save(str(tmp_path / "blind.json"))
    loaded = data.load_tokenizer(tmp_path / "blind.json")
    with pytest.raises(ValueError, match=r"no tokens in .*a\.jsonl"):
        windows_of(path, loaded, seq_len=4, batch_size=1)
    with pytest.raises(ValueError, match=r"no tokens in .*a\.jsonl"):
        calibrate(path, loaded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_bytes": -1}, "max_bytes must be at least 0, got -1"),
        ({"max_bytes": 1}, "max_bytes must hold a character of .*a.jsonl, got 1"),
        ({"vocab_size": 9}, "below the model's vocab_size = 9, got"),
    ],
)
def test_evaluation_arguments_are_checked(tokenizer, tmp_path, changes, message):
    path = write_jsonl(tmp_path / "a.jsonl", ["äöü"])
    with pytest.raises(ValueError, match=message):
        windows_of(path, tokenizer, **({"seq_len": 4, "batch_size": 1} | changes))
