"""Times one calibration pass against a plain forward pass, and against llm-compressor's REAP.

    python tools/bench_calibrate.py [--repeats=5]
    python tools/bench_calibrate.py --peer=PYTHON    # of an environment with llmcompressor

Random Qwen3-MoE models of 4 layers (D = 256, F = 128, 1,024 token ids; 16 experts of which 2 are
chosen, 64/4 and 128/8), 64 sequences of 128 tokens in batches of 8, float32. Ours is measured after
a first pass that compiles, whose time is given apart: what every forward-only criterion needs,
scoring by REAP, planning and pruning a quarter of the experts. The peer's whole one-shot on the
same checkpoint and tokens is measured in the same run, and the experts that both keep in the first
layer are compared (deeper ones differ by design: it calibrates each layer behind pruned ones).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe_jax import apply_plan, calibrate, load_hf, make_plan, score
from moe_jax.model import forward

SIZES = ((16, 2), (64, 4), (128, 8))
SEQUENCES, LENGTH, BATCH, VOCABULARY = 64, 128, 8, 1024


def save_random_model(folder: str, experts: int, chosen: int) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_experts=experts,
        num_experts_per_tok=chosen,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )
    Qwen3MoeForCausalLM(config).to(torch.float32).save_pretrained(folder)


class Ours:
    """The package on one checkpoint."""

    def __init__(self, folder: str, tokens: np.ndarray) -> None:
        self.config, self.params = load_hf(folder, dtype="float32")
        mask = np.ones((BATCH, tokens.shape[1]), bool)
        self.batches = [
            {"tokens": tokens[i : i + BATCH].astype(np.int32), "mask": mask}
            for i in range(0, len(tokens), BATCH)
        ]
        self.forward_step = jax.jit(lambda p, t, s: forward(p, self.config, t, s)[0])

    def forward(self) -> None:
        for batch in self.batches:
            logits = self.forward_step(self.params, batch["tokens"], batch["mask"].astype(np.int32))
        logits.block_until_ready()

    def calibrate(self):
        return calibrate(self.params, self.config, self.batches, warn=False)

    def compress(self):
        """The plan, after calibrating, scoring and pruning."""
        stats = self.calibrate()
        plan = make_plan(score(stats, "reap"), self.config, keep_ratio=0.75, replacement="delete")
        jax.block_until_ready(apply_plan(self.params, self.config, plan, stats)[1])
        return plan


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def best(calls: Sequence[Callable[[], Any]], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of the first of each of ``calls``, and of the best of ``repeats`` later ones.

    They take turns: a machine that slows down meanwhile slows all of them down.
    """
    first = [seconds_of(call) for call in calls]
    later = [[seconds_of(call) for call in calls] for _ in range(repeats)]
    return first, [min(column) for column in zip(*later, strict=True)]


def peer(python: str, folder: str, tokens: np.ndarray, work: Path, repeats: int):
    """What ``peer_reap.py`` measured, and the experts that the peer keeps in the first layer."""
    np.save(work / "tokens.npy", tokens)
    report = work / "report.json"
    script = Path(__file__).parent / "peer_reap.py"
    arguments = [folder, work / "tokens.npy", report, repeats, BATCH]
    done = subprocess.run(
        [python, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=work,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the peer failed:\n{done.stderr[-3000:]}")
    seconds = json.loads(done.stdout.strip().splitlines()[-1])
    return seconds, json.loads(report.read_text())


def kept_in_first_layer(report) -> list[int]:
    """From the peer's report, whose keys are names of modules."""
    layers = report.get("retained_experts", report)
    return sorted(next(kept for name, kept in sorted(layers.items()) if "layers.0." in f"{name}."))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", default="", help="Python with llmcompressor")
    options = parser.parse_args()
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (SEQUENCES, LENGTH))
    print("experts forward calibrate ratio compress compile", "peer-forward peer-oneshot ours/peer")
    for experts, chosen in SIZES:
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            folder = str(work / "model")
            save_random_model(folder, experts, chosen)
            ours = Ours(folder, tokens)
            first, later = best((ours.forward, ours.calibrate, ours.compress), options.repeats)
            plain, measured, whole = later
            compile_time = first[1] - measured + first[2] - whole
            line = [f"{experts}/{chosen}", f"{plain:.2f}s", f"{measured:.2f}s"]
            line += [f"{measured / plain:.2f}x", f"{whole:.2f}s", f"{compile_time:.1f}s"]
            if options.peer:
                seconds, report = peer(options.peer, folder, tokens, work, 2)
                plan = ours.compress()
                mine = sorted(set(range(experts)) - set(plan.layers[0].deleted))
                same = mine == kept_in_first_layer(report)
                line += [f"{seconds['forward']:.2f}s", f"{seconds['oneshot']:.2f}s"]
                line += [
                    f"{whole / seconds['oneshot']:.2f}x",
                    f"first layer {'same' if same else 'DIFFERS'}",
                ]
            print(*line, flush=True)


if __name__ == "__main__":
    main()
