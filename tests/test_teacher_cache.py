"""The offline teacher: what is cached, how it is read, resumed and refused, and trained from."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_config
from tiny_hf import VOCAB, random_params
from tiny_run import save_model, save_text, save_tokenizer

from moe_jax.cache_teacher import CacheTeacherConfig, cache_teacher, teacher_predictions
from moe_jax.data import load_tokenizer, training_dataset
from moe_jax.data.teacher_cache import (
    CacheFacts,
    TeacherCacheWriter,
    open_teacher_cache,
    text_facts,
    writer,
)
from moe_jax.distill import TrainingRun, TrainSettings, train
from moe_jax.hf import load_hf
from moe_jax.identity import checkpoint_digest
from moe_jax.metrics import read_metrics
from moe_jax.model import forward
from moe_jax.params import leaves_with_path
from moe_jax.settings import TrainingConfig

REPOSITORY = Path(__file__).parents[1]
SEQ_LEN, BATCH, STEPS, START, K = 16, 4, 5, 2, 6
STREAM = {"seq_len": SEQ_LEN, "batch_size": BATCH, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, two files of text, and a cache in float32 of three files: 8, 8 and 4 rows."""
    folder = tmp_path_factory.mktemp("teacher")
    save_model(folder / "model")
    for name in ("prose", "code"):
        save_text(folder, name, documents=20)
    cache_teacher(configuration(folder))
    return folder


def values(folder: Path, **changes):
    training = {"files": sources(folder), "seq_len": SEQ_LEN, "batch_size": BATCH}
    training |= {"cache_dir": str(folder / "tokens")} | changes.pop("training", {})
    return {
        "model": str(folder / "model"),
        "output": str(folder / "cache"),
        "dtype": "float32",
        "seed": STREAM["seed"],
        "top_k": K,
        "steps": STEPS,
        "start": START,
        "log_prob_dtype": "float32",
        "rows_per_file": 2 * BATCH,
        "training": training,
        **changes,
    }


def configuration(folder: Path, **changes) -> CacheTeacherConfig:
    return CacheTeacherConfig.from_dict(values(folder, **changes))


def sources(folder: Path) -> dict[str, float]:
    return {str(folder / "prose.jsonl"): 2.0, str(folder / "code.jsonl"): 1.0}


def stream(folder: Path, **changes):
    tokenizer = load_tokenizer(folder / "model")
    options = {**STREAM, "start": START, **changes}
    sizes = {name: options.pop(name) for name in ("seq_len", "batch_size")}
    settings = TrainingConfig(sources(folder), **sizes, cache_dir=str(folder / "tokens"))
    return training_dataset(settings, tokenizer, **options)


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder / "cache", target / "cache"))


def contents(cache: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(cache.iterdir())}


def assert_batches_equal(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_cached_is_the_top_of_the_teachers_softmax(folder, tmp_path, dtype):
    cache = open_teacher_cache(folder / "cache")
    if dtype == "bfloat16":
        cache = cache_teacher(
            configuration(folder, log_prob_dtype=dtype, output=str(tmp_path / "cache"))
        )
    config, params = load_hf(folder / "model")
    # bfloat16 keeps eight significant bits: numbers are off by half of the last one.
    error = {"rtol": 1e-6, "atol": 1e-6} if dtype == "float32" else {"rtol": 2**-8}
    masses = []

    @jax.jit
    def expected(params, tokens, segment_ids):
        logits, _ = forward(params, config, tokens, segment_ids)
        log_probs = jax.nn.log_softmax(logits, -1)
        return log_probs, jax.lax.top_k(log_probs, K)[0]

    for batch in cache.dataset():
        log_probs, largest = expected(params, batch["tokens"], batch["segment_ids"])
        at_ids = jnp.take_along_axis(log_probs, batch["teacher_ids"], -1)
        assert batch["teacher_ids"].dtype == np.int32
        assert batch["teacher_log_probs"].dtype == np.float32
        np.testing.assert_allclose(batch["teacher_log_probs"], largest, **error)
        # By id too, so that equal probabilities may come in any order.
        np.testing.assert_allclose(at_ids, largest, rtol=1e-6, atol=1e-6)
        masses.append(np.exp(largest).sum(-1)[batch["segment_ids"] > 0])
    assert len(masses) == STEPS
    # The mass is that of the numbers before they are rounded for storage.
    assert cache.kept_mass == pytest.approx(np.concatenate(masses).mean(), rel=1e-5)
    assert 0 < cache.kept_mass < 1


def test_chunks_change_nothing_and_bound_the_logits():
    config = tiny_config(vocab_size=977)
    params = random_params(config)
    tokens = jax.random.randint(jax.random.key(1), (4, 10), 0, 977)
    segment_ids = jnp.ones_like(tokens).at[0, 6:].set(0)
    logits, _ = jax.jit(forward, static_argnums=1)(params, config, tokens, segment_ids)
    largest, ids = jax.lax.top_k(jax.nn.log_softmax(logits, -1), 5)
    for chunk_tokens, columns in [(1, 1), (12, 3), (1024, 10)]:
        predict = jax.jit(teacher_predictions, static_argnames=("config", "k", "chunk_tokens"))
        compiled = predict.lower(
            params, config, tokens, segment_ids, k=5, chunk_tokens=chunk_tokens
        ).compile()
        top = compiled(params, tokens, segment_ids)
        np.testing.assert_array_equal(top.ids, ids)  # no two are as close as rounding
        np.testing.assert_allclose(top.log_probs, largest, rtol=1e-6, atol=1e-6)
        found = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
        shapes = [tuple(map(int, shape.split(","))) for shape in found]
        # The head and the embedding have the model's width as their other dimension.
        logits_sizes = [math.prod(s) for s in shapes if 977 in s and config.width not in s]
        assert max(logits_sizes) == columns * 4 * 977


@pytest.mark.parametrize(
    ("start", "batch_size"), [(None, None), (START, BATCH), (4, BATCH), (5, 2)], ids=str
)
def test_the_cache_gives_the_stream_that_training_reads(folder, start, batch_size):
    cache = open_teacher_cache(folder / "cache")
    read = list(cache.dataset(start, batch_size))
    assert len(read) == cache.num_batches(start, batch_size) > 0
    expected = stream(
        folder,
        start=START if start is None else start,
        batch_size=batch_size or BATCH,
    )
    for batch, other in zip(read, expected, strict=False):
        assert_batches_equal([{name: batch[name] for name in other}], [other])


def test_an_iterator_goes_on_where_its_state_says(folder):
    dataset = open_teacher_cache(folder / "cache").dataset()
    iterator = iter(dataset)
    for _ in range(2):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))  # as checkpoints keep it
    rest = list(iterator)
    assert len(rest) == STEPS - 2
    other = iter(dataset)
    other.set_state(state)
    assert_batches_equal(list(other), rest)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["kd_topk", "kd_topk_renormalized"])
def test_training_from_the_cache_equals_training_with_the_teacher(folder, tmp_path, loss):
    config, teacher = load_hf(folder / "model")
    student = random_params(config, seed=5)
    settings = TrainSettings(
        STEPS, loss=loss, top_k=K - 2, lm_weight=0.25, warmup_steps=1, log_every=1
    )
    live = train(
        student, config, stream(folder), settings, TrainingRun(tmp_path / "live"), (teacher, config)
    )
    cached = open_teacher_cache(folder / "cache").dataset(START, BATCH)
    offline = train(student, config, cached, settings, TrainingRun(tmp_path / "offline"))
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("live", "offline")]
    assert len(records[0]) == len(records[1]) == STEPS
    for a, b in zip(*records, strict=True):
        for name in ("loss", "distill", "lm", "gradient_norm"):
            # The teacher is compiled apart: the last bits of its logits may differ.
            assert a[name] == pytest.approx(b[name], rel=1e-5)
    # Weights move by 3e-3. Adam divides by a gradient's size: the smallest feel rounding most.
    for (path, a), (_, b) in zip(leaves_with_path(live), leaves_with_path(offline), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6, err_msg=str(path))


def flip_last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def change_index(cache: Path, **changes) -> None:
    index = json.loads((cache / "index.json").read_text())
    (cache / "index.json").write_text(json.dumps(index | changes))


FIRST = "rows-00000.arrayrecord"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "index.json").unlink(), "is not finished .*same configuration goes on"),
        (lambda c: (c / "index.json").write_text("{"), "not valid JSON"),
        (lambda c: (c / "index.json").write_text("{}"), "not the index of a teacher cache"),
        (lambda c: change_index(c, version=9), "version must be 1, got 9"),
        (lambda c: change_index(c, k="6"), "damaged"),
        (lambda c: change_index(c, files=[]), "must state 20 rows in 3 files, got 0 in 0"),
        (lambda c: (c / FIRST).unlink(), f"missing file .*{FIRST}.* makes it again"),
        (lambda c: os.truncate(c / FIRST, 99), f"{FIRST} must have [0-9]+ bytes, got 99"),
        (lambda c: flip_last_byte(c / FIRST), f"{FIRST} is damaged: its sha256"),
    ],
)
def test_a_cache_that_is_not_whole_is_refused(folder, tmp_path, damage, message):
    cache = copied(folder, tmp_path)
    damage(cache)
    with pytest.raises(ValueError, match=message) as caught:
        open_teacher_cache(cache)
    assert "\n" not in str(caught.value)


def test_a_file_with_fewer_records_than_stated_is_refused(folder, tmp_path):
    """Every hash fits: the last file, of one batch, in the place of the first, of two."""
    cache = copied(folder, tmp_path)
    shutil.copyfile(cache / "rows-00002.arrayrecord", cache / FIRST)
    files = json.loads((cache / "index.json").read_text())["files"]
    files[0] |= {name: files[2][name] for name in ("bytes", "sha256")}
    change_index(cache, files=files)
    with pytest.raises(ValueError, match=f"{FIRST} must hold 8 records, got 4"):
        open_teacher_cache(cache)


def test_only_verifying_reads_the_files(folder, tmp_path):
    cache = copied(folder, tmp_path)
    data = (cache / FIRST).read_bytes()
    (cache / FIRST).write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.raises(ValueError, match="damaged"):
        open_teacher_cache(cache)
    open_teacher_cache(folder / "cache", verify=False)


def test_facts_that_are_expected_are_compared(folder, tmp_path):
    tokenizer = load_tokenizer(folder / "model")
    facts = text_facts(sources(folder), tokenizer, **STREAM)
    facts |= {"teacher": checkpoint_digest(folder / "model"), "vocab_size": VOCAB}
    cache = folder / "cache"
    for k in (1, K):
        open_teacher_cache(cache, expected={**facts, "k": k})
    other_text = {save_text(tmp_path, "prose"): 2.0, save_text(tmp_path, "code"): 1.0}
    save_tokenizer(tmp_path)
    vocabulary = (tmp_path / "tokenizer.json").read_text().replace('"novice"', '"notice"')
    (tmp_path / "tokenizer.json").write_text(vocabulary)
    equal_weights = dict.fromkeys(sources(folder), 1.0)
    for changed, message in [
        ({"k": K + 1}, f"k must be at least {K + 1}, got {K}"),
        ({"teacher": "abc"}, f"teacher must be 'abc', got '{facts['teacher']}'"),
        (text_facts(other_text, tokenizer, **STREAM), "text must be '.*', got '.*'"),
        (text_facts(list(sources(folder)), tokenizer, **STREAM), r"must be None, got \[2.0, 1.0\]"),
        (text_facts(equal_weights, tokenizer, **STREAM), r"must be \[1.0, 1.0\], got \[2.0, 1.0\]"),
        (
            text_facts(sources(folder), load_tokenizer(tmp_path), **STREAM),
            "tokenizer must be '.*', got '.*'",
        ),
        (text_facts(sources(folder), tokenizer, **STREAM | {"seed": 4}), "seed must be 4, got 3"),
    ]:
        with pytest.raises(ValueError, match=f"does not fit: .*{message}"):
            open_teacher_cache(cache, expected=facts | changed)
    with pytest.raises(FileNotFoundError, match="no such teacher cache"):
        open_teacher_cache(tmp_path / "absent", expected=facts)


def test_one_glob_is_another_stream_than_two_files(folder):
    tokenizer = load_tokenizer(folder / "model")
    one = text_facts([str(folder / "[pc]*.jsonl")], tokenizer, **STREAM)
    two = text_facts([str(folder / f"{n}.jsonl") for n in ("code", "prose")], tokenizer, **STREAM)
    assert one["text"] != two["text"]


def test_too_few_batches_are_refused_beforehand(folder):
    cache = open_teacher_cache(folder / "cache")
    cache.check_length(STEPS)
    cache.check_length(STEPS, START)
    cache.check_length(2 * STEPS, None, BATCH // 2)
    with pytest.raises(ValueError, match="must hold 6 batches of 4 rows, got 5: it has rows 8 to"):
        cache.check_length(STEPS + 1)
    with pytest.raises(ValueError, match="from batch 3 of the stream on, got 4"):
        cache.check_length(STEPS, START + 1)
    for start in (0, START - 1, START + STEPS):
        with pytest.raises(ValueError, match=f"from batch {start} of the stream on, got 0"):
            cache.dataset(start)


FACTS = CacheFacts(
    k=2,
    vocab_size=50,
    log_prob_dtype="bfloat16",
    teacher="t",
    compute_dtype="float32",
    start=0,
    num_rows=10,
    rows_per_file=4,
    tokenizer="t",
    seq_len=3,
    batch_size=2,
    seed=0,
    weights=None,
    text="t",
)


def numbered(first: int):
    """A stream whose batches say which they are."""
    for i in range(first, 5):
        yield {"tokens": np.full((2, 3), i), "segment_ids": np.ones((2, 3))}


def guess(batches, stop=None):
    """Predictions made up from the tokens; ``stop()`` is called before batch 3."""
    for batch in batches:
        tokens = batch["tokens"][..., None]
        if stop and tokens[0, 0, 0] == 3:
            stop()
        log_probs = -1.0 - np.array([0, 0.3]) - 0.01 * tokens
        yield {**batch, "teacher_ids": tokens + np.arange(2), "teacher_log_probs": log_probs}


def fill(folder: Path, stop=None):
    cache = TeacherCacheWriter(folder, FACTS)
    return cache.write(numbered(cache.first_batch), lambda batches: guess(batches, stop))


KILLED = """
import os, signal, sys
from pathlib import Path
from test_teacher_cache import fill
fill(Path(sys.argv[1]), lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


def raise_error():
    raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_killed_writer_goes_on_to_the_same_bytes(tmp_path, how):
    fill(tmp_path / "whole")
    cut = tmp_path / "cut"
    if how == "raise":
        with pytest.raises(KeyboardInterrupt):
            fill(cut, raise_error)
    else:
        done = subprocess.run([sys.executable, "-c", KILLED, str(cut)], cwd=Path(__file__).parent)
        assert done.returncode == -signal.SIGKILL
    assert sorted(f.name for f in cut.glob("[!.]*")) == [FIRST, "unfinished.json"]
    with pytest.raises(ValueError, match="not finished"):
        open_teacher_cache(cut)
    kept = (cut / FIRST).stat().st_mtime_ns
    writer = TeacherCacheWriter(cut, FACTS)
    assert [part.name for part in writer.missing] == [f"rows-0000{i}.arrayrecord" for i in (1, 2)]
    assert writer.bytes_left == 6 * 3 * (8 + 2 * 6)
    fill(cut)
    assert (cut / FIRST).stat().st_mtime_ns == kept
    assert contents(cut) == contents(tmp_path / "whole")


@pytest.mark.parametrize("lost", range(3))
def test_a_lost_file_is_made_again(tmp_path, lost):
    fill(tmp_path)
    whole = contents(tmp_path)
    (tmp_path / f"rows-0000{lost}.arrayrecord").unlink()
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("rows*")}
    fill(tmp_path)
    assert contents(tmp_path) == whole
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())


def test_a_finished_cache_is_left_as_it_is(folder):
    before = {file: file.stat().st_mtime_ns for file in (folder / "cache").iterdir()}
    cache_teacher(configuration(folder, model=str(folder / "model")))
    assert {file: file.stat().st_mtime_ns for file in (folder / "cache").iterdir()} == before


@pytest.mark.parametrize("unfinished", [False, True])
def test_other_settings_are_refused_by_name(folder, tmp_path, unfinished):
    cache = copied(folder, tmp_path)
    if unfinished:
        (cache / "index.json").rename(cache / "unfinished.json")
    before = contents(cache)
    for changes, message in [
        ({"top_k": 5}, "k must be 5, got 6"),
        ({"steps": 6}, "num_rows must be 24, got 20"),
        ({"seed": 0}, "seed must be 0, got 3"),
        ({"dtype": "bfloat16"}, "compute_dtype must be 'bfloat16', got 'float32'"),
        ({"log_prob_dtype": "bfloat16"}, "log_prob_dtype must be 'bfloat16', got 'float32'"),
        ({"training": {"seq_len": 8}}, "seq_len must be 8, got 16"),
    ]:
        with pytest.raises(ValueError, match=message):
            cache_teacher(configuration(folder, output=str(cache), **changes))
    assert contents(cache) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": VOCAB + 1}, f"top_k must be at most the model's vocab_size = {VOCAB}"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"start": -1}, "start must be at least 0"),
        ({"rows_per_file": 6}, "rows_per_file must be a positive multiple of batch_size = 4"),
        ({"log_prob_dtype": "float16"}, "log_prob_dtype must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"topk": 8}, "did you mean 'top_k'"),
        ({"training": {"seq_len": 65}}, "seq_len must be at most the model's 64 positions, got 65"),
        ({"training": {"files": ()}}, "training.files must name text, got none"),
        ({"training": {"files": {"prose.jsonl": 0.0}}}, r"no file matches|must be in \(0, inf\)"),
        ({"training": {"teacher_cache": "x"}}, "named by output"),
        ({"output": ""}, "output must be given"),
    ],
)
def test_bad_settings_are_refused(folder, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("moe_jax.cache_teacher.load_hf", None)  # no weights are read
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        cache_teacher(configuration(folder, **{"output": str(tmp_path / "new"), **changes}))
    assert not (tmp_path / "new").exists()


def test_what_the_machine_cannot_do_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("moe_jax.cache_teacher.load_hf", None)
    config = configuration(folder, output=str(tmp_path / "new"))
    rows = STEPS * BATCH * SEQ_LEN * (8 + K * 8)
    free = shutil.disk_usage(tmp_path)._replace(free=rows - 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: free)
        with pytest.raises(OSError, match=f"{rows:,} bytes are needed, {rows - 1:,} are free"):
            cache_teacher(config)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(ValueError, match="written by one process, got 2"):
            cache_teacher(config)
    save_model(tmp_path / "small", vocab_size=9)
    with pytest.raises(ValueError, match="token ids must be below the model's vocab_size = 9"):
        cache_teacher(dataclasses.replace(config, model=str(tmp_path / "small")))
    assert not (tmp_path / "new").exists()


def test_folders_that_are_no_cache_are_left_alone(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for output in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FileExistsError, match="output"):
            cache_teacher(configuration(folder, output=str(output)))
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="not the index of a teacher cache"):
        cache_teacher(configuration(folder, output=str(tmp_path)))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_errors_while_writing_leave_whole_files_only(tmp_path, monkeypatch):
    class FullDisk(writer.ArrayRecordWriter):
        def close(self):
            raise RuntimeError("write() failed: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "ArrayRecordWriter", FullDisk)
        with pytest.raises(OSError, match="No space left") as caught:
            fill(tmp_path)
    assert caught.value.filename == str(tmp_path / FIRST)
    with pytest.raises(ValueError, match=r"the stream must give 4 rows .*, got 2"):
        TeacherCacheWriter(tmp_path, FACTS).write(itertools.islice(numbered(0), 1), guess)
    nothing = {"teacher_log_probs": np.full((2, 3, 2), np.nan)}
    with pytest.raises(FloatingPointError, match="must be finite, got nan"):
        TeacherCacheWriter(tmp_path, FACTS).write(
            numbered(0), lambda batches: ({**batch, **nothing} for batch in guess(batches))
        )
    assert [file.name for file in tmp_path.iterdir()] == ["unfinished.json"]
    fill(tmp_path)


def test_the_command(folder, tmp_path):
    """From its configuration file to a cache that opens, through a model in bfloat16."""
    flags = {
        "model": folder / "model",
        "output": tmp_path / "cache",
        "top_k": 3,
        "steps": 4,
        "dtype": "bfloat16",
        "training.files": folder / "*.jsonl",
        "training.seq_len": 16,
        "training.batch_size": 2,
        "training.cache_dir": tmp_path / "tokens",
    }
    command = [
        *(sys.executable, "-m", "moe_jax.cache_teacher"),
        f"--config={REPOSITORY / 'configs' / 'cache_teacher.py'}",
        *(f"--config.{name}={value}" for name, value in flags.items()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cache = open_teacher_cache(tmp_path / "cache", expected={"k": 3, "compute_dtype": "bfloat16"})
    assert f"the 3 most likely tokens keep {cache.kept_mass:.2%} of the" in done.stdout
    assert "8 rows of 16 tokens" in done.stdout
    assert f"8 rows, {8 * 16 * (8 + 3 * 6):,} bytes before compression" in done.stderr
    assert len(list(cache.dataset(0, 2))) == 4
    refused = subprocess.run(
        [*command, "--config.top_k=4"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].endswith("k must be 4, got 3")
    assert "Traceback" not in refused.stderr
