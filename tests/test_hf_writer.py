"""Exports appear whole or not at all, with everything but the weights carried over."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_hf import random_params, read_tensors, save_tiny, trees_equal

from moe_jax import load_hf, save_hf
from moe_jax.config import LayerConfig, ModelConfig, MoeConfig
from moe_jax.files import remove_stale
from moe_jax.kinds import GroupedQueryAttention
from moe_jax.params import count_params

LAYER = LayerConfig(2, 2, MoeConfig(num_experts=4, experts_per_token=2, expert_width=8))
CONFIG = ModelConfig(
    family="olmoe",
    vocab_size=32,
    width=16,
    attention=GroupedQueryAttention(8, qk_norm="full"),
    layers=(LAYER,) * 2,
)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def siblings(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir() if p.name.startswith("."))


def test_small_files_of_the_source_travel_along(tmp_path, params):
    source = tmp_path / "source"
    save_hf(source, params, CONFIG)
    carried = {
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ x }}",
        "generation_config.json": '{"eos_token_id": 7}',
        "LICENSE": "free",
        "modeling_phimoe.py": "x = 1",
    }
    for name, text in carried.items():
        (source / name).write_text(text)
    for name in ("pytorch_model.bin", "other.safetensors", "pytorch_model.bin.index.json", ".git"):
        (source / name).write_text("not wanted")
    save_hf(tmp_path / "out", params, CONFIG, source=source, extra_files={"LICENSE": b"mine"})
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert written == {*carried, "config.json", "model.safetensors", "moe_jax.json"}
    for name, text in {**carried, "LICENSE": "mine"}.items():
        assert (tmp_path / "out" / name).read_text() == text


def test_a_source_may_be_a_mere_tokenizer(tmp_path, params):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    save_hf(tmp_path / "out", params, CONFIG, source=tmp_path / "tokenizer")
    assert load_hf(tmp_path / "out")[0] == CONFIG
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_links_out_of_the_source_are_not_followed(tmp_path, params):
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "secret").write_text("x")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="links must not leave"):
        save_hf(tmp_path / "out", params, CONFIG, source=source)
    assert not (tmp_path / "out").exists()


def test_only_empty_folders_and_our_own_are_written_to(tmp_path, params):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    save_hf(foreign, params, CONFIG)  # empty
    save_hf(foreign, params, CONFIG)  # ours
    (foreign / "moe_jax.json").unlink()
    with pytest.raises(FileExistsError, match="must be empty or an earlier export"):
        save_hf(foreign, params, CONFIG)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(FileExistsError, match="got the file"):
        save_hf(file, params, CONFIG)


def test_overwriting_leaves_nothing_of_the_old(tmp_path, params):
    out = tmp_path / "out"
    save_hf(out, params, CONFIG, max_shard_bytes=4000, extra_files={"old.txt": "x"})
    save_hf(out, params, CONFIG)
    names = {p.name for p in out.iterdir()}
    assert names == {"config.json", "model.safetensors", "moe_jax.json"}
    assert siblings(out) == []


def test_an_export_never_replaces_its_own_source(tmp_path, params):
    out = tmp_path / "out"
    save_hf(out, params, CONFIG, extra_files={"tokenizer.json": "{}"})
    before = read_tensors(out)
    config, loaded = load_hf(out)
    (tmp_path / "link").symlink_to(out)
    for target in (out, out / "smaller", tmp_path / "link" / "smaller", tmp_path):
        with pytest.raises((ValueError, FileExistsError), match=r"must lie apart|must be empty"):
            save_hf(target, loaded, config, source=out)
    assert read_tensors(out) == before


def test_failure_while_writing_leaves_the_old_state(tmp_path, params):
    out = tmp_path / "out"
    save_hf(out, params, CONFIG)
    before = read_tensors(out)
    broken = jax.tree.map(np.array, params)
    broken["layers"][1]["moe"]["experts"]["up"][3, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in model\.layers\.1.*experts\.3\.up"):
        save_hf(out, broken, CONFIG)
    assert read_tensors(out) == before
    with pytest.raises(ValueError, match="NaN"):
        save_hf(tmp_path / "new", broken, CONFIG)
    assert not (tmp_path / "new").exists()
    assert siblings(out) == []


def leftover(out: Path, process: int, end: str = "") -> Path:
    return out.with_name(f".{out.name}.writing-{socket.gethostname()}-{process}{end}")


def test_what_was_set_aside_by_a_killed_process_goes_back(tmp_path, params):
    """Killed between two renames: the folder is absent, and the next call finds it."""
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    out = tmp_path / "out"
    save_hf(out, params, CONFIG, extra_files={"old.txt": "x"})
    for process in (killed.pid, os.getpid()):  # a container's next process may have the same id
        aside = leftover(out, process, "-old")
        out.rename(aside)
        leftover(out, process).mkdir()
        remove_stale(out)
        assert (out / "old.txt").exists()
        assert siblings(out) == []
        aside.mkdir()  # killed a moment later, with the new folder in place
        save_hf(out, params, CONFIG, extra_files={"old.txt": "x"})
        assert siblings(out) == []
    running = leftover(out, os.getppid(), "-old")
    running.mkdir()
    save_hf(out, params, CONFIG)
    assert siblings(out) == [running.name]


# Python leaves SIGINT ignored where it was started so, as background jobs of a shell are.
KILLED = """
import signal, sys, time
from pathlib import Path
import moe_jax.hf.shards as shards
from moe_jax.hf import load_hf, save_hf

signal.signal(signal.SIGINT, signal.default_int_handler)
config, params = load_hf(sys.argv[1])
write = shards.write_file

def slowly(path, *arguments):
    write(path, *arguments)
    Path(sys.argv[1] + ".writing").touch()
    time.sleep(60)

shards.write_file = slowly
save_hf(sys.argv[1], params, config, extra_files={"new.txt": "x"}, max_shard_bytes=4000)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_leaves_the_old_state(tmp_path, params, how):
    out = tmp_path / "out"
    save_hf(out, params, CONFIG)
    before = read_tensors(out)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stderr=subprocess.PIPE)
    started = Path(f"{out}.writing")
    for _ in range(600):
        if started.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    assert started.exists(), process.communicate()[1]
    os.kill(process.pid, how)
    process.communicate()
    assert read_tensors(out) == before
    assert not (out / "new.txt").exists()
    assert len(siblings(out)) == (how == signal.SIGKILL)
    save_hf(out, params, CONFIG)  # removes what the killed process left
    assert siblings(out) == []


def test_wrong_params_are_named(tmp_path, params):
    wrong = jax.tree.map(np.asarray, params)
    wrong["embed"]["embedding"] = wrong["embed"]["embedding"][:-1]
    with pytest.raises(ValueError, match=r"embed\.embedding must have shape \(32, 16\)"):
        save_hf(tmp_path / "out", wrong, CONFIG)
    missing = {key: value for key, value in params.items() if key != "lm_head"}
    with pytest.raises(ValueError, match=r"lm_head\.kernel is missing"):
        save_hf(tmp_path / "out", missing, CONFIG)
    with pytest.raises(ValueError, match="more does not belong"):
        save_hf(tmp_path / "out", {**params, "more": params["embed"]["embedding"]}, CONFIG)
    with pytest.raises(ValueError, match="dtype of"):
        save_hf(tmp_path / "out", params, CONFIG, dtype="int8")
    with pytest.raises(ValueError, match="max_shard_bytes must be positive"):
        save_hf(tmp_path / "out", params, CONFIG, max_shard_bytes=0)
    for name in ("../x", "config.json", "model.safetensors"):
        with pytest.raises(ValueError, match="extra_files"):
            save_hf(tmp_path / "out", params, CONFIG, extra_files={name: "x"})
    assert list(tmp_path.iterdir()) == []


def test_shards_stay_within_their_limit(tmp_path, params):
    limit = 3000
    save_hf(tmp_path / "out", params, CONFIG, max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = read_tensors(tmp_path / "out")
    sizes: dict[str, int] = {}
    for key, file in index["weight_map"].items():
        sizes[file] = sizes.get(file, 0) + len(tensors[key][2])
    assert max(sizes.values()) <= limit
    assert sum(sizes.values()) == 4 * count_params(CONFIG).total


@pytest.mark.parametrize("fused", [False, True])
def test_compression_keeps_the_layout(tmp_path, fused):
    source = save_tiny(tmp_path / "source", "phimoe", fused=fused)
    config, params = load_hf(source)
    slim = config.replace_moe(0, expert_width=4).replace_moe(1, expert_width=4)
    for layer in params["layers"]:
        experts = layer["moe"]["experts"]
        layer["moe"]["experts"] = {
            "gate": experts["gate"][..., :4],
            "up": experts["up"][..., :4],
            "down": experts["down"][:, :4],
        }
    save_hf(tmp_path / "out", params, slim, source=source)
    assert set(read_tensors(tmp_path / "out")) == set(read_tensors(source))
    again, loaded = load_hf(tmp_path / "out")
    assert again == slim
    assert trees_equal(loaded, params)
